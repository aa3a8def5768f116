"""When will every request finish, at every clock? The projection, put through the performance table.

The horizon is cut into runs of iterations that look the same to the table; one look-up per run gives its seconds at
every clock, and a cumulative sum every finish at every clock. A hundred sequences make a few hundred runs: well under
a millisecond. Knows nothing of which clock should be chosen.
"""

# Why runs are exact. The table is a step function of batch, KV blocks and prompt tokens, so consecutive iterations in
# the same cell take equally long, and only these places matter:
#   - where the cell changes, since the seconds of an iteration change there;
#   - where a request ends, or gives its first token, since a deadline is compared with the time spent until then.
# A run ends at each of them. Seconds until the end of run j at clock c: the sum over i <= j of length_i x t(cell_i, c).
# Every SLO then is a bound on that sum at one run (`slack_s`), for all clocks side by side.

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.forecast.projection import Projection
from throttllem.core.scoreboard import Scoreboard, SequenceState
from throttllem.core.types import EngineSpec

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Horizon:
    """One engine's projection cut into S runs, for R requests (running in scoreboard order, then pending, then extra).

    `base_s` is when iteration 0 of the projection began or begins. `cells` (S,) indexes the table, `length` (S,) counts
    iterations, `prefills` (S,) is true where the run holds prompts. `finish_run` (R,) is the run that each request ends
    with, `deadline_s` (R,) its deadline (inf: none), `e2e_s` (R,) its E2E SLO (0: none) and `reserve_s` (R,) the most
    that a reserve may take of the deadline; `first_token_run` and `first_token_deadline_s` are those of the first
    tokens of the `pending` requests. `kv_peak` is the most KV blocks in use; `inside_hull`: all of it was profiled.
    """

    base_s: float
    cells: Ints
    length: Ints
    prefills: npt.NDArray[np.bool_]
    finish_run: Ints
    deadline_s: Floats
    e2e_s: Floats
    reserve_s: Floats
    first_token_run: Ints
    first_token_deadline_s: Floats
    pending: tuple[SequenceState, ...]
    kv_peak: int
    inside_hull: bool

    def seconds(self, table: PerformanceTable, clocks: slice) -> Floats:
        """When each run ends at each of the table's `clocks`, seconds after `base_s`, shape (S, clocks)."""
        spent: Floats = np.cumsum(table.seconds[self.cells, clocks] * self.length[:, None], axis=0, dtype=np.float64)
        return spent

    def joules(self, table: PerformanceTable, idle_w: float) -> Floats:
        """Energy of the horizon above `idle_w` (what the same seconds would cost anyway) at each clock, (clocks,)."""
        seconds = table.seconds[self.cells] * self.length[:, None]
        energy: Floats = (seconds * (table.watts[self.cells] - idle_w)).sum(axis=0, dtype=np.float64)
        return energy

    def slack_s(self, reserve: float = 0.0) -> Floats:
        """The tightest deadline that each run's end must meet, seconds after `base_s`, shape (S,).

        `reserve` is the fraction of a request's E2E SLO that is taken from its deadline, whichever SLO made it.
        """
        slack = np.full(self.cells.size, math.inf)
        reserved_s = np.minimum(reserve * self.e2e_s, self.reserve_s)
        np.minimum.at(slack, self.finish_run, self.deadline_s - reserved_s)
        np.minimum.at(slack, self.first_token_run, self.first_token_deadline_s)
        return slack - self.base_s

    def binding(self, board: Scoreboard, run: int) -> SequenceState | None:
        """The request whose deadline is the tightest at the end of `run`, on the scoreboard that was projected."""
        ends = np.flatnonzero(self.finish_run == run)
        first_tokens = np.flatnonzero(self.first_token_run == run)
        deadlines = np.concatenate([self.deadline_s[ends], self.first_token_deadline_s[first_tokens]])
        if not deadlines.size or not math.isfinite(float(deadlines.min())):
            return None
        running = self.finish_run.size - len(self.pending)
        index = int(np.concatenate([ends, first_tokens + running])[int(deadlines.argmin())])
        return board.at(index) if index < running else self.pending[index - running]


def look_ahead(
    board: Scoreboard,
    spec: EngineSpec,
    table: PerformanceTable,
    projection: Projection,
    *,
    base_s: float,
    extra: SequenceState | None = None,
) -> Horizon:
    """Cut a projection (made with the same `extra`) into runs. It must hold one sequence at least."""
    pending = [*board.pending.values(), *([extra] if extra else [])]
    limits = [sequence.limits() for sequence in pending]
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
    kv_peak = int(projection.kv_blocks.max(initial=0))
    batch_peak, prefill_peak = int(projection.batch.max(initial=0)), int(projection.prefill_tokens.max(initial=0))
    return Horizon(
        base_s=base_s,
        cells=cells[starts],
        length=edges[1:] - starts,
        prefills=projection.prefill_tokens[starts] > 0,
        finish_run=run_of[projection.ends] - 1,
        deadline_s=np.concatenate([board.deadline_s, [limit.deadline_s for limit in limits]]),
        e2e_s=np.concatenate([board.e2e_s, [limit.e2e_s for limit in limits]]),
        reserve_s=np.concatenate([board.reserve_s, [limit.reserve_s for limit in limits]]),
        first_token_run=run_of[projection.starts + 1] - 1,
        first_token_deadline_s=np.array([limit.first_token_deadline_s for limit in limits], dtype=np.float64),
        pending=tuple(pending),
        kv_peak=kv_peak,
        inside_hull=table.inside(batch_peak, kv_peak, prefill_peak),
    )
