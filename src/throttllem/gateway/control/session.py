"""One controlled request from its arrival to its end: what the HTTP side holds as its ticket. Ends exactly once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from throttllem.core.types import Request
from throttllem.engines.base import EngineError, LiveEngine
from throttllem.gateway.control.slo_attainment import Latencies
from throttllem.gateway.control.ticket import Receipt
from throttllem.openai_api.errors import ApiError

if TYPE_CHECKING:
    from throttllem.gateway.control.backend import Backend
    from throttllem.gateway.control.loop import ControlLoop


@dataclass(slots=True, eq=False)
class Session:
    """A request at the gateway; implements `ticket.Ticket`. Seconds on the driver's time line, None: not yet.

    `failure` is what the driver ended it with while the HTTP side was busy with it.
    """

    driver: ControlLoop
    request: Request
    streams: bool
    chat: bool = False
    link: Backend | None = None
    dispatched_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    generated_tokens: int = 0
    energy_j: float | None = None
    ended: bool = False
    failure: ApiError | None = None
    _placed: asyncio.Future[Backend] | None = None
    _task: asyncio.Task[object] | None = None
    _waits: bool = field(default=False)
    _interrupted: bool = False
    _cancelling: int = 0

    async def __aenter__(self) -> Session:
        """Hand the request to the core."""
        self._task = asyncio.current_task()
        self._cancelling = self._task.cancelling() if self._task is not None else 0
        self._placed = asyncio.get_running_loop().create_future()
        self.driver.arrive(self)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Cancel what did not finish; ApiError in place of an interruption by the driver."""
        if not self.ended:
            self.driver.leave(self, error)
        if self._placed is not None and not self._placed.done():
            self._placed.cancel()
        if not self._interrupted or self._task is None or self.failure is None:
            return
        self._interrupted = False
        # Whoever else cancelled the task still wants it cancelled.
        alone = self._task.uncancel() <= self._cancelling
        if alone and isinstance(error, asyncio.CancelledError | EngineError):
            raise self.failure from None

    async def place(self) -> tuple[LiveEngine, int]:
        """Wait for a place in an engine: the engine, and the id to name in `Call.request_id`."""
        assert self._placed is not None
        self._waits = True
        try:
            link = await self._placed
        finally:
            self._waits = False
        return link.engine, self.request.id

    def tokens(self, count: int = 1) -> None:
        """So many tokens of the answer came (all choices together)."""
        if self.ended:
            return
        now_s = self.driver.now()
        if self.first_token_s is None:
            self.first_token_s = now_s
        self.last_token_s = now_s
        self.generated_tokens += count
        if self.link is not None:
            self.link.token(self.request.id, count)

    def finish(self, tokens: int | None = None) -> Receipt:
        """The answer is complete; `tokens` in all, where the engine said so."""
        if not self.ended:
            if tokens is not None:
                self.generated_tokens = tokens
            if self.last_token_s is None or not self.streams:
                self.last_token_s = self.driver.now()
            self.driver.finish(self, tokens)
        return self.receipt()

    # ---- the driver's side -----------------------------------------------------------------------------------

    def admitted(self, link: Backend, now_s: float) -> None:
        """A place was found."""
        self.link, self.dispatched_s = link, now_s
        if self._placed is not None and not self._placed.done():
            self._placed.set_result(link)

    def refuse(self, failure: ApiError) -> None:
        """It ends here, by the driver's word: who waits hears it, who is busy with the engine is interrupted."""
        self.ended, self.failure = True, failure
        if self._placed is not None and not self._placed.done():
            self._placed.set_exception(failure)
            if not self._waits:  # nobody may ever ask; that is no error of the program
                self._placed.exception()
        elif self._task is not None:
            self._interrupted = True
            self._task.cancel()

    def seen(self) -> Latencies:
        """What the client saw so far."""
        arrived_s, first_s, last_s = self.request.arrival_s, self.first_token_s, self.last_token_s
        gaps = -(-self.generated_tokens // self.request.sequences) - 1
        return Latencies(
            queue_s=None if self.dispatched_s is None else self.dispatched_s - arrived_s,
            ttft_s=None if first_s is None else first_s - arrived_s,
            tbt_s=None if first_s is None or last_s is None or gaps < 1 else (last_s - first_s) / gaps,
            e2e_s=None if last_s is None else last_s - arrived_s,
        )

    def receipt(self) -> Receipt:
        """What it was given so far."""
        seen = self.seen()
        clock = self.link.booking.meter.reading().clock_mhz if self.link is not None else None
        return Receipt(
            queue_time_ms=_ms(seen.queue_s),
            time_to_first_token_ms=_ms(seen.ttft_s),
            mean_itl_ms=_ms(seen.tbt_s),
            energy_joules=None if self.energy_j is None else round(self.energy_j, 4),
            clock_mhz=clock,
        )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
