"""What came of many schedules, by kind of fault, as tables. Knows nothing of how they were played."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tools.soak.check import WITHIN_S
from tools.soak.evidence import Outcome
from tools.soak.faults import KINDS
from tools.soak.schedule import Schedule
from tools.testbed.report import Section, Table

STARVED_S = 0.5

HEAD = ("kind of fault", "schedules", "failed", "had effect", "restorings", "p50 ms", "p99 ms", "slowest ms")
TEXT = f"""
Every schedule is a few seconds of a keeper of clocks, a gateway and an engine as real processes on fake GPUs (the real
NVML calls, a C library behind them), with up to four faults at random times, some lasting, some overlapping; all of it
from one seed. After each one the GPUs must be restored (to the baseline of `--normally`, else unlocked) within
{WITHIN_S:g} s of the loss of the lease, or of the keeper's next start, or of the end of what stood in the way; no write
may have gone to a GPU that is not opted in, or out of the allowed range; the keeper must answer, with nothing held, and
a fresh client must get a lease; and every request to the gateway must have ended, with its whole answer where no fault
touched gateway or engine.

Restorings are counted from the moment when they were due: of a lease that runs out, from its last possible end.
"""


@dataclass(slots=True)
class Tally:
    """Outcomes, added up."""

    outcomes: list[Outcome] = field(default_factory=list)
    repeated: list[int] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """One more; its logs stay only if it failed."""
        self.outcomes.append(outcome if outcome.violations else replace(outcome, logs=""))

    def starved(self) -> list[Schedule]:
        """Those that failed while the machine was not ours, taken out: they are to be played again, once."""
        again = [one for one in self.failed if one.starved_s > STARVED_S]
        self.outcomes = [one for one in self.outcomes if one not in again]
        self.repeated += [one.schedule.seed for one in again]
        return [one.schedule for one in again]

    @property
    def failed(self) -> list[Outcome]:
        """Those that something was violated in, by seed."""
        return sorted((one for one in self.outcomes if one.violations), key=lambda one: one.schedule.seed)

    def table(self) -> Table:
        """One row a kind, and one of all."""
        rows = [_row("all", self.outcomes, effect=False)]
        for name in KINDS:
            if some := [one for one in self.outcomes if name in one.schedule.kinds]:
                rows.append(_row(name, some, effect=True))
        caption = "By kind of fault; a schedule counts for each of its kinds."
        return Table(caption=caption, head=HEAD, rows=rows)

    def lines(self) -> list[str]:
        """What is no table: requests, the slowest, repetitions."""
        slowest = max(self.outcomes, key=lambda one: max(one.restorings_s, default=0.0))
        asked = sum(one.complete + one.errors + one.cut for one in self.outcomes)
        sums = {how: sum(getattr(one, how) for one in self.outcomes) for how in ("complete", "errors", "cut")}
        slowest_ms = max(slowest.restorings_s, default=0.0) * 1e3
        return [
            f"Requests: {asked} asked, {sums['complete']} complete, {sums['errors']} ended with an error, "
            f"{sums['cut']} cut off by the end of their gateway.",
            f"The slowest restoring took {slowest_ms:.0f} ms, in the schedule of seed {slowest.schedule.seed}.",
            f"Repeated, since the machine was starved: {len(self.repeated)}{self._seeds()}.",
        ]

    def _seeds(self) -> str:
        return f" (seeds {', '.join(map(str, self.repeated))})" if self.repeated else ""

    def section(self, *, seed: int, wall_s: float, workers: int) -> Section:
        """For the document."""
        when = f"in {wall_s / 60:.1f} minutes on {time.strftime('%Y-%m-%d')}"
        what = f"{len(self.outcomes)} schedules from seed {seed} on, {workers} side by side"
        ran = f"{what}, {when}: {len(self.failed)} failed."
        text = "\n\n".join([TEXT.strip(), ran, *self.lines()])
        return Section(title="Soak of the keeper of clocks", text=text, tables=(self.table(),), results={})


def _row(name: str, some: Sequence[Outcome], *, effect: bool) -> tuple[str, ...]:
    restorings_ms = np.array([seconds * 1e3 for one in some for seconds in one.restorings_s])
    failed = sum(bool(one.violations) for one in some)
    had = sum(name not in one.idle for one in some)
    if not restorings_ms.size:
        figures = ["0", "-", "-", "-"]
    else:
        p50, p99 = np.percentile(restorings_ms, (50, 99))
        figures = [str(restorings_ms.size), f"{p50:.0f}", f"{p99:.0f}", f"{restorings_ms.max():.0f}"]
    return name, str(len(some)), str(failed), str(had) if effect else "", *figures
