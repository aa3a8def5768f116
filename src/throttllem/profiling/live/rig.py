"""An engine held under a load of our making: answers that are open, what it says of itself, who else is in it.

Knows nothing of what is measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from throttllem.engines.base import EngineError, LiveEngine, Report
from throttllem.profiling.live.answer import Answer, now
from throttllem.profiling.live.prompts import Prompts

STALL_S = 120.0
"""Nothing at all for so long: the engine is stuck."""
IDLE_S = 15.0
"""So long after we left, whoever still runs is not ours."""
GRACE_S = 0.3
"""A report may be so much older than what we know."""
UNREPORTED_PAUSE_S = 0.05


class ForeignError(Exception):
    """Somebody else uses the engine; the message says how many."""


class Rig:
    """One engine and the requests in it. Use within `watching`.

    `quiet_s` without a word from an engine that has spoken before, and nothing runs in it: it tells its steps only.
    """

    def __init__(self, engine: LiveEngine, prompts: Prompts, *, quiet_s: float) -> None:
        self.reports: list[Report] = []
        self._engine = engine
        self._prompts = prompts
        self._answers: list[Answer] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._news = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None
        self._foreign: str | None = None
        self._last: Report | None = None
        self._quiet_s = quiet_s

    @property
    def speaks(self) -> bool:
        """Whether the engine has said anything of itself."""
        return self._last is not None

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Listen to the engine while in the block; leaving ends every request."""
        self._watch = asyncio.create_task(self._engine.watch(self._tell))
        try:
            yield
        finally:
            await self.clear()
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    async def ask(self, tokens: int, max_tokens: int) -> Answer:
        """Open one more request; it is read beside what follows."""
        call, counted = await self._prompts.call(tokens, max_tokens)
        answer = Answer(prompt_tokens=counted)
        self._answers.append(answer)
        task = asyncio.create_task(answer.follow(self._engine, call, self._news.set))
        self._tasks.append(task)
        return answer

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for news until it holds. Raises EngineError if a request or the engine failed, or nothing comes."""
        while not holds():
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), STALL_S)
            except TimeoutError as error:
                raise EngineError(f"the engine gave nothing for {STALL_S:g} s", status=504) from error
            self.check()

    async def ended(self, answers: Sequence[Answer]) -> None:
        """Wait until all these have ended."""
        await self.until(lambda: all(answer.ended_s is not None for answer in answers))

    def check(self) -> None:
        """Raise what went wrong: EngineError, or ForeignError."""
        failed = next((answer.error for answer in self._answers if answer.error is not None), None)
        if failed is not None:
            raise failed
        if self._watch is not None and self._watch.done() and (gone := self._watch.exception()) is not None:
            raise gone
        if self._foreign is not None:
            raise ForeignError(self._foreign)

    async def clear(self) -> None:
        """End every request, and forget them and the reports."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self._answers.clear()
        self.reports.clear()

    async def idle(self) -> None:
        """End every request and wait until nothing runs. Raises ForeignError if something goes on running."""
        await self.clear()
        if self._last is None:
            # It says nothing of itself; what was aborted is gone with its next step.
            await asyncio.sleep(UNREPORTED_PAUSE_S)
        limit_s = now() + IDLE_S
        while self._last is not None and (busy := self._last.running + self._last.waiting):
            if now() > limit_s:
                raise ForeignError(f"{busy} requests are in the engine, and none of them is ours")
            if not await self.pause(self._quiet_s):
                break
        self._foreign = None
        self.reports.clear()

    async def pause(self, seconds: float) -> bool:
        """Wait for news at most so long; whether any came. Raises EngineError if the engine is gone."""
        self._news.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), seconds)
        if self._watch is not None and self._watch.done():
            self.check()
        return self._news.is_set()

    def _tell(self, report: Report) -> None:
        self._last = report
        self.reports.append(report)
        recent_s = now() - GRACE_S
        ours = sum(answer.ended_s is None or answer.ended_s > recent_s for answer in self._answers)
        there = report.running + report.waiting
        if self._answers and there > ours:
            self._foreign = f"{there} requests are in the engine, and {ours} of them are ours"
        self._news.set()
