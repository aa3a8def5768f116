"""May this request join without breaking a promise? (the paper's admission control, part 4 of its system)

The request joins the scoreboard virtually; then, in the paper's order and at the top clock: KV never above capacity,
time between tokens, every row's deadline and not only the newcomer's. Knows nothing of queues or clocks in force.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from throttllem.core.admission_bound import surely_fits
from throttllem.core.forecast.horizon import Horizon, look_ahead
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.forecast.projection import project
from throttllem.core.scoreboard import Scoreboard
from throttllem.core.sequence_state import SequenceState
from throttllem.core.types import EngineSpec, OptionError, Reason, Request, Verdict, VerdictKind, check

ADMIT = Verdict(kind=VerdictKind.ADMIT, why=Reason.FITS)
LOST = Verdict(kind=VerdictKind.LOST, why=Reason.OWN_DEADLINE)
_TOP = slice(-1, None)


class Unmeetable(StrEnum):
    """What becomes of a request whose own promise cannot be kept: served as lost, or rejected."""

    SERVE = "serve"
    REJECT = "reject"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionOptions:
    """Which requests are admitted, where the paper leaves it open. A rejection costs little, while a violated SLO has
    cost its tokens, and time in the queue is taken from the engine (docs/decisions.md has the measurements).
    """

    margin: float = 0.05
    """Fraction of every remaining time budget that is reserved for the performance model's error (0: the paper)."""
    patience: float = 0.2
    """Fraction of its E2E SLO (of its TTFT SLO, if that is shorter) for which a request may wait for the SLOs of
    others; then it joins as soon as KV and batch allow, or a long queue would never drain (infinite: the paper)."""
    queue_limit: int = 10_000
    """Requests that may wait before more are rejected."""
    unmeetable: Unmeetable = Unmeetable.SERVE
    """What happens to a request that cannot meet its own SLO when it could be admitted, or while it waits: `serve` (the
    paper) or `reject`. A request that was admitted in time is always served. With `reject` no request joins at the cost
    of others: one that has waited for its whole patience is rejected too, and those behind it do not wait for it."""
    reject_margin: float = 0.2
    """`margin` with `unmeetable = "reject"`."""
    reject_patience: float = 0.1
    """`patience` with `unmeetable = "reject"`."""

    def __post_init__(self) -> None:
        check("admission", margin=(self.margin, 0, 0.9), patience=(self.patience, 0, math.inf))
        check("admission", reject_margin=(self.reject_margin, 0, 0.9))
        check("admission", reject_patience=(self.reject_patience, 0, math.inf))
        check("admission", queue_limit=(self.queue_limit, 1, math.inf))
        if self.unmeetable not in list(Unmeetable):
            known = " or ".join(repr(kind.value) for kind in Unmeetable)
            raise OptionError("admission", "unmeetable", repr(self.unmeetable), f"must be {known}")

    def is_patient(self, request: Request, now_s: float) -> bool:
        """May this request still be held back for others?"""
        return self.rejects or now_s < self.patient_until_s(request)

    def patient_until_s(self, request: Request) -> float:
        """How long this request may be held back for others; inf: for ever."""
        slo = request.slo
        shortest_s = min(slo.e2e_s or math.inf, slo.ttft_s or math.inf)
        patience = self.reject_patience if self.rejects else self.patience
        return math.inf if shortest_s == math.inf else request.arrival_s + patience * shortest_s

    @property
    def kept_back(self) -> float:
        """The margin in force."""
        return self.reject_margin if self.rejects else self.margin

    @property
    def rejects(self) -> bool:
        """Is a request rejected rather than served late?"""
        return self.unmeetable == Unmeetable.REJECT


def give_up_s(row: SequenceState, tables: Iterable[PerformanceTable]) -> float:
    """From when on a request that still waits cannot keep its promises even alone at the top clock; inf: never.

    A bound from below, of the fastest of `tables`: its prompts in chunks as large as any that were profiled, then the
    predicted tokens at the lightest iteration. -inf: it never could, not even at once.
    """
    request, times_s = row.request, []
    for table in tables:
        largest, top = table.prefill_bin.size - 1, table.clocks_mhz[-1]
        chunks, rest = divmod(request.prompt_tokens * request.sequences, max(1, largest))
        prefill_s = chunks * table.at(top, 1, 1, largest)[0] + (table.at(top, 1, 1, rest)[0] if rest else 0.0)
        step_s, _ = table.at(top, request.sequences, 1, 0)
        times_s.append(_give_up_s(row, prefill_s, step_s))
    return max(times_s, default=math.inf)


def _give_up_s(row: SequenceState, prefill_s: float, step_s: float) -> float:
    slo = row.request.slo
    if slo.tbt_s is not None and step_s > slo.tbt_s:
        return -math.inf
    whole_s = prefill_s + (row.remaining_tokens - 1) * step_s
    return row.request.arrival_s + min((slo.ttft_s or math.inf) - prefill_s, (slo.e2e_s or math.inf) - whole_s)


def never_fits(request: Request, spec: EngineSpec) -> Reason | None:
    """Why an engine could not hold this request even alone; None if it could."""
    tokens, sequences = request.prompt_tokens + request.max_tokens, request.sequences
    if tokens > spec.max_context_tokens:
        return Reason.NEVER_FITS_CONTEXT
    if sequences > spec.max_batch:
        return Reason.BATCH
    if -(-tokens // spec.block_tokens) * sequences > spec.kv_blocks:
        return Reason.NEVER_FITS_KV
    return None


def admit(
    board: Scoreboard,
    spec: EngineSpec,
    table: PerformanceTable,
    newcomer: SequenceState,
    *,
    first: int,
    base_s: float,
    delay_s: float,
    margin: float,
    patient: bool = True,
    crowded: bool = False,
) -> Verdict:
    """Check one request against an engine's coming iterations.

    `first` and `base_s`: the iteration in progress or next to begin, and when it began. `delay_s`: what reaching the
    top clock costs before it is in force. A request that is no longer `patient` does not wait for the deadlines of
    others. An empty engine admits whatever `never_fits` let through, if only as lost. `crowded`: others wait already,
    so the bound that decides quickly will hardly hold, and is not tried.
    """
    alone = len(board) == 0
    if not alone and (why := _no_room(board, spec, newcomer)):
        return Verdict(kind=VerdictKind.WAIT, why=why)
    times = {"base_s": base_s, "delay_s": delay_s, "margin": margin}
    if not crowded and surely_fits(board, spec, table, newcomer, first=first, **times):
        return ADMIT
    projection = project(board, spec, first=first, extra=newcomer)
    ahead = look_ahead(board, spec, table, projection, base_s=base_s, extra=newcomer)
    if ahead.kv_peak > spec.kv_blocks and not alone:
        return Verdict(kind=VerdictKind.WAIT, why=Reason.KV)
    if not ahead.inside_hull:
        return ADMIT  # nothing is known of the speed out here: the controller runs at the top clock
    return _check_times(ahead, board, table, newcomer, delay_s, margin, alone=alone, patient=patient)


def batch_full(board: Scoreboard, spec: EngineSpec, newcomer: SequenceState) -> bool:
    """Is there no place left for all sequences of this request?"""
    return board.sequences + max(0, board.others.batch) + newcomer.sequences > spec.max_batch


def _no_room(board: Scoreboard, spec: EngineSpec, newcomer: SequenceState) -> Reason | None:
    if batch_full(board, spec, newcomer):
        return Reason.BATCH
    reserved = board.reserved_blocks + max(0, board.others.kv_blocks)
    if spec.no_evict and reserved + board.reservation(newcomer.request) > spec.kv_blocks:
        return Reason.KV
    return None


def _check_times(
    ahead: Horizon,
    board: Scoreboard,
    table: PerformanceTable,
    newcomer: SequenceState,
    delay_s: float,
    margin: float,
    *,
    alone: bool,
    patient: bool,
) -> Verdict:
    tbt_s = min(board.tightest_tbt_s(), newcomer.tbt_s)
    step_s = table.seconds[ahead.cells, -1]
    slow = step_s[~ahead.prefills] > (tbt_s if alone else tbt_s * (1.0 - margin))
    lightest_s, _ = table.at(table.clocks_mhz[-1], 1, 1, 0)
    hopeless = lightest_s > tbt_s  # not even a row alone keeps it: nobody need wait for it
    if bool(slow.any()) and (alone or (patient and not hopeless)):
        return LOST if alone else Verdict(kind=VerdictKind.WAIT, why=Reason.TBT)
    spent = ahead.seconds(table, _TOP)[:, 0] + delay_s
    own_due_s, own_first_due_s = ahead.due_s[-1] - ahead.base_s, ahead.first_due_s[-1] - ahead.base_s
    ahead.due_s[-1] = ahead.first_due_s[-1] = np.inf
    late = np.flatnonzero(spent > ahead.slack_s() * (1.0 - margin))
    first_late = spent[ahead.first_run] > (ahead.first_due_s - ahead.base_s) * (1.0 - margin)
    if bool(first_late.any()) and patient:
        return Verdict(
            kind=VerdictKind.WAIT, why=Reason.TTFT, binding=ahead.pending[int(first_late.argmax())].request.id
        )
    if late.size and patient:
        row = ahead.binding_row(board, int(late[0]))
        return Verdict(kind=VerdictKind.WAIT, why=Reason.E2E, binding=row.request.id if row else None)
    in_time = spent[ahead.finish_run[-1]] <= own_due_s and spent[ahead.first_run[-1]] <= own_first_due_s
    return ADMIT if in_time and not newcomer.lost and lightest_s <= newcomer.tbt_s else LOST
