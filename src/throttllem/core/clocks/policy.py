"""Which clock? (the paper's throttling controller, part 5 of its system, and our least energy in its place)

`feasible` finds the clocks at which every SLO holds over the whole horizon; a policy picks one of them. The paper takes
the lowest by binary search; here all clocks are compared side by side, so a policy may also take the cheapest. Knows
nothing of switching: dwell and latency belong to the clock controller.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from throttllem.core.clocks.own_policy import OwnPolicy
from throttllem.core.compiled import compiled
from throttllem.core.forecast.horizon import Horizon
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.scoreboard import Scoreboard, SequenceState
from throttllem.core.types import EngineSpec, FrequencyPlan, Reason, check

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Steps = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

_NAMES = ("triton", "throttllem", "least-energy", "fixed:<MHz>")
_AUTOSCALE = "+autoscale"


class ClockPolicy(StrEnum):
    """How a clock is chosen among the feasible ones."""

    TOP = "triton"
    THROTTLLEM = "throttllem"
    LEAST_ENERGY = "least-energy"
    FIXED = "fixed"


class PolicyError(ValueError):
    """No policy of that name; the message lists the known ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One policy: how clocks are chosen, whether SLOs are checked, whether engines are sized to the load.

    `own` makes a policy of the public interface, a new one for each run; it then chooses in place of `clock`.
    `gathers`: every request of a simulation may be held, whatever its SLO says.
    """

    name: str
    clock: ClockPolicy
    fixed_mhz: int | None
    autoscale: bool
    own: Callable[[], OwnPolicy] | None = None
    gathers: bool = False

    @property
    def slo_aware(self) -> bool:
        """Whether admission control runs. The baselines are first come first served."""
        return self.clock in (ClockPolicy.THROTTLLEM, ClockPolicy.LEAST_ENERGY)

    @property
    def needs_tables(self) -> bool:
        """Whether performance tables are asked for clocks or SLOs."""
        return self.slo_aware or self.own is not None


def parse_policy(name: str, clocks_mhz: tuple[int, ...], sizes: tuple[int, ...]) -> Policy:
    """The policy of that name on a GPU with these clocks and engines of these sizes. Raises PolicyError."""
    base = name.strip().removesuffix(_AUTOSCALE)
    autoscale = base != name.strip()
    if autoscale and len(sizes) < 2:
        raise PolicyError(f"policy {name!r}: +autoscale chooses among sizes; give two or more with --sizes 1,2,4")
    if base.startswith("fixed:"):
        mhz = base.removeprefix("fixed:")
        if not mhz.isdecimal() or int(mhz) not in clocks_mhz:
            low, high, step = clocks_mhz[0], clocks_mhz[-1], clocks_mhz[1] - clocks_mhz[0]
            raise PolicyError(
                f"policy {name!r}: {mhz!r} is no clock of this GPU: {low} to {high} MHz in steps of {step}"
            )
        return Policy(name=name, clock=ClockPolicy.FIXED, fixed_mhz=int(mhz), autoscale=autoscale)
    known = [policy for policy in ClockPolicy if policy is not ClockPolicy.FIXED]
    if base not in known:
        near = difflib.get_close_matches(base, _NAMES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise PolicyError(f"unknown policy {name!r}: {hint}known are {', '.join(_NAMES)}, each also with {_AUTOSCALE}")
    return Policy(name=name, clock=ClockPolicy(base), fixed_mhz=None, autoscale=autoscale)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrottleOptions:
    """How GPU clocks are chosen, where the paper leaves it open."""

    policy: ClockPolicy = ClockPolicy.THROTTLLEM
    fixed_mhz: int | None = None
    """The clock of policy FIXED."""
    switch_latency_s: float = 0.2
    """Time after a set during which the old clock stays in force (200 ms in the paper; 4.5 ms median on an A800, arXiv
    2502.20075): what plans begin with, until 20 switches to clocks of a band were measured; in a simulation also what a
    switch takes."""
    dwell_s: float = 0.5
    """Shortest time at a clock before a lower one is set."""
    min_saving: float = 0.005
    """Least predicted saving, as a fraction, for which `least-energy` sets a lower clock while it prices clocks by the
    requests at hand: the load is not known yet, or requests are gathered."""
    replan_s: float = 1.0
    """Longest time between two plans while requests run."""
    margin: float = 0.05
    """Fraction of every remaining time budget that is kept free for the model's error. With `least-energy` what it
    learns is added (`slo.attainment`); fixed for `throttllem` (0: the paper)."""
    reserve: float = 0.05
    """Fraction of a request's E2E SLO that a clock must leave before its deadline, E2E or TBT (of a TBT deadline at
    most a tenth), for the prompts of later requests. Added to or fixed, as `margin` (0: the paper)."""

    def __post_init__(self) -> None:
        check("throttle", switch_latency_s=(self.switch_latency_s, 0, 60), dwell_s=(self.dwell_s, 0, 3600))
        check("throttle", min_saving=(self.min_saving, 0, 1), replan_s=(self.replan_s, 0.01, 3600))
        check("throttle", margin=(self.margin, 0, 0.9), reserve=(self.reserve, 0, 0.9))


def feasible(
    ahead: Horizon,
    board: Scoreboard,
    table: PerformanceTable,
    *,
    delay_s: Floats,
    margin: float,
    reserve: float,
    stretch: Floats | float = 1.0,
    each_step: bool = True,
) -> tuple[Bools, int | None]:
    """Clocks at which every SLO holds, shape (clocks,), and the run that rules out the next lower one.

    `delay_s` (clocks,) is the time that reaching each clock costs, `stretch` (clocks,) the factor by which requests yet
    to come lengthen every iteration. Time between tokens is checked as a deadline, on each request's mean, and with
    `each_step` on every iteration without prompts (the paper's step-by-step check).
    """
    tbt_s = board.tightest_tbt_s() * (1.0 - margin) if each_step else math.inf
    first_late = _first_late(
        table.seconds,
        ahead.cells,
        ahead.length,
        ahead.prefills,
        ahead.slack_s(reserve) * (1.0 - margin),
        delay_s,
        np.full(delay_s.size, stretch, dtype=np.float32),
        np.float32(tbt_s),
    )
    holds: Bools = first_late == ahead.cells.size
    lowest = int(holds.argmax()) if holds.any() else holds.size
    return holds, int(first_late[lowest - 1]) if lowest > 0 else None


@compiled
def _first_late(
    seconds: Steps,
    cells: Ints,
    length: Ints,
    prefills: Bools,
    deadline_s: Floats,
    delay_s: Floats,
    stretch: Steps,
    tbt_s: np.float32,
) -> Ints:
    """The first run that is late at each clock, the number of runs where none is, shape (clocks,).

    A run is late if it ends after `deadline_s` (runs,), or if its iterations hold no prompts and take longer than
    `tbt_s`. No branch in the inner loop: several clocks are compared in one instruction.
    """
    runs, clocks = cells.size, delay_s.size
    spent_s, first_late = np.zeros(clocks), np.full(clocks, runs)
    for run in range(runs):
        row, iterations, until_s = seconds[cells[run]], length[run], deadline_s[run]
        longest_s = np.float32(np.inf) if prefills[run] else tbt_s
        for clock in range(clocks):
            step_s = row[clock] * stretch[clock]
            spent_s[clock] += step_s * iterations
            late = (spent_s[clock] + delay_s[clock] > until_s) | (step_s > longest_s)
            first_late[clock] = min(first_late[clock], run if late else runs)
    return first_late


def unmeetable(ahead: Horizon, board: Scoreboard, table: PerformanceTable, delay_s: float) -> list[SequenceState]:
    """Requests that miss a deadline even at the maximum clock, `delay_s` from now: the paper calls them lost."""
    spent_s = ahead.seconds(table) + delay_s + ahead.base_s
    running = ahead.finish_run.size - len(ahead.pending)
    late = np.flatnonzero(spent_s[ahead.finish_run] > ahead.deadline_s)
    found = [board.at(int(i)) if i < running else ahead.pending[int(i) - running] for i in late]
    late_first = np.flatnonzero(spent_s[ahead.first_token_run] > ahead.first_token_deadline_s)
    return found + [ahead.pending[int(i)] for i in late_first]


def lowest_feasible(holds: Bools, spec: EngineSpec, binding: SequenceState | None) -> FrequencyPlan:
    """The paper's choice: the lowest clock that meets every SLO, the maximum clock if none does."""
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


def at_least(holds: Bools, column: int, spec: EngineSpec, binding: SequenceState | None) -> FrequencyPlan:
    """The lowest feasible clock from `column` on; if there is none, the highest feasible one below."""
    if not holds.any():
        return FrequencyPlan(mhz=spec.clocks_mhz[-1], why=Reason.INFEASIBLE, binding=_id(binding))
    above, below = holds[column:], holds[:column]
    index = column + int(above.argmax()) if above.any() else column - 1 - int(below[::-1].argmax())
    stopped = index > column
    return FrequencyPlan(
        mhz=spec.clocks_mhz[index],
        why=Reason.LOWEST_FEASIBLE if stopped else Reason.LEAST_ENERGY,
        binding=_id(binding) if stopped else None,
    )


def _id(sequence: SequenceState | None) -> int | None:
    return sequence.request.id if sequence else None
