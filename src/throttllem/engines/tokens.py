"""Counts a prompt's tokens: by the engine's tokenizer over HTTP, by a tokenizer.json, else by a marked estimate."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Raw
from pydantic_core import to_json

from throttllem.engines.base import NO_COUNT, EngineError, PromptCount
from throttllem.engines.http import Upstream, parsed
from throttllem.engines.prefix_cache import Blocks, blocks_of
from throttllem.openai_api.conversations import texts_in
from throttllem.openai_api.large_bodies import LARGE_BYTES, PIECE_BYTES, read_value
from throttllem.openai_api.requests import ParsedRequest

BYTES_PER_TOKEN = 4
"""Of English text, about; only where there is no tokenizer."""
OFF_LOOP_CHARACTERS = 16384
"""Longer texts are counted in a thread, so that they do not delay every other request."""
_CHAT_FIELDS = (
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
)
_ADDED_FIELDS = ("add_special_tokens", "mm_processor_kwargs", "media_io_kwargs")
"""Fields of a request that change its prompt, as vLLM's `/tokenize` knows them."""
_PROBE = "Does it count alike? def f(x): return 2 * x  # déjà vu, 東京\n"
_REMEMBERED = 512
_MOST_TOKENS = 1 << 31
_LONGEST_BYTES = 16
"""Bytes of a token, on average over a prompt that is worth counting: text has 3 to 5, long runs of one character 16."""
_PARTS = re.compile(rb'"type"\s{0,8}:\s{0,8}"(?:image|audio|video|input_image|input_audio)(?:_url|_pil|_embeds)?"')
"""Parts of a chat that are no text: their placeholders are the same whatever they hold."""
_MEDIA = re.compile(rb'"data(?:"\s{0,8}:\s{0,8}"|:)')
_LONGEST_MATCH_BYTES = 64
"""Of both."""
_MOST_PARTS = 10_000
"""Of one conversation that are counted: far more than any context holds."""
_ESTIMATED = (
    "the engine has no /tokenize and no tokenizer is set: 4 bytes of a prompt count as a token, which shifts KV and "
    "prefill predictions; with the model's tokenizer.json: {set_by}"
)
_NO_TEMPLATE = "the engine has no /tokenize: chats are counted without their template, some tokens too few"


class TokenizerFile:
    """Counts by a tokenizer.json, or estimates without one (`path` None). Loading takes up to a second."""

    def __init__(self, path: Path | None) -> None:
        self.path = None if path is None else path.expanduser()
        self.exact = path is not None
        """Whether counts are the model's own."""

    async def load(self) -> None:
        """Read the file now, in a thread. Raises EngineError if it cannot be used."""
        if self.path is not None:
            await asyncio.to_thread(lambda: self._tokenizer)

    async def count(self, text: str, *, special: bool = True, exact: bool | None = None) -> PromptCount:
        """Tokens of a text, at least 1. `special`: with those that the tokenizer adds around it. `exact` False: the
        text is not quite what the engine will read.
        """
        if len(text) > OFF_LOOP_CHARACTERS:
            tokens = await asyncio.to_thread(self.tokens, text, special=special)
        else:
            tokens = self.tokens(text, special=special)
        by = f"an estimate of {BYTES_PER_TOKEN} bytes per token" if self.path is None else str(self.path)
        return PromptCount(tokens=tokens, by=by, exact=self.exact if exact is None else exact)

    def ids(self, text: str, special: bool = True) -> list[int]:
        """The tokens of a text, by a file."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def tokens(self, text: str, *, special: bool = True) -> int:
        """Tokens of a text, counted at once."""
        if self.path is None:
            return max(1, -(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN))
        return max(1, len(self.ids(text, special)))

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            from tokenizers import Tokenizer  # noqa: PLC0415
        except ImportError as error:
            raise EngineError(
                f"{self.path}: needs the package tokenizers: pip install throttllem[tokenizers]"
            ) from error
        if self.path is None or not self.path.is_file():
            raise EngineError(f"{self.path}: there is no such file; the option names the model's tokenizer.json")
        try:
            return Tokenizer.from_file(str(self.path))
        except Exception as error:  # The package raises plain Exception.
            raise EngineError(f"{self.path}: not a tokenizer.json: {error}") from error


class TokenCounter:
    """Counts for one engine. `begin` finds out what can count; until then the file counts, or an estimate."""

    def __init__(self, upstream: Upstream, tokenizer: Path | None, *, set_by: str) -> None:
        self._upstream = upstream
        self._set_by = set_by
        self._file = TokenizerFile(tokenizer)
        self._has_endpoint = False
        self._file_counts = self._file.exact
        """Whether the file counts texts as the engine does, as far as is known."""
        self._known: OrderedDict[bytes, tuple[int, Blocks]] = OrderedDict()
        self._context_tokens: int | None = None
        self._block_tokens: int | None = None

    async def begin(
        self, model: str, context_tokens: int | None = None, block_tokens: int | None = None
    ) -> tuple[str, ...]:
        """Try the engine's `/tokenize` and the file; notes for people. `block_tokens`: of a KV block, for an engine
        that caches prefixes. Raises EngineError for an unusable file.
        """
        self._block_tokens = block_tokens
        self._known.clear()
        self._context_tokens = context_tokens
        await self._file.load()
        body = to_json({"model": model, "prompt": _PROBE})
        status, answer = await self._upstream.post("/tokenize", body, timeout_s=5.0)
        # llama.cpp's takes another body, and gives no count for this one.
        self._has_endpoint, self._file_counts = status == 200 and _has_count(answer), self._file.exact
        if not self._has_endpoint:
            return (_NO_TEMPLATE if self._file.exact else _ESTIMATED.format(set_by=self._set_by),)
        self._file_counts = self._file.exact and _count_in(answer)[0] == self._file.tokens(_PROBE)
        if self._file_counts or not self._file.exact:
            return ()
        return (f"{self._file.path} does not count as the engine does: every prompt is sent to the engine's /tokenize",)

    async def count(self, request: ParsedRequest) -> PromptCount:
        """The mean over the prompts, rounded up. Raises EngineError if the engine stopped answering."""
        if len(request.body) > LARGE_BYTES:
            return await self._large(request)
        if request.is_conversation:
            return await self._chat(request)
        return mean_count([await self._prompt(request, prompt) for prompt in request.prompts])

    async def _large(self, request: ParsedRequest) -> PromptCount:
        """A large prompt. One that is far over the context is estimated: the engine refuses it in its own words, and
        faster than it counts. So is one that the engine does not count in time, as it would serve it.
        """
        size_bytes = await asyncio.to_thread(_text_bytes, request)
        most = (self._context_tokens or math.inf) * _LONGEST_BYTES * max(1, len(request.prompts))
        if size_bytes <= most or not any(isinstance(prompt, str | Raw) for prompt in request.prompts or ("",)):
            try:
                if request.is_conversation:
                    return await self._chat(request)
                return mean_count([await self._prompt(request, prompt) for prompt in request.prompts])
            except EngineError as error:
                if error.status != 504:
                    raise
        tokens = -(-size_bytes // (BYTES_PER_TOKEN * max(1, len(request.prompts))))
        return PromptCount(tokens=max(1, tokens), by=f"an estimate of {BYTES_PER_TOKEN} bytes per token", exact=False)

    async def _prompt(self, request: ParsedRequest, prompt: str | Raw | Sequence[int]) -> PromptCount:
        if not isinstance(prompt, str | Raw):
            return PromptCount(
                tokens=len(prompt), by="its token ids", exact=True, blocks=await self._blocks(request, prompt)
            )
        if not self._file_counts:
            fields = {name: request.fields[name] for name in _ADDED_FIELDS if name in request.fields}
            counted = await self._endpoint(request, {"model": request.model, "prompt": prompt, **fields})
            if counted is not None:
                return PromptCount(tokens=counted[0], by="the engine", exact=True, blocks=counted[1])
        special = request.fields.get("add_special_tokens") is not False
        text = prompt if isinstance(prompt, str) else await asyncio.to_thread(read_value, "prompt", prompt)
        found = await self._file.count(text, special=special, exact=self._file_counts)
        if not self._block_tokens or not self._file_counts:
            return found
        return replace(
            found, blocks=await self._blocks(request, await asyncio.to_thread(self._file.ids, text, special))
        )

    async def _chat(self, request: ParsedRequest) -> PromptCount:
        if request.chat is None:
            return await self._estimate(request)
        fields = {name: request.chat[name] for name in (*_CHAT_FIELDS, *_ADDED_FIELDS) if name in request.chat}
        counted = await self._endpoint(request, {"model": request.model, **fields})
        if counted is not None:
            return PromptCount(tokens=counted[0], by="the engine", exact=True, blocks=counted[1])
        messages = request.chat.get("messages")
        if isinstance(messages, Raw):
            messages = await asyncio.to_thread(read_value, "messages", messages)
        return await self._without_parts(request, "\n".join(_texts(messages)))

    async def _without_parts(self, request: ParsedRequest, text: str) -> PromptCount:
        """The tokens of a conversation's text, and how many parts of it are none."""
        found = await self._file.count(text, exact=False)
        if len(request.body) > LARGE_BYTES:
            return replace(found, parts=await asyncio.to_thread(_parts_in, request.body))
        return replace(found, parts=len(_PARTS.findall(request.body)))

    async def _estimate(self, request: ParsedRequest) -> PromptCount:
        """The tokens of the texts of a conversation that is not known whole."""
        texts: list[str] = []
        for name in ("instructions", "system", "input", "messages"):
            value = request.fields.get(name)
            texts += texts_in(await asyncio.to_thread(read_value, name, value) if isinstance(value, Raw) else value)
        return await self._without_parts(request, "\n".join(texts))

    async def _blocks(self, request: ParsedRequest, token_ids: object) -> Blocks:
        """The prompt's blocks as the engine's cache knows them; none of one that is not text alone."""
        if not self._block_tokens or not isinstance(token_ids, list | tuple):
            return ()
        if len(request.body) > LARGE_BYTES:
            return await asyncio.to_thread(_blocks_of, request, token_ids, self._block_tokens)
        return _blocks_of(request, token_ids, self._block_tokens)

    async def _endpoint(self, request: ParsedRequest, body: dict[str, object]) -> tuple[int, Blocks] | None:
        """The engine's count and the prompt's blocks; None: it has none, as for a body that it would refuse."""
        if not self._has_endpoint:
            return None
        salt = str(request.fields.get("cache_salt")) if self._block_tokens else ""
        if any(isinstance(part, Raw) for part in body.values()):
            content = await asyncio.to_thread(msgspec.json.encode, body)
            key = await asyncio.to_thread(_digest, content, salt)
        else:
            content = _written(body)
            key = _digest(content, salt)
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return known
        status, answer = await self._upstream.post("/tokenize", content, timeout_s=10.0)
        if status != 200:
            return None
        tokens, ids = _count_in(answer)
        counted = self._known[key] = tokens, await self._blocks(request, ids)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return counted


def _written(body: dict[str, object]) -> bytes:
    """The body as JSON; a lone surrogate, which UTF-8 cannot hold, as an escape."""
    try:
        return to_json(body)
    except ValueError:
        return json.dumps(body).encode()


def _digest(content: bytes, salt: str) -> bytes:
    digest = hashlib.blake2b(content, digest_size=16)
    digest.update(salt.encode(errors="surrogatepass"))
    return digest.digest()


def _blocks_of(request: ParsedRequest, token_ids: Sequence[int], block_tokens: int) -> Blocks:
    if not request.prompts and _search(_PARTS, request.body, 0) is not None:
        return ()
    try:
        return blocks_of(token_ids, block_tokens, (request.model, str(request.fields.get("cache_salt"))))
    except (TypeError, OverflowError):  # no token ids
        return ()


def _search(pattern: re.Pattern[bytes], body: bytes, at: int) -> re.Match[bytes] | None:
    """The next match from `at` on, in pieces: one call would hold up the event loop, even from a thread."""
    while at < len(body):
        if (found := pattern.search(body, at, at + PIECE_BYTES + _LONGEST_MATCH_BYTES)) is not None:
            return found
        at += PIECE_BYTES
    return None


def _parts_in(body: bytes) -> int:
    parts, found = 0, _search(_PARTS, body, 0)
    while found is not None and parts < _MOST_PARTS:
        parts, found = parts + 1, _search(_PARTS, body, found.end())
    return parts


def _text_bytes(request: ParsedRequest) -> int:
    """The most bytes that a large request's prompts can have: of its body all that is no picture, sound or token id."""
    body, size_bytes, at = request.body, len(request.body), 0
    if not request.is_conversation:
        return size_bytes
    for _ in range(_MOST_PARTS):
        if (found := _search(_MEDIA, body, at)) is None or (at := body.find(b'"', found.end())) < 0:
            break
        size_bytes -= at - found.start()
    return size_bytes


def mean_count(counts: list[PromptCount]) -> PromptCount:
    """One count for several prompts: the mean, rounded up; by the least exact counter. One alone is returned as it
    is, with its blocks and parts.
    """
    if len(counts) == 1:
        return counts[0]
    tokens = math.ceil(sum(count.tokens for count in counts) / max(1, len(counts)))
    worst = min(counts, key=lambda count: count.exact, default=NO_COUNT)
    return PromptCount(tokens=tokens, by=worst.by, exact=worst.exact)


def _has_count(answer: bytes) -> bool:
    try:
        return _count_in(answer)[0] > 0
    except EngineError:
        return False


def _count_in(answer: bytes) -> tuple[int, object]:
    """The count, and what should be the token ids."""
    found = parsed("/tokenize", answer)
    count, ids = (found.get("count"), found.get("tokens")) if isinstance(found, dict) else (None, None)
    if type(count) is not int or not 0 <= count <= _MOST_TOKENS:
        raise EngineError(f"/tokenize answers no count: {answer[:200].decode(errors='replace')}")
    return count, ids


def _texts(messages: object) -> Iterator[str]:
    """Every text in a chat's messages; other parts, as pictures, count nothing."""
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            yield content
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                yield part["text"]
