"""A request's way through the gateway as the HTTP side sees it: it waits for its place, reports its tokens, ends once.

async with models.ticket(ask, count, slo, caller, streams=True) as ticket:  # RefusedError: never any place for it
    engine, request_id = await ticket.place()                    # RefusedError: queue, promise, no engine
    async with engine.open(call) as reply:
        while chunk := await reply.read(): ticket.tokens(n) ...  # RefusedError: engine lost, silent too long
    receipt = ticket.finish(tokens)                              # leaving without it: cancelled
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from throttllem.core.types import Slo
from throttllem.engines.base import LiveEngine, ParsedRequest, PromptCount
from throttllem.gateway.telemetry.status import GatewayStatus


class RefusedError(Exception):
    """A request that is not served (further). `status`, `kind`, `code` as in OpenAI; `retry_after_s` for 429, 503.

    `detail` is for the log, and no client sees it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str,
        code: str | None = None,
        retry_after_s: int | None = None,
        detail: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.retry_after_s = retry_after_s
        self.detail = detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Engines that are up, all there are, and whether one of them ails that should be up; who says so."""

    up: int
    engines: int
    ails: bool
    draining: bool
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a request was given, as the client may ask for it (`metrics` in the last chunk). Absent: None.

    `mean_itl_ms` over the gaps between tokens, `energy_joules` its share of its iterations, `clock_mhz` of the engine
    when it ended.
    """

    queue_time_ms: float | None
    time_to_first_token_ms: float | None
    mean_itl_ms: float | None
    energy_joules: float | None
    clock_mhz: int | None


class Ticket(Protocol):
    """One controlled request. Belongs to the task that entered it; that task is interrupted if the engine is lost."""

    async def __aenter__(self) -> Ticket:
        """Hand the request to the core."""

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Cancel what did not finish; RefusedError in place of an interruption by the driver."""

    async def place(self) -> tuple[LiveEngine, int]:
        """Wait for a place in an engine: the engine, and the id to name in `Call.request_id`."""

    def tokens(self, count: int = 1) -> None:
        """So many tokens of the answer came (all choices together)."""

    def finish(self, tokens: int | None = None) -> Receipt:
        """The answer is complete; `tokens` in all, where the engine said so. Call it before the last chunk is sent."""


class Models(Protocol):
    """All models behind the gateway: what the HTTP side sees of the driver."""

    def names(self) -> tuple[str, ...]:
        """Names that clients may use."""

    def most_sequences(self) -> int | None:
        """Answers side by side that the largest engine can run; None: not all have said yet."""

    async def count(self, ask: ParsedRequest) -> PromptCount:
        """Tokens of a prompt. Raises RefusedError (404 unknown model, 429 too many are counted, 502 to 504 engine)."""

    def ticket(self, ask: ParsedRequest, count: PromptCount, slo: Slo, caller: str, *, streams: bool) -> Ticket:
        """A ticket for a controlled request; `streams`: tokens will be told as they come."""

    def passage(self, model: str | None) -> LiveEngine:
        """The engine of a request without control (None: the first model). Raises RefusedError (404, 503)."""

    def health(self) -> Health:
        """How it is, told at next to no cost."""

    def status(self) -> GatewayStatus:
        """Everything that may be shown."""
