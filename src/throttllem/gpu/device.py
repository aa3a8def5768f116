"""The GPUs of one engine as the gateway sees them: one group with one clock, one power and one energy counter.

Knows nothing of how they are reached (`hardware`, `simulated`) and of the requests that run on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class ClockError(OSError):
    """A GPU does not support the clock, or does not follow it; the message says which clocks it supports, or why."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Switch:
    """One switch to another clock: `seconds` from the command until the clock was read back. Two are never equal."""

    mhz: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """All GPUs of an engine at one moment.

    `clock_mhz`: the clock in force (of the slowest GPU; None: unknown). `watts`: their power now. `energy_j`: their
    energy since the counter began. `dry_run_mhz`: the clock that was decided where none is set. `stands_for_mhz`: a
    lower clock that was decided, where the clock in force is the lowest that may be set. `limit_mhz`: the GPUs do not
    run faster than this now, for the reason in `held`. `trouble`: why clocks are not set though the mode is "on".
    `counter_trouble`: why `energy_j` is integrated power although there is a counter. `misplaced`: why the engine
    seems to run on other GPUs. `switch`: the last switch that was measured (None: none was).
    """

    clock_mhz: int | None
    watts: float
    energy_j: float
    dry_run_mhz: int | None = None
    stands_for_mhz: int | None = None
    limit_mhz: int | None = None
    held: str | None = None
    trouble: str | None = None
    counter_trouble: str | None = None
    misplaced: str | None = None
    switch: Switch | None = None

    @property
    def planned_on_mhz(self) -> int | None:
        """The clock that the core plans with: that of a dry run as if it were in force, else the decided clock that
        the one in force stands for, else the one in force; None: unknown.
        """
        if self.dry_run_mhz is not None:
            return self.dry_run_mhz
        return self.clock_mhz if self.stands_for_mhz is None else self.stands_for_mhz


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the engine computed in one iteration of `seconds`: `decode_sequences` over `kv_tokens` of cache, and prompt
    tokens with `prefill_pairs` query-key pairs. `joules`: its energy where the engine knows it (a simulated one does).
    """

    seconds: float
    decode_sequences: int
    kv_tokens: int
    prefill_tokens: int
    prefill_pairs: float
    joules: float | None = None


class Gpu(Protocol):
    """The GPUs of one engine. Errors of the hardware are OSError, with the remedy in the message."""

    async def set_clock(self, mhz: int | None, sent: Callable[[], None] | None = None) -> int | None:
        """Set the clock of all of them; None: restore what it was before. `sent` is called when the command is on its
        way. Returns the clock to plan with afterwards, None if it cannot be read.
        """

    def read(self) -> Reading:
        """Clock, power and energy as they are now."""

    def worked(self, work: Work) -> None:
        """An iteration ended. A simulated GPU computes its energy from it; a real one has a counter."""

    def idled(self, seconds: float) -> None:
        """The engine ran no request for that long."""
