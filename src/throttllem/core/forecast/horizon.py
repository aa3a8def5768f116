"""When will every request finish, at every clock? The projection, put through the performance table.

The horizon is cut into runs of iterations that look the same to the table; one look-up per run gives its seconds at
every clock, and a cumulative sum every finish at every clock. A hundred sequences make a few hundred runs: some ten
microseconds, compiled. Knows nothing of which clock should be chosen.
"""

# Why runs are exact. The table is a step function of batch, KV blocks and prompt tokens, so consecutive iterations in
# the same cell take equally long, and only these places matter:
#   - where the cell changes, since the seconds of an iteration change there;
#   - where a request ends, or gives its first token, since a deadline is compared with the time spent until then.
# A run ends at each of them. Seconds until the end of run j at clock c: the sum over i <= j of length_i x t(cell_i, c).
# Every SLO then is a bound on that sum at one run (`slack_s`), for all clocks side by side.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from throttllem.core.compiled import compiled
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

    def seconds(self, table: PerformanceTable) -> Floats:
        """When each run ends at the table's maximum clock, seconds after `base_s`, shape (S,)."""
        spent: Floats = np.cumsum(table.maximum_s[self.cells] * self.length, dtype=np.float64)
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
        return _slack(
            self.cells.size,
            self.finish_run,
            self.deadline_s,
            self.e2e_s,
            self.reserve_s,
            self.first_token_run,
            self.first_token_deadline_s,
            self.base_s,
            reserve,
        )

    def binding(self, board: Scoreboard, run: int) -> SequenceState | None:
        """The request whose deadline is the tightest at the end of `run`, on the scoreboard that was projected."""
        index = _tightest(run, self.finish_run, self.deadline_s, self.first_token_run, self.first_token_deadline_s)
        if index < 0:
            return None
        running = self.finish_run.size - len(self.pending)
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
    cells, length, prefills, finish_run, first_token_run, peaks = _cut(
        projection.batch,
        projection.kv_blocks,
        projection.prefill_tokens,
        projection.ends,
        projection.starts,
        *table.offsets,
    )
    deadline_s, e2e_s, reserve_s, first_token_deadline_s = board.deadline_s, board.e2e_s, board.reserve_s, np.zeros(0)
    if pending:
        limits = np.array([sequence.limits() for sequence in pending])
        deadline_s = np.concatenate([deadline_s, limits[:, 0]])
        e2e_s = np.concatenate([e2e_s, limits[:, 4]])
        reserve_s = np.concatenate([reserve_s, limits[:, 3]])
        first_token_deadline_s = limits[:, 1].copy()
    return Horizon(
        base_s=base_s,
        cells=cells,
        length=length,
        prefills=prefills,
        finish_run=finish_run,
        deadline_s=deadline_s,
        e2e_s=e2e_s,
        reserve_s=reserve_s,
        first_token_run=first_token_run,
        first_token_deadline_s=first_token_deadline_s,
        pending=tuple(pending),
        kv_peak=peaks[1],
        inside_hull=table.inside(*peaks),
    )


@compiled
def _cut(
    batch: Ints,
    kv_blocks: Ints,
    prefill_tokens: Ints,
    ends: Ints,
    starts: Ints,
    batch_offset: Ints,
    kv_offset: Ints,
    prefill_offset: Ints,
) -> tuple[Ints, Ints, npt.NDArray[np.bool_], Ints, Ints, tuple[int, int, int]]:
    """Cells, lengths and whether there are prompts of the runs of a projection; the run that each request ends with,
    and that of each first token; the peaks of batch, KV blocks and prefill tokens.
    """
    size = batch.size
    cut = np.zeros(size + 1, dtype=np.bool_)
    cut[ends] = True
    cut[starts + 1] = True
    cells, length = np.empty(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    prefills = np.zeros(size, dtype=np.bool_)
    run_until = np.empty(size + 1, dtype=np.int64)  # the run that ends where an offset begins
    run, cell, batch_peak, kv_peak, prefill_peak = -1, -1, 0, 0, 0
    for offset in range(size):
        batch_peak, kv_peak = max(batch_peak, batch[offset]), max(kv_peak, kv_blocks[offset])
        prefill_peak = max(prefill_peak, prefill_tokens[offset])
        here = (
            prefill_offset[min(max(prefill_tokens[offset], 0), prefill_offset.size - 1)]
            + batch_offset[min(max(batch[offset], 0), batch_offset.size - 1)]
            + kv_offset[min(max(kv_blocks[offset], 0), kv_offset.size - 1)]
        )
        run_until[offset] = run
        if here != cell or cut[offset]:
            run, cell = run + 1, here
            cells[run], prefills[run] = cell, prefill_tokens[offset] > 0
        length[run] += 1
    run_until[size] = run
    runs = run + 1
    peaks = (batch_peak, kv_peak, prefill_peak)
    return cells[:runs], length[:runs], prefills[:runs], run_until[ends], run_until[starts + 1], peaks


@compiled
def _slack(
    runs: int,
    finish_run: Ints,
    deadline_s: Floats,
    e2e_s: Floats,
    reserve_s: Floats,
    first_token_run: Ints,
    first_token_deadline_s: Floats,
    base_s: float,
    reserve: float,
) -> Floats:
    """The tightest deadline at each run's end, as `Horizon.slack_s` has it."""
    slack = np.full(runs, np.inf)
    for i in range(finish_run.size):
        run = finish_run[i]
        slack[run] = min(slack[run], deadline_s[i] - min(reserve * e2e_s[i], reserve_s[i]))
    for i in range(first_token_run.size):
        run = first_token_run[i]
        slack[run] = min(slack[run], first_token_deadline_s[i])
    return slack - base_s


@compiled
def _tightest(
    run: int, finish_run: Ints, deadline_s: Floats, first_token_run: Ints, first_token_deadline_s: Floats
) -> int:
    """The request of the tightest deadline at the end of a run, -1 where nothing binds. Ends come before first tokens
    where deadlines are equal.
    """
    index, tightest_s = -1, np.inf
    for i in range(finish_run.size):
        if finish_run[i] == run and deadline_s[i] < tightest_s:
            index, tightest_s = i, deadline_s[i]
    for i in range(first_token_run.size):
        if first_token_run[i] == run and first_token_deadline_s[i] < tightest_s:
            index, tightest_s = finish_run.size - first_token_run.size + i, first_token_deadline_s[i]
    return index
