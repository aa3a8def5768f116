"""Counts a prompt's tokens: by the engine's own tokenizer over HTTP, by a file here, or an estimate that says so."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from pydantic_core import to_json

from throttllem.engines.base import EngineError, ParsedRequest, PromptCount
from throttllem.engines.http import Upstream, parsed
from throttllem.engines.tokenizer_file import TokenizerFile

CHAT = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs")
ADDED = ("add_special_tokens", "mm_processor_kwargs", "media_io_kwargs")
"""Fields of a request that change its prompt, as vLLM's `/tokenize` knows them."""
PROBE = "Does it count alike? def f(x): return 2 * x  # déjà vu, 東京\n"
REMEMBERED = 512
OFF_LOOP_CHARACTERS = 16384
"""Longer texts are counted in a thread, so that they do not hold up every other request."""


class TokenCounter:
    """Counts for one engine. `begin` finds out who can count; until then every count is the file's, or an estimate."""

    def __init__(self, upstream: Upstream, path: Path | None) -> None:
        self._upstream = upstream
        self._path = path
        self._file = TokenizerFile(path)
        self._remote = False
        self._agrees = True
        self._known: OrderedDict[bytes, int] = OrderedDict()

    async def begin(self, model: str) -> tuple[str, ...]:
        """Try the engine's `/tokenize` and the file; notes for people. Raises EngineError for a file that is none."""
        self._known.clear()
        await asyncio.to_thread(self._file.load)
        body = to_json({"model": model, "prompt": PROBE})
        status, answer = await self._upstream.post("/tokenize", body, timeout_s=5.0)
        self._remote = status == 200
        if not self._remote:
            return (_NO_TEMPLATE if self._file.exact else _ESTIMATED,)
        self._agrees = not self._file.exact or _count_in(answer) == self._file.count(PROBE)
        if self._agrees:
            return ()
        return (f"{self._path} does not count as the engine does: the engine is asked for every prompt",)

    async def count(self, ask: ParsedRequest) -> PromptCount:
        """The mean over the prompts of `ask`, rounded up. Raises EngineError if the engine stopped answering."""
        if ask.messages:
            return await self._chat(ask)
        parts = [await self._prompt(ask, prompt) for prompt in ask.prompts]
        tokens = math.ceil(sum(part.tokens for part in parts) / max(1, len(parts)))
        worst = min(parts, key=lambda part: part.exact, default=PromptCount(tokens=0, by="nothing", exact=True))
        return PromptCount(tokens=tokens, by=worst.by, exact=worst.exact)

    async def _prompt(self, ask: ParsedRequest, prompt: str | tuple[int, ...]) -> PromptCount:
        if not isinstance(prompt, str):
            return PromptCount(tokens=len(prompt), by="its token ids", exact=True)
        if not (self._file.exact and self._agrees):
            fields = {name: ask.body[name] for name in ADDED if name in ask.body}
            tokens = await self._asked({"model": ask.model, "prompt": prompt, **fields})
            if tokens is not None:
                return PromptCount(tokens=tokens, by="the engine", exact=True)
        special = ask.body.get("add_special_tokens") is not False
        return await self._here(prompt, special=special, exact=self._file.exact and self._agrees)

    async def _chat(self, ask: ParsedRequest) -> PromptCount:
        fields = {name: ask.body[name] for name in (*CHAT, *ADDED) if name in ask.body}
        tokens = await self._asked({"model": ask.model, **fields})
        if tokens is not None:
            return PromptCount(tokens=tokens, by="the engine", exact=True)
        return await self._here("\n".join(_texts(ask.body.get("messages"))), special=True, exact=False)

    async def _asked(self, body: dict[str, object]) -> int | None:
        """The engine's count; None: it has none, as for a body that it would refuse."""
        if not self._remote:
            return None
        content = to_json(body)
        key = hashlib.blake2b(content, digest_size=16).digest()
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return known
        status, answer = await self._upstream.post("/tokenize", content, timeout_s=10.0)
        if status != 200:
            return None
        tokens = self._known[key] = _count_in(answer)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return tokens

    async def _here(self, text: str, *, special: bool, exact: bool) -> PromptCount:
        if len(text) > OFF_LOOP_CHARACTERS:
            tokens = await asyncio.to_thread(self._file.count, text, special=special)
        else:
            tokens = self._file.count(text, special=special)
        return PromptCount(tokens=tokens, by=self._file.name, exact=exact)


_ESTIMATED = (
    "the engine has no /tokenize and no tokenizer is set: 4 bytes of a prompt count as a token, which shifts KV and "
    "prefill predictions; set engines.tokenizer to the model's tokenizer.json"
)
_NO_TEMPLATE = "the engine has no /tokenize: chats are counted without their template, some tokens too few"


def _count_in(answer: bytes) -> int:
    count = found.get("count") if isinstance(found := parsed("/tokenize", answer), dict) else None
    if not isinstance(count, int) or count < 0:
        raise EngineError(f"/tokenize answers no count: {answer[:200].decode(errors='replace')}")
    return count


def _texts(messages: object) -> Iterator[str]:
    """Every text in a chat's messages; pictures and the like count nothing."""
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            yield content
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                yield part["text"]
