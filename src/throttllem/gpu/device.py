"""What the gateway needs of the GPUs of one engine, set side by side as one group. Knows nothing of who they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class ClockError(OSError):
    """A clock that a GPU does not have, or does not follow to; the message says what it has, or why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """All GPUs of an engine: the clock in force (None: unknown), watts now, joules since the counter began.

    `advised_mhz`: what was decided where nothing is set. `stands_for_mhz`: a lower clock that was asked for, where the
    clock in force is the lowest that may be set. `limit_mhz`: they follow no higher than this now, and `held`
    says what holds them. `trouble`: why clocks are not set though they should be.
    """

    clock_mhz: int | None
    watts: float
    energy_j: float
    advised_mhz: int | None = None
    stands_for_mhz: int | None = None
    limit_mhz: int | None = None
    held: str | None = None
    trouble: str | None = None

    @property
    def planned_on_mhz(self) -> int | None:
        """The clock that plans go by: the advised one, as if it were in force, else the one that is, or one below it
        that it stands for.
        """
        wanted = (self.advised_mhz, self.stands_for_mhz, self.clock_mhz)
        return next((mhz for mhz in wanted if mhz is not None), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the engine did in one iteration of `seconds`: rows that decoded over `kv_tokens` of cache, and prompt tokens
    with `prefill_pairs` query-key pairs. `joules`: known already (a simulated engine's own), None otherwise.
    """

    seconds: float
    decode_sequences: int
    kv_tokens: int
    prefill_tokens: int
    prefill_pairs: float
    joules: float | None = None


def nothing() -> None:
    """For those who need not be told."""


class Gpu(Protocol):
    """The GPUs of one engine. Errors of the hardware are OSError with what to do about them."""

    async def set_clock(self, mhz: int | None, sent: Callable[[], None] = nothing) -> int | None:
        """Set the clock (None: give it back, it is nobody's any more); `sent` is called when the command is on its way.
        Returns the clock to plan on then, None if it cannot be read.
        """

    def read(self) -> Reading:
        """Clock, watts and the energy counter as they are now."""

    def worked(self, work: Work) -> None:
        """What the engine did: a simulated GPU draws power by it, a real one needs not be told."""

    def idled(self, seconds: float) -> None:
        """Nothing ran for so long."""
