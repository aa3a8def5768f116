"""What the gateway needs of the GPUs of one engine, set side by side as one group. Knows nothing of who they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """All GPUs of an engine: the clock in force (None: unknown), watts now, joules since the counter began."""

    clock_mhz: int | None
    watts: float
    energy_j: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the engine did in one iteration of `seconds`: rows that decoded over `kv_tokens` of cache, and prompt tokens
    with `prefill_pairs` query-key pairs. `joules`: known already (a simulated engine's own), None otherwise.
    """

    seconds: float
    decode_rows: int
    kv_tokens: int
    prefill_tokens: int
    prefill_pairs: float
    joules: float | None = None


class Gpu(Protocol):
    """The GPUs of one engine. Errors of the hardware are OSError with what to do about them."""

    async def set_clock(self, mhz: int) -> int | None:
        """Set the clock; returns the clock that is in force then, None if it cannot be read."""

    def read(self) -> Reading:
        """Clock, watts and the energy counter as they are now."""

    def worked(self, work: Work) -> None:
        """What the engine did: a simulated GPU draws power by it, a real one needs not be told."""

    def idled(self, seconds: float) -> None:
        """Nothing ran for so long."""
