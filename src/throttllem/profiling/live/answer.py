"""One streamed answer as a stopwatch: when its events came, and how many tokens were out with each.

Knows nothing of batches, nor what the text says.
"""

from __future__ import annotations

import asyncio
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

from throttllem.engines.base import Call, EngineError, LiveEngine
from throttllem.engines.sse import Splitter, data_of

_COUNTED = re.compile(rb'"completion_tokens"\s*:\s*(\d+)')


def now() -> float:
    """Seconds of the running loop, which everything here is timed by."""
    return asyncio.get_running_loop().time()


@dataclass(slots=True)
class Answer:
    """`times_s[i]` is when `tokens[i]` tokens were out; one entry for each read that brought news."""

    prompt_tokens: int
    sent_s: float = 0.0
    ended_s: float | None = None
    times_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    error: EngineError | None = None
    _events: Splitter = field(default_factory=Splitter)

    @property
    def length(self) -> int:
        """Tokens that are out."""
        return self.tokens[-1] if self.tokens else 0

    async def follow(self, engine: LiveEngine, call: Call, heard: Callable[[], None]) -> None:
        """Send the request and read its answer to the end, saying so each time; a failure is kept in `error`."""
        self.sent_s = now()
        try:
            async with engine.open(call) as reply:
                if reply.status != 200:
                    said = (await reply.body())[:200]
                    raise EngineError(f"the engine refuses: {reply.status} {said.decode(errors='replace')}")
                while chunk := await reply.read():
                    self.read(chunk, now())
                    heard()
        except EngineError as error:
            self.error = error
        finally:
            self.ended_s = now()
            heard()

    def read(self, chunk: bytes, now_s: float) -> None:
        """Some bytes of the stream; an event may be cut anywhere."""
        before = self.length
        total = before
        for event in self._events.feed(chunk):
            if event.rstrip().endswith(b"[DONE]") or not (event.startswith(b"data:") or data_of(event)):
                continue
            # An event is a token, unless it counts them itself; the last one may hold the count and no token.
            counted = _COUNTED.search(event)
            total = int(counted[1]) if counted else total + 1
        if total > before:
            self.times_s.append(now_s)
            self.tokens.append(total)

    def length_at(self, when_s: float) -> int:
        """Tokens that were out then."""
        place = bisect_left(self.times_s, when_s)
        return self.tokens[place - 1] if place else 0

    def nearest(self, when_s: float) -> int | None:
        """Which entry came nearest to then; None: there is none."""
        if not self.times_s:
            return None
        place = bisect_left(self.times_s, when_s)
        near = [each for each in (place - 1, place) if 0 <= each < len(self.times_s)]
        return min(near, key=lambda each: abs(self.times_s[each] - when_s))
