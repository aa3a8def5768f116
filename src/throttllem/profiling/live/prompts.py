"""Synthetic requests: prompts of a known number of tokens that share nothing, and answers that go on to their limit.

Every prompt is drawn anew from its first token on, in every run, so that no engine finds a block of it in a prefix
cache. Token ids where the API takes them, else words counted by the engine's tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic_core import to_json

from throttllem.engines.base import Call, EngineError, LiveEngine, ParsedRequest
from throttllem.engines.paths import COMPLETIONS

HEADERS = (("content-type", "application/json"), ("accept", "*/*"))
FIRST_ID, LAST_ID = 16, 1000
"""Token ids that every vocabulary has, past the special ones that often come first."""
EXTRAS: tuple[Mapping[str, object], ...] = (
    {"ignore_eos": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"ignore_eos": True},
    {},
)
"""What engines may refuse, best first: answers that do not end early, and events that count their tokens."""
_SAMPLE_WORDS = 200


class Prompts:
    """The requests of one engine, for `model` as it is called there. `begin` finds out what it takes."""

    def __init__(self, engine: LiveEngine, model: str) -> None:
        self._engine = engine
        self._model = model
        # Never seeded: the prompts of an earlier run may still be in the engine's prefix cache.
        self._rng = np.random.default_rng()
        self._ids = True
        self._extras = EXTRAS[0]
        self._tokens_per_word = 1.0
        self.notes: tuple[str, ...] = ()

    async def begin(self) -> None:
        """Try what the engine takes. Raises EngineError if it refuses every form."""
        refusal = ""
        for ids in (True, False):
            for extras in EXTRAS:
                self._ids, self._extras = ids, extras
                call, _ = await self.call(FIRST_ID, 1)
                async with self._engine.open(call) as reply:
                    body = await reply.body()
                if reply.status == 200:
                    return await self._settle()
                refusal = f"{reply.status}: {body[:200].decode(errors='replace')}"
        raise EngineError(f"the engine refuses every synthetic request, the last with {refusal}")

    async def call(self, tokens: int, max_tokens: int) -> tuple[Call, int]:
        """A request with a prompt of `tokens` (of words: as near as may be), and how many tokens it has."""
        prompt: list[int] | str
        if self._ids:
            prompt, counted = [int(number) for number in self._rng.integers(FIRST_ID, LAST_ID, tokens)], tokens
        else:
            prompt, counted = await self._words(tokens)
        body: dict[str, object] = {"model": self._model, "prompt": prompt, "max_tokens": max_tokens, "stream": True}
        body |= {"temperature": 0, **self._extras}
        ask = self._ask(prompt, body, max_tokens)
        call = Call(
            method="POST",
            path=COMPLETIONS,
            headers=HEADERS,
            body=to_json(body),
            ask=ask,
            prompt_tokens=counted,
            max_tokens=max_tokens,
        )
        return call, counted

    def _ask(self, prompt: list[int] | str, body: dict[str, object], max_tokens: int) -> ParsedRequest:
        prompts = (prompt,) if isinstance(prompt, str) else (tuple(prompt),)
        return ParsedRequest(
            path=COMPLETIONS, model=self._model, body=body, prompts=prompts, max_tokens=max_tokens, stream=True
        )

    async def _settle(self) -> None:
        notes = []
        if not self._ids:
            text = self._drawn(_SAMPLE_WORDS)
            count = await self._engine.count(self._ask(text, {"model": self._model, "prompt": text}, 1))
            self._tokens_per_word = max(0.25, count.tokens / _SAMPLE_WORDS)
            exact = "" if count.exact else ", which is an estimate: prompt tokens and KV blocks are off by as much"
            notes.append(f"the engine takes no token ids: prompts are words, counted by {count.by}{exact}")
        if "ignore_eos" not in self._extras:
            notes.append("the engine takes no ignore_eos: answers may end early, and fewer rows come of a point")
        self.notes = tuple(notes)

    async def _words(self, tokens: int) -> tuple[str, int]:
        words = max(1, int(tokens / self._tokens_per_word))
        while True:
            text = self._drawn(words)
            counted = await self._engine.count(self._ask(text, {"model": self._model, "prompt": text}, 1))
            # Longer than planned might not fit.
            if counted.tokens <= tokens or words == 1:
                return text, counted.tokens
            words = max(1, int(words * min(0.98, tokens / counted.tokens)))

    def _drawn(self, words: int) -> str:
        letters = self._rng.integers(ord("a"), ord("z") + 1, (words, 4), dtype=np.uint8)
        return " ".join(bytes(word).decode() for word in letters)
