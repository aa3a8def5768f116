"""A request's way through the gateway as the HTTP side sees it: it waits for its place, reports its tokens, ends once.

The driver makes tickets (`gateway/driver.py`); the HTTP side uses one like this:

    with models.driver(ask.model).ticket(ask, count, slo, caller) as ticket:   # raises Refused: no place for it, ever
        engine, call_id = await ticket.place()                                 # raises Refused: queue, promise, engine
        async with engine.open(call) as reply:
            async for chunk in reply.chunks: ticket.tokens(n) ...
        ticket.finish(tokens)                                                  # leaving without it: cancelled
"""

from __future__ import annotations

from dataclasses import dataclass


class Refused(Exception):
    """A request that is not served. `status`, `kind` and `code` as in OpenAI's error body; `retry_after_s` for 429/503."""

    def __init__(
        self, status: int, message: str, *, kind: str, code: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.retry_after_s = retry_after_s


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
