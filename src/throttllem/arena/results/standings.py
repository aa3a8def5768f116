"""What an arena found: savings with their intervals, by group and by cell, and whether the targets are met.

Knows nothing of how it is shown.
"""

# Intervals. The grid is fixed, so what scatters is the seeds: requests, noise and predictions. The variance between the
# seeds of a cell is pooled over the cells, and the half width of a mean of means follows from it at 95 %.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from throttllem.arena.cells import Cell
from throttllem.arena.contenders import BASELINE, BEFOREHAND, GATHERING, OURS, SCHED, SCHED_HOLD, STATIC
from throttllem.arena.contest import Entry, rows_of
from throttllem.report.metrics import ATTAINMENT_SLACK

CLAIRVOYANT = (SCHED, SCHED_HOLD)
_NORMAL_95 = 1.96


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """A mean over cells and seeds, and half of its 95 % interval (None: one seed)."""

    value: float
    half_width: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What was to be shown, what was found, and whether that meets it (None: a contender that it needs did not run)."""

    asked: str
    found: str
    met: bool | None


def by_cell(entries: Sequence[Entry]) -> dict[Cell, tuple[Entry, ...]]:
    """The seeds of each cell, in order."""
    cells = dict.fromkeys(entry.cell for entry in entries)
    return {cell: tuple(entry for entry in entries if entry.cell == cell) for cell in cells}


def saving(entries: Sequence[Entry], name: str) -> Mean:
    """Fraction of the baseline's energy that a contender saves, mean over the cells."""
    return _mean(entries, lambda entry: entry.rows[name].saved(entry.baseline))


def shortfall(entries: Sequence[Entry], name: str) -> Mean:
    """How far attainment lies below the baseline's, as a fraction; negative where it lies above."""
    return _mean(entries, lambda entry: entry.baseline.attainment - entry.rows[name].attainment)


def _mean(entries: Sequence[Entry], of: Callable[[Entry], float]) -> Mean:
    cells = [[of(entry) for entry in seeds] for seeds in by_cell(entries).values()]
    freedom = sum(len(values) - 1 for values in cells)
    value = fmean(fmean(values) for values in cells)
    if not freedom:
        return Mean(value=value, half_width=None)
    pooled = sum(variance(values) * (len(values) - 1) for values in cells if len(values) > 1) / freedom
    error = math.sqrt(pooled * sum(1 / len(values) for values in cells)) / len(cells)
    return Mean(value=value, half_width=_student_95(freedom) * error)


def _student_95(freedom: int) -> float:
    """Student's t for a two-sided 95 % interval, by its expansion about the normal quantile: 1 % off at most from 3
    degrees of freedom on, exact for 1 and 2.
    """
    if freedom <= 2:
        return (12.706, 4.303)[freedom - 1]
    z, n = _NORMAL_95, freedom
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    return z + (z**3 + z) / (4 * n) + second + third


def meets(seeds: Sequence[Entry], name: str) -> bool:
    """Whether attainment in a cell is at most half a point below the baseline's, on the mean of its seeds."""
    return shortfall(seeds, name).value <= ATTAINMENT_SLACK + 1e-12


def least(seeds: Sequence[Entry], names: Sequence[str]) -> str:
    """Of these contenders, the one of least energy in a cell among those that meet its SLOs; the baseline if none."""
    meeting = [name for name in names if meets(seeds, name)]
    return max(meeting, key=lambda name: saving(seeds, name).value, default=BASELINE)


def share_of_reference(entries: Sequence[Entry], name: str, reference: str) -> float | None:
    """The mean saving of a contender, of that of a clairvoyant one; None where that one did not run."""
    if reference not in rows_of(entries) or name not in rows_of(entries):
        return None
    best = saving(entries, reference).value
    return saving(entries, name).value / best if best > 0 else None


def online(names: Sequence[str]) -> tuple[str, ...]:
    """Those that could be deployed: nothing of them is chosen in hindsight or knows what comes."""
    hindsight = {STATIC, *CLAIRVOYANT, *(name.removesuffix(BEFOREHAND) for name in names if name.endswith(BEFOREHAND))}
    return tuple(name for name in names if name not in hindsight)


def targets(entries: Sequence[Entry]) -> list[Target]:
    """What the arena was made to show, judged."""
    names, cells = rows_of(entries), by_cell(entries)
    if OURS not in names:
        return []
    found = [_share_target(entries, OURS, SCHED, 0.93), _static_target(cells, names), _attainment_target(cells)]
    rivals = [name for name in names if name not in (*CLAIRVOYANT, GATHERING)]
    found.append(_least_target(cells, rivals, "all, those set in hindsight among them"))
    found.append(_least_target(cells, [*online(rivals)], "all that could be deployed"))
    found.append(_share_target(entries, GATHERING, SCHED_HOLD, 0.85))
    return found


def _share_target(entries: Sequence[Entry], name: str, reference: str, least_share: float) -> Target:
    share = share_of_reference(entries, name, reference)
    asked = f"`{name}` has at least {least_share * 100:.0f} % of the saving of `{reference}`, on the mean"
    if share is None:
        return Target(asked=asked, found="not run", met=None)
    return Target(asked=asked, found=f"{share * 100:.1f} %", met=share >= least_share)


def _static_target(cells: dict[Cell, tuple[Entry, ...]], names: Sequence[str]) -> Target:
    asked = "never more than 1 point worse than the best static clock in hindsight, in any cell"
    if STATIC not in names:
        return Target(asked=asked, found="not run", met=None)
    behind = {cell.name: saving(seeds, STATIC).value - saving(seeds, OURS).value for cell, seeds in cells.items()}
    worse = [name for name, points in behind.items() if points > 0.01]
    name = max(behind, key=lambda each: behind[each])
    found = f"{len(worse)} of {len(cells)} cells worse by more; the worst by {behind[name] * 100:+.1f} points ({name})"
    return Target(asked=asked, found=found, met=not worse)


def _attainment_target(cells: dict[Cell, tuple[Entry, ...]]) -> Target:
    short = {cell.name: shortfall(seeds, OURS).value for cell, seeds in cells.items()}
    missed = sum(not meets(seeds, OURS) for seeds in cells.values())
    name = max(short, key=lambda each: short[each])
    return Target(
        asked="attainment never more than 0.5 point below the baseline's",
        found=f"{missed} of {len(cells)} cells below; the lowest by {short[name] * 100:.1f} points ({name})",
        met=not missed,
    )


def _least_target(cells: dict[Cell, tuple[Entry, ...]], names: Sequence[str], among: str) -> Target:
    won = sum(least(seeds, names) == OURS for seeds in cells.values())
    return Target(
        asked=f"least energy of {among}, in at least 90 % of the cells",
        found=f"{won} of {len(cells)} cells",
        met=won >= 0.9 * len(cells),
    )
