"""An engine under synthetic load: requests of known length, their streams timed, and the engine's own reports.

Knows nothing of what is measured, nor of the text of an output.
"""

from __future__ import annotations

import asyncio
import re
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
from pydantic_core import to_json

from throttllem.engines.base import Call, EngineError, LiveEngine, Report
from throttllem.openai_api.event_stream import Splitter, data_of
from throttllem.openai_api.requests import COMPLETIONS, ParsedRequest, parse_request

STALL_S = 120.0
"""An engine that sends nothing for this time has failed."""
IDLE_S = 15.0
"""Requests that run this long after ours were aborted belong to other clients."""
GRACE_S = 0.3
"""A report may be this much older than the end of a request."""
UNREPORTED_PAUSE_S = 0.05
HEADERS = (("content-type", "application/json"), ("accept", "*/*"))
FIRST_ID, LAST_ID = 16, 1000
"""Token ids of every vocabulary, after the special ones that often come first."""
EXTRAS: tuple[Mapping[str, object], ...] = (
    {"ignore_eos": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"ignore_eos": True},
    {},
)
"""Parameters that an engine may reject, best first: outputs that do not end early, and events that count tokens."""
_SAMPLE_WORDS = 200
_COUNTED = re.compile(rb'"completion_tokens"\s*:\s*(\d+)')


class ExternalLoadError(Exception):
    """Another client uses the engine; the message says how many requests it has."""


def now() -> float:
    """Seconds of the running loop; all times here are in it."""
    return asyncio.get_running_loop().time()


class Prompts:
    """Requests with prompts of a known length, for `model` by the engine's own name. Call `begin` first.

    Every prompt is drawn from its first token on, in every run, so that no prefix cache holds a block of it: token ids
    if the API accepts them, else words counted by the engine's tokenizer.
    """

    def __init__(self, engine: LiveEngine, model: str) -> None:
        self._engine = engine
        self._model = model
        # Never seeded: the engine's prefix cache may hold the prompts of an earlier run.
        self._rng = np.random.default_rng()
        self._ids = True
        self._extras = EXTRAS[0]
        self._tokens_per_word = 1.0
        self.notes: tuple[str, ...] = ()

    async def begin(self) -> None:
        """Find the best form of request that the engine accepts. Raises EngineError if it rejects every form."""
        rejection = ""
        for ids in (True, False):
            for extras in EXTRAS:
                self._ids, self._extras = ids, extras
                async with self._engine.open(await self.call(FIRST_ID, 1)) as reply:
                    body = await reply.body()
                if reply.status == 200:
                    return await self._settle()
                rejection = f"{reply.status}: {body[:200].decode(errors='replace')}"
        raise EngineError(f"the engine refuses every synthetic request, the last with {rejection}")

    async def _settle(self) -> None:
        notes = []
        if not self._ids:
            count = await self._engine.count(self._to_count(self._words(_SAMPLE_WORDS)))
            self._tokens_per_word = max(0.25, count.tokens / _SAMPLE_WORDS)
            exact = "" if count.exact else ", which is an estimate: prompt tokens and KV blocks are off by as much"
            notes.append(f"the engine takes no token ids: prompts are words, counted by {count.by}{exact}")
        if "ignore_eos" not in self._extras:
            notes.append("the engine takes no ignore_eos: outputs may end early, and a point gives fewer rows")
        self.notes = tuple(notes)

    async def call(self, tokens: int, max_tokens: int) -> Call:
        """A request with a prompt of `tokens`; of words, the nearest count that is not above."""
        prompt: list[int] | str
        if self._ids:
            prompt, counted = [int(number) for number in self._rng.integers(FIRST_ID, LAST_ID, tokens)], tokens
        else:
            prompt, counted = await self._counted_words(tokens)
        body: dict[str, object] = {"model": self._model, "prompt": prompt, "max_tokens": max_tokens, "stream": True}
        body |= {"temperature": 0, **self._extras}
        request = parse_request(COMPLETIONS, to_json(body))
        return Call(
            method="POST",
            path=COMPLETIONS,
            headers=HEADERS,
            body=request.body,
            request=request,
            prompt_tokens=counted,
            max_tokens=max_tokens,
        )

    def _to_count(self, text: str) -> ParsedRequest:
        return parse_request(COMPLETIONS, to_json({"model": self._model, "prompt": text}))

    async def _counted_words(self, tokens: int) -> tuple[str, int]:
        words = max(1, int(tokens / self._tokens_per_word))
        while True:
            text = self._words(words)
            counted = (await self._engine.count(self._to_count(text))).tokens
            # A longer prompt might not fit the engine.
            if counted <= tokens or words == 1:
                return text, counted
            words = max(1, int(words * min(0.98, tokens / counted)))

    def _words(self, count: int) -> str:
        letters = self._rng.integers(ord("a"), ord("z") + 1, (count, 4), dtype=np.uint8)
        return " ".join(bytes(word).decode() for word in letters)


@dataclass(slots=True)
class Stream:
    """One streamed output: at `times_s[i]`, `tokens[i]` tokens had arrived; one entry for each read with new tokens."""

    prompt_tokens: int
    sent_s: float = 0.0
    ended_s: float | None = None
    times_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    error: EngineError | None = None
    _events: Splitter = field(default_factory=Splitter)

    @property
    def length(self) -> int:
        """Tokens that have arrived."""
        return self.tokens[-1] if self.tokens else 0

    async def follow(self, engine: LiveEngine, call: Call, on_change: Callable[[], None]) -> None:
        """Send the request and read to the end of the stream; a failure is stored in `error`."""
        self.sent_s = now()
        try:
            async with engine.open(call) as reply:
                if reply.status != 200:
                    message = (await reply.body())[:200].decode(errors="replace")
                    raise EngineError(f"the engine refuses: {reply.status} {message}")
                while chunk := await reply.read():
                    self.read(chunk, now())
                    on_change()
        except EngineError as error:
            self.error = error
        finally:
            self.ended_s = now()
            on_change()

    def read(self, chunk: bytes, now_s: float) -> None:
        """Count the tokens in some bytes of the stream; an event may be cut anywhere."""
        total = self.length
        for event in self._events.feed(chunk):
            if event.rstrip().endswith(b"[DONE]") or not (event.startswith(b"data:") or data_of(event)):
                continue
            # An event is a token, unless it counts them itself; the last event may hold the count and no token.
            counted = _COUNTED.search(event)
            total = int(counted[1]) if counted else total + 1
        if total > self.length:
            self.times_s.append(now_s)
            self.tokens.append(total)

    def length_at(self, when_s: float) -> int:
        """Tokens that had arrived before then."""
        place = bisect_left(self.times_s, when_s)
        return self.tokens[place - 1] if place else 0

    def nearest(self, when_s: float) -> int:
        """The index of the entry nearest to then. There must be one."""
        place = bisect_left(self.times_s, when_s)
        near = [each for each in (place - 1, place) if 0 <= each < len(self.times_s)]
        return min(near, key=lambda each: abs(self.times_s[each] - when_s))

    def between(self, from_s: float, to_s: float) -> tuple[float, int]:
        """Seconds and tokens between the entries nearest to both times; (0, 0) if there is none."""
        if not self.times_s:
            return 0.0, 0
        first, last = self.nearest(from_s), self.nearest(to_s)
        return self.times_s[last] - self.times_s[first], self.tokens[last] - self.tokens[first]

    @property
    def gap_s(self) -> float | None:
        """Mean seconds per token after the first; None if there are too few."""
        if len(self.times_s) < 2:
            return None
        return (self.times_s[-1] - self.times_s[0]) / (self.tokens[-1] - self.tokens[0])


class EngineLoad:
    """The requests in one engine. Use within `watching`.

    `quiet_s`: if an engine that has reported before is silent for this time, it is idle: it reports its steps only.
    """

    def __init__(self, engine: LiveEngine, prompts: Prompts, *, quiet_s: float) -> None:
        self.reports: list[Report] = []
        self._engine = engine
        self._prompts = prompts
        self._streams: list[Stream] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None
        self._external: str | None = None
        self._last: Report | None = None
        self._quiet_s = quiet_s

    @property
    def reported(self) -> bool:
        """Whether the engine has reported anything."""
        return self._last is not None

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Receive the engine's reports within the block; leaving it aborts every request."""
        self._watch = asyncio.create_task(self._engine.watch(self._report))
        try:
            yield
        finally:
            await self.clear()
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    async def open(self, tokens: int, max_tokens: int) -> Stream:
        """Send one more request; its stream is read concurrently."""
        call = await self._prompts.call(tokens, max_tokens)
        stream = Stream(prompt_tokens=call.prompt_tokens or 0)
        self._streams.append(stream)
        self._tasks.append(asyncio.create_task(stream.follow(self._engine, call, self._changed.set)))
        return stream

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until it holds. Raises EngineError if a request or the engine failed, or nothing arrives."""
        while not holds():
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), STALL_S)
            except TimeoutError as error:
                raise EngineError(f"the engine sent nothing for {STALL_S:g} s", status=504) from error
            self.check()

    async def ended(self, streams: Sequence[Stream]) -> None:
        """Wait until all these have ended."""
        await self.until(lambda: all(stream.ended_s is not None for stream in streams))

    def check(self) -> None:
        """Raise EngineError or ExternalLoadError if either occurred."""
        failed = next((stream.error for stream in self._streams if stream.error is not None), None)
        if failed is not None:
            raise failed
        if self._watch is not None and self._watch.done() and (error := self._watch.exception()) is not None:
            raise error
        if self._external is not None:
            raise ExternalLoadError(self._external)

    async def clear(self) -> None:
        """Abort every request, and forget them and the reports."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self._streams.clear()
        self.reports.clear()

    async def idle(self) -> None:
        """Abort every request and wait until nothing runs. Raises ExternalLoadError if something keeps running."""
        await self.clear()
        if self._last is None:
            # The engine reports nothing; aborted requests are gone with its next step.
            await asyncio.sleep(UNREPORTED_PAUSE_S)
        limit_s = now() + IDLE_S
        while self._last is not None and (busy := self._last.running + self._last.waiting):
            if now() > limit_s:
                raise ExternalLoadError(f"{busy} requests are in the engine, and none of them is ours")
            if not await self.wait(self._quiet_s):
                break
        self._external = None
        self.reports.clear()

    async def wait(self, seconds: float) -> bool:
        """Wait for a change at most this long; whether there was one. Raises EngineError if the engine is gone."""
        self._changed.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)
        if self._watch is not None and self._watch.done():
            self.check()
        return self._changed.is_set()

    def _report(self, report: Report) -> None:
        self._last = report
        self.reports.append(report)
        recent_s = now() - GRACE_S
        ours = sum(stream.ended_s is None or stream.ended_s > recent_s for stream in self._streams)
        total = report.running + report.waiting
        if self._streams and total > ours:
            self._external = f"{total} requests are in the engine, and {ours} of them are ours"
        self._changed.set()
