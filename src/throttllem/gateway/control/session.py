"""One controlled request at the gateway, from its arrival to its end. Ends exactly once.

    async with models.session(parsed, count, slo) as session:   # ApiError: the core will never place it
        backend = await session.placed()                        # ApiError: queue full, SLO unmeetable, no engine
        ... session.tokens(n) for what the engine streams ...   # ApiError: engine lost, silent for too long
        receipt = session.finish(tokens)                        # leaving without it cancels the request

It belongs to the task that entered it. The control loop interrupts that task if the request ends on its side.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Protocol

from throttllem.core.types import Event, Request
from throttllem.engines.base import NO_COUNT, EngineError, PromptCount
from throttllem.gateway.control.backend import Backend
from throttllem.gateway.control.slo_attainment import Latencies
from throttllem.openai_api.errors import ApiError
from throttllem.openai_api.usage import NO_USAGE, Usage


class Client(Protocol):
    """The client, as far as a session needs it (gateway/http/exchange.py)."""

    @property
    def blocked(self) -> bool:
        """Whether it is waited for."""

    @property
    def untouched(self) -> bool:
        """Whether it has got nothing of the output yet."""


class Loop(Protocol):
    """What a session calls: the control loop (gateway/control/loop.py), on whose time line all seconds are."""

    def now(self) -> float:
        """Seconds."""

    def arrive(self, session: Session) -> None:
        """A request came in."""

    def finish(self, session: Session, tokens: int | None) -> None:
        """It has its whole output."""

    def leave(self, session: Session, error: BaseException | None) -> None:
        """It ends unfinished."""

    def come_back(self, session: Session) -> None:
        """Its engine broke off before the client got a byte."""

    def handle(self, event: Event) -> None:
        """An event for the core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a request was given, as the client may ask for it (`metrics` in the last chunk). Absent: None.

    `mean_itl_ms` over the gaps between tokens, `energy_joules` its share of the GPUs' energy, `clock_mhz` of the engine
    when it ended. `output_tokens_estimated`: the engine gave no count of its output, whose events were counted.
    `cached_prompt_tokens`: those that the engine reported not to have computed.
    """

    queue_time_ms: float | None
    time_to_first_token_ms: float | None
    mean_itl_ms: float | None
    energy_joules: float | None
    clock_mhz: int | None
    output_tokens: int | None = None
    output_tokens_estimated: bool | None = None
    cached_prompt_tokens: int | None = None


@dataclass(slots=True, eq=False)
class Session:
    """Seconds on the control loop's time line; None: not yet. `received_s`: when the engine last sent bytes of it
    without a token. `count`: of the prompt, before it was sent; `usage`: what the engine counted itself. `failure`
    is what the control loop ended it with.

    `repeatable`: it may be sent to an engine twice; `retried`: it came back from one; `checking`: it is not known yet
    whether that one is lost.
    """

    loop: Loop
    request: Request
    streams: bool
    chat: bool = False
    count: PromptCount = NO_COUNT
    repeatable: bool = False
    retried: bool = False
    checking: bool = False
    backend: Backend | None = None
    dispatched_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    received_s: float | None = None
    generated_tokens: int = 0
    usage: Usage = NO_USAGE
    energy_j: float | None = None
    ended: bool = False
    failure: ApiError | None = None
    _client: Client | None = None
    _placed: asyncio.Future[Backend] | None = None
    _task: asyncio.Task[object] | None = None
    _interrupted: bool = False
    _cancelling: int = 0

    async def __aenter__(self) -> Session:
        """Hand the request to the core."""
        self._task = asyncio.current_task()
        self._cancelling = self._task.cancelling() if self._task is not None else 0
        self._placed = asyncio.get_running_loop().create_future()
        self.loop.arrive(self)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Cancel what did not finish; ApiError in place of an interruption by the control loop."""
        if not self.ended:
            self.loop.leave(self, error)
        if self._placed is not None and not self._placed.done():
            self._placed.cancel()
        if not self._interrupted or self._task is None or self.failure is None:
            return
        self._interrupted = False
        # Another cancellation of the task still counts.
        alone = self._task.uncancel() <= self._cancelling
        if alone and isinstance(error, asyncio.CancelledError | EngineError):
            raise self.failure from None

    async def placed(self) -> Backend:
        """Wait until the core dispatches the request; the backend to send it to."""
        assert self._placed is not None
        return await self._placed

    @property
    def returns(self) -> bool:
        """Whether it is tried once more if its engine ends it now: never twice, nor once the client got a byte."""
        untouched = self._client is None or self._client.untouched
        return self.repeatable and untouched and not (self.retried or self.ended) and self.backend is not None

    def goes_again(self, error: BaseException) -> bool:
        """Whether `placed` is to be waited for once more after `error`, which ended the try at an engine."""
        if self._interrupted and self.failure is None and self._task is not None:
            self._interrupted = False
            return self._task.uncancel() <= self._cancelling  # another cancellation of the task still counts
        if isinstance(error, EngineError) and error.unreachable and self.returns:
            self.loop.come_back(self)
            return not self.ended
        return False

    def tokens(self, count: int = 1) -> None:
        """`count` output tokens came, of all choices together."""
        if self.ended:
            return
        loop, backend = self.loop, self.backend
        now_s = loop.now()
        if self.first_token_s is None:
            self.first_token_s = now_s
        self.last_token_s = now_s
        self.generated_tokens += count
        if backend is not None and backend.progress is not None:
            backend.last_sign_s = now_s
            for event in backend.progress.token(self.request.id, count):
                loop.handle(event)

    def attended(self, client: Client) -> None:
        """The engine replies, and from now on this client takes what it sends."""
        self._client = client
        self.received()

    def received(self) -> None:
        """The engine sent something that is no token."""
        self.received_s = self.loop.now()
        if self.backend is not None:
            self.backend.last_sign_s = self.received_s

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all its prompts, by the engine's count where it gave one."""
        reported, request = self.usage.prompt_tokens, self.request
        return reported or request.prompt_tokens * request.prompts

    async def read_counters(self) -> None:
        """The stream ended without a count: what follows of it may rest on the engine's counters."""
        if not self.ended and self.backend is not None:
            await self.backend.read_counters(self.request.id)

    def finish(self, tokens: int | None = None, usage: Usage | None = None) -> Receipt:
        """The output is complete; `tokens` in all, where the engine reported it. To be called before the last chunk."""
        if not self.ended:
            if usage is not None:
                self.usage = self._bounded(usage)
            if tokens is not None:
                self.generated_tokens = tokens
            if self.last_token_s is None or not self.streams:
                self.last_token_s = self.loop.now()
            self.loop.finish(self, tokens)
        return self.receipt()

    def _bounded(self, usage: Usage) -> Usage:
        """Without what the engine cannot have: prompts over its context."""
        connected = self.backend.connected if self.backend is not None else None
        if usage.prompt_tokens is None or connected is None:
            return usage
        most = connected.spec.max_context_tokens * self.request.prompts
        return usage if usage.prompt_tokens <= most else Usage(output_tokens=usage.output_tokens)

    # ---- the control loop's side -----------------------------------------------------------------------------

    def dispatched(self, backend: Backend, now_s: float) -> None:
        """The core dispatched the request to this backend."""
        self.backend, self.dispatched_s = backend, now_s
        if self._placed is not None and not self._placed.done():
            self._placed.set_result(backend)

    def came_back(self, *, interrupt: bool) -> None:
        """Nothing of it is in an engine any more, and it waits for a place again; `interrupt` the task that relays."""
        # Prefixes were in the cache of the engine that it left.
        self.request = replace(
            self.request, cached_prompt_tokens=0, common_prompt_tokens=0, prefix_of=None, prefix_tokens=0
        )
        self.retried, self.backend, self._client, self.dispatched_s = True, None, None, None
        self.first_token_s = self.last_token_s = self.received_s = None
        self.generated_tokens, self.usage = 0, NO_USAGE
        self._placed = asyncio.get_running_loop().create_future()
        if interrupt and self._task is not None:
            self._interrupted = True
            self._task.cancel()

    def fail(self, failure: ApiError) -> None:
        """End it from the control loop: `placed` raises, or the task that relays the output is interrupted."""
        self.ended, self.failure = True, failure
        if self._placed is not None and not self._placed.done():
            self._placed.set_exception(failure)
            self._placed.exception()  # where nothing waits for it, that is no error of the program
        elif self._task is not None:
            self._interrupted = True
            self._task.cancel()

    def last_byte_s(self, now_s: float) -> float:
        """When the engine last sent a byte of it, or it was dispatched; now, while the client is waited for, since the
        engine is not read then.
        """
        if self._client is not None and self._client.blocked:
            return now_s
        return max(self.dispatched_s or 0.0, self.received_s or 0.0, self.last_token_s or 0.0)

    def latencies(self) -> Latencies:
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
        """What the request was given so far."""
        seen = self.latencies()
        clock = self.backend.accounting.reading().clock_mhz if self.backend is not None else None
        return Receipt(
            queue_time_ms=_milliseconds(seen.queue_s),
            time_to_first_token_ms=_milliseconds(seen.ttft_s),
            mean_itl_ms=_milliseconds(seen.tbt_s),
            energy_joules=None if self.energy_j is None else round(self.energy_j, 4),
            clock_mhz=clock,
            output_tokens=self.generated_tokens or None,
            output_tokens_estimated=True if self.generated_tokens and self.usage.output_tokens is None else None,
            cached_prompt_tokens=self.usage.cached_tokens,
        )


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
