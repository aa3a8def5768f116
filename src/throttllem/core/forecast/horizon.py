"""When will every row finish, at every clock? The projection, put through the performance table.

The table is a step function, so the horizon falls into runs of iterations that look the same to it: a run ends where
a bin edge is crossed or a row is gone. One look-up per run gives seconds at every clock; a cumulative sum over runs
gives every finish at every clock. A hundred rows make a few hundred runs: well under a millisecond.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.forecast.projection import Projection
from throttllem.core.scoreboard import Scoreboard
from throttllem.core.sequence_state import SequenceState
from throttllem.core.types import EngineSpec

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Horizon:
    """One engine's projection cut into runs; S runs, R rows (running in scoreboard order, then pending, then extra).

    `base_s` is when iteration 0 of the projection began or begins. `cells` (S,) indexes the table, `length` (S,) counts
    iterations, `prefills` (S,) says whether the run holds prompts. `finish_run` (R,) is the run that each row ends
    with, `due_s` (R,) its deadline (inf: none), `e2e_s` (R,) its E2E promise (0: none) and `spare_s` (R,) the most
    that a reserve may take of it; `first_run` and `first_due_s`
    (`pending` rows) are run and deadline of the first token.
    """

    base_s: float
    cells: Ints
    length: Ints
    prefills: npt.NDArray[np.bool_]
    finish_run: Ints
    due_s: Floats
    e2e_s: Floats
    spare_s: Floats
    first_run: Ints
    first_due_s: Floats
    pending: tuple[SequenceState, ...]
    kv_peak: int
    inside_hull: bool

    def seconds(self, table: PerformanceTable, column: slice) -> Floats:
        """When each run ends at each clock of `column`, seconds after `base_s`, shape (S, clocks)."""
        spent: Floats = np.cumsum(table.seconds[self.cells, column] * self.length[:, None], axis=0, dtype=np.float64)
        return spent

    def joules(self, table: PerformanceTable, spare_w: float) -> Floats:
        """Energy of the horizon above `spare_w` (what the same seconds would cost anyway) at each clock, (clocks,)."""
        seconds = table.seconds[self.cells] * self.length[:, None]
        energy: Floats = (seconds * (table.watts[self.cells] - spare_w)).sum(axis=0, dtype=np.float64)
        return energy

    def slack_s(self, reserve: float = 0.0) -> Floats:
        """The tightest promise that each run's end must keep, seconds after `base_s`, shape (S,).

        `reserve` is the fraction of a row's E2E promise that is kept back from its deadline, whichever promise made it.
        """
        slack = np.full(self.cells.size, math.inf)
        np.minimum.at(slack, self.finish_run, self.due_s - np.minimum(reserve * self.e2e_s, self.spare_s))
        np.minimum.at(slack, self.first_run, self.first_due_s)
        return slack - self.base_s

    def binding_row(self, board: Scoreboard, run: int) -> SequenceState | None:
        """The row whose promise is the tightest at the end of `run`, on the scoreboard that was projected."""
        ends = np.flatnonzero(self.finish_run == run)
        first = np.flatnonzero(self.first_run == run)
        due = np.concatenate([self.due_s[ends], self.first_due_s[first]])
        running = self.finish_run.size - len(self.pending)
        who = np.concatenate([ends, first + running])
        if not due.size or not math.isfinite(float(due.min())):
            return None
        index = int(who[int(due.argmin())])
        return board.row_at(index) if index < running else self.pending[index - running]


def look_ahead(
    board: Scoreboard,
    spec: EngineSpec,
    table: PerformanceTable,
    projection: Projection,
    *,
    base_s: float,
    extra: SequenceState | None = None,
) -> Horizon:
    """Cut a projection (made with the same `extra`) into runs. It must hold one row at least."""
    pending = [*board.pending.values(), *([extra] if extra else [])]
    cells = table.cells(projection.batch, projection.kv_blocks, projection.prefill_tokens)
    size = projection.horizon
    cut = np.zeros(size + 1, dtype=np.bool_)
    cut[0] = True
    np.not_equal(cells[1:], cells[:-1], out=cut[1:size])
    cut[projection.ends] = True
    cut[projection.starts + 1] = True
    edges = cut.nonzero()[0]
    starts = edges[:-1]
    run_of = np.cumsum(cut) - 1
    due_s = np.concatenate([board.deadline_s, [row.deadline_s() for row in pending]])
    first_due = np.array([row.first_due_s() for row in pending], dtype=np.float64)
    kv_peak = int(projection.kv_blocks.max(initial=0))
    return Horizon(
        base_s=base_s,
        cells=cells[starts],
        length=edges[1:] - starts,
        prefills=projection.prefill_tokens[starts] > 0,
        finish_run=run_of[projection.ends] - 1,
        due_s=due_s,
        e2e_s=np.concatenate([board.e2e_s, [row.request.slo.e2e_s or 0.0 for row in pending]]),
        spare_s=np.concatenate([board.spare_s, [row.spare_s() for row in pending]]),
        first_run=run_of[projection.starts + 1] - 1,
        first_due_s=first_due,
        pending=tuple(pending),
        kv_peak=kv_peak,
        inside_hull=table.inside(
            int(projection.batch.max(initial=0)), kv_peak, int(projection.prefill_tokens.max(initial=0))
        ),
    )
