"""Which clock? (the paper's throttling controller, part 5 of its system, and our least energy in its place)

`feasible` says at which clocks every promise holds over the whole horizon; a policy picks one of them. The paper takes
the lowest by binary search; here all clocks are looked at side by side, so a policy may also take the cheapest.
Knows nothing of switching: dwell and latency are the governor's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from throttllem.core.forecast.horizon import Horizon
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.scoreboard import Scoreboard
from throttllem.core.sequence_state import SequenceState
from throttllem.core.types import EngineSpec, FrequencyPlan, Reason, check

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class ClockPolicy(StrEnum):
    """How a clock is chosen among the feasible ones."""

    TOP = "triton"
    THROTTLLEM = "throttllem"
    LEAST_ENERGY = "least-energy"
    FIXED = "fixed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrottleOptions:
    """How GPU clocks are chosen, where the paper leaves it open."""

    policy: ClockPolicy = ClockPolicy.THROTTLLEM
    fixed_mhz: int | None = None
    """The clock of policy FIXED."""
    switch_latency_s: float = 0.2
    """Time after a set during which the old clock stays in force (200 ms in the paper; 4.5 ms median on an A800, arXiv
    2502.20075)."""
    dwell_s: float = 0.5
    """Shortest time at a clock before a lower one is set."""
    min_saving: float = 0.005
    """Least predicted saving, as a fraction, for which a lower clock is set."""
    replan_s: float = 1.0
    """Longest time between two plans while requests run."""
    margin: float = 0.05
    """Fraction of every remaining time budget that is reserved for the performance model's error (0: the paper)."""
    reserve: float = 0.05
    """Fraction of a request's E2E SLO that a clock must leave before its deadline, E2E or TBT (of a TBT deadline at
    most a tenth), for the prompts of later requests (0: the paper)."""

    def __post_init__(self) -> None:
        check("throttle", switch_latency_s=(self.switch_latency_s, 0, 60), dwell_s=(self.dwell_s, 0, 3600))
        check("throttle", min_saving=(self.min_saving, 0, 1), replan_s=(self.replan_s, 0.01, 3600))
        check("throttle", margin=(self.margin, 0, 0.9), reserve=(self.reserve, 0, 0.9))


def unmeetable(ahead: Horizon, board: Scoreboard, table: PerformanceTable, delay_s: float) -> list[SequenceState]:
    """Rows that miss a deadline even at the top clock, `delay_s` from now: the paper calls them lost."""
    spent = ahead.seconds(table, slice(-1, None))[:, 0] + delay_s + ahead.base_s
    running = ahead.finish_run.size - len(ahead.pending)
    late = np.flatnonzero(spent[ahead.finish_run] > ahead.due_s)
    rows = [board.row_at(int(i)) if i < running else ahead.pending[int(i) - running] for i in late]
    late_first = np.flatnonzero(spent[ahead.first_run] > ahead.first_due_s)
    return rows + [ahead.pending[int(i)] for i in late_first]


def feasible(
    ahead: Horizon,
    board: Scoreboard,
    table: PerformanceTable,
    *,
    delay_s: Floats,
    margin: float,
    reserve: float,
    stretch: Floats | float = 1.0,
) -> tuple[Bools, int | None]:
    """Clocks at which every promise holds, shape (clocks,), and the run that rules out the next lower one.

    `delay_s` (clocks,) is the time that reaching each clock costs, `stretch` (clocks,) what requests yet to come will
    add to every iteration. Time between tokens is checked on every iteration
    without prompts (the paper's step-by-step check) and, as a deadline, on each row's mean.
    """
    keep = 1.0 - margin
    tbt_s = board.tightest_tbt_s() * keep
    steps = table.seconds[ahead.cells] * np.asarray(stretch, dtype=np.float32)
    late = (np.cumsum(steps * ahead.length[:, None], axis=0, dtype=np.float64) + delay_s) > (
        ahead.slack_s(reserve) * keep
    )[:, None]
    if np.isfinite(tbt_s):
        late |= (steps > tbt_s) & ~ahead.prefills[:, None]
    holds: Bools = np.logical_not(late.any(axis=0))
    lowest = int(holds.argmax()) if holds.any() else holds.size
    binding = int(late[:, lowest - 1].argmax()) if lowest > 0 else None
    return holds, binding


def lowest_feasible(holds: Bools, spec: EngineSpec, binding: SequenceState | None) -> FrequencyPlan:
    """The paper's choice: the lowest clock that keeps every SLO, the top clock if none does."""
    if not holds.any():
        return FrequencyPlan(mhz=spec.clocks_mhz[-1], why=Reason.INFEASIBLE, binding=_id(binding))
    index = int(holds.argmax())
    why = Reason.LOWEST_FEASIBLE if index else Reason.LOWEST_CLOCK
    return FrequencyPlan(mhz=spec.clocks_mhz[index], why=why, binding=_id(binding) if index else None)


def least_energy(holds: Bools, cost: Floats, spec: EngineSpec, binding: SequenceState | None) -> FrequencyPlan:
    """Ours: among the feasible clocks the one of least `cost` (clocks,), the higher of equals."""
    if not holds.any():
        return FrequencyPlan(mhz=spec.clocks_mhz[-1], why=Reason.INFEASIBLE, binding=_id(binding))
    priced = np.where(holds, cost, np.inf)
    index = int(holds.size - 1 - priced[::-1].argmin())
    stopped = index == int(holds.argmax()) and index > 0
    return FrequencyPlan(
        mhz=spec.clocks_mhz[index],
        why=Reason.LOWEST_FEASIBLE if stopped else Reason.LEAST_ENERGY,
        binding=_id(binding) if stopped else None,
    )


def _id(row: SequenceState | None) -> int | None:
    return row.request.id if row else None
