"""May this request join without violating an SLO? (the paper's admission control, part 4 of its system)

The request joins the scoreboard virtually; then three checks at the maximum clock, in the paper's order: the KV cache
never overflows, the time between tokens holds, and every request meets its deadlines, not only the newcomer. Most
requests pass a bound that needs no projection. Knows nothing of queues or of the clock in force.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from throttllem.core.forecast.horizon import Horizon, look_ahead
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.forecast.projection import project
from throttllem.core.scoreboard import Scoreboard, SequenceState
from throttllem.core.types import EngineSpec, OptionError, Reason, Request, Verdict, VerdictKind, check

ADMIT = Verdict(kind=VerdictKind.ADMIT, why=Reason.FITS)
LOST = Verdict(kind=VerdictKind.LOST, why=Reason.OWN_DEADLINE)
_MAXIMUM_CLOCK = slice(-1, None)
_ROUNDING = 1 + 1e-6
"""The projection adds up and compares in other orders and in single precision than the bound."""


class Unmeetable(StrEnum):
    """What becomes of a request whose own SLO cannot be met: served as lost, or rejected."""

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
        """Whether this request may still be held back for others."""
        return self.rejects or now_s < self.patient_until_s(request)

    def patient_until_s(self, request: Request) -> float:
        """Until when this request may be held back for others; inf: without end."""
        slo = request.slo
        shortest_s = min(slo.e2e_s or math.inf, slo.ttft_s or math.inf)
        patience = self.reject_patience if self.rejects else self.patience
        return math.inf if shortest_s == math.inf else request.arrival_s + patience * shortest_s

    @property
    def margin_in_force(self) -> float:
        """The margin for what `unmeetable` is."""
        return self.reject_margin if self.rejects else self.margin

    @property
    def rejects(self) -> bool:
        """Whether a request is rejected rather than served late."""
        return self.unmeetable == Unmeetable.REJECT


def expiry_s(sequence: SequenceState, tables: Iterable[PerformanceTable]) -> float:
    """From when on a waiting request cannot meet its SLOs even alone at the maximum clock; inf: never.

    A lower bound on its time, on the fastest of `tables`: its prompts in chunks as large as any that were profiled,
    then the predicted tokens at the lightest iteration. -inf: it never could, not even at once.
    """
    request, latest_s = sequence.request, -math.inf
    slo, known = request.slo, False
    for table in tables:
        known = True
        largest, maximum = table.prefill_bin.size - 1, table.clocks_mhz[-1]
        step_s, _ = table.at(maximum, request.sequences, 1, 0)
        if slo.tbt_s is not None and step_s > slo.tbt_s:
            continue
        chunks, rest = divmod(request.prompt_tokens * request.sequences, max(1, largest))
        prefill_s = chunks * table.at(maximum, 1, 1, largest)[0]
        prefill_s += table.at(maximum, 1, 1, rest)[0] if rest else 0.0
        whole_s = prefill_s + (sequence.remaining_tokens - 1) * step_s
        spare_s = min((slo.ttft_s or math.inf) - prefill_s, (slo.e2e_s or math.inf) - whole_s)
        latest_s = max(latest_s, request.arrival_s + spare_s)
    return latest_s if known else math.inf


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


def batch_full(board: Scoreboard, spec: EngineSpec, newcomer: SequenceState) -> bool:
    """Whether the batch has no room for all sequences of this request."""
    taken = board.running_sequences + board.pending_sequences + max(0, board.external.batch)
    return taken + newcomer.request.sequences > spec.max_batch


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
    maximum clock costs before it is in force. A request that is no longer `patient` does not wait for the deadlines of
    others. An empty engine admits whatever `never_fits` let through, if only as lost. `crowded`: others wait already,
    so the quick bound will hardly hold, and is not tried.
    """
    alone = len(board) == 0
    if not alone:
        if batch_full(board, spec, newcomer):
            return Verdict(kind=VerdictKind.WAIT, why=Reason.BATCH)
        reserved = board.reserved_blocks + max(0, board.external.kv_blocks) + board.reservation(newcomer.request)
        if spec.no_evict and reserved > spec.kv_blocks:
            return Verdict(kind=VerdictKind.WAIT, why=Reason.KV)
    times = {"base_s": base_s, "delay_s": delay_s, "margin": margin}
    if not crowded and surely_fits(board, spec, table, newcomer, first=first, **times):
        return ADMIT
    projection = project(board, spec, first=first, extra=newcomer)
    ahead = look_ahead(board, spec, table, projection, base_s=base_s, extra=newcomer)
    if ahead.kv_peak > spec.kv_blocks and not alone:
        return Verdict(kind=VerdictKind.WAIT, why=Reason.KV)
    if not ahead.inside_hull:
        return ADMIT  # the speed out here is unknown: the controller runs at the maximum clock
    return _check_times(ahead, board, table, newcomer, delay_s, margin, alone=alone, patient=patient)


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
    """The checks on time: between tokens, then the deadlines of the others, then the newcomer's own."""
    own_tbt_s = newcomer.limits().tbt_s
    tbt_s = min(board.tightest_tbt_s(), own_tbt_s)
    step_s = table.seconds[ahead.cells, -1]
    slow = step_s[~ahead.prefills] > (tbt_s if alone else tbt_s * (1.0 - margin))
    lightest_s, _ = table.at(table.clocks_mhz[-1], 1, 1, 0)
    unmeetable = lightest_s > tbt_s  # not even a sequence alone meets it: no request need wait for it
    if bool(slow.any()) and (alone or (patient and not unmeetable)):
        return LOST if alone else Verdict(kind=VerdictKind.WAIT, why=Reason.TBT)
    spent_s = ahead.seconds(table, _MAXIMUM_CLOCK)[:, 0] + delay_s
    own_s, own_first_s = ahead.deadline_s[-1] - ahead.base_s, ahead.first_token_deadline_s[-1] - ahead.base_s
    ahead.deadline_s[-1] = ahead.first_token_deadline_s[-1] = np.inf
    late = np.flatnonzero(spent_s > ahead.slack_s() * (1.0 - margin))
    first_late = spent_s[ahead.first_token_run] > (ahead.first_token_deadline_s - ahead.base_s) * (1.0 - margin)
    if bool(first_late.any()) and patient:
        binding = ahead.pending[int(first_late.argmax())].request.id
        return Verdict(kind=VerdictKind.WAIT, why=Reason.TTFT, binding=binding)
    if late.size and patient:
        sequence = ahead.binding(board, int(late[0]))
        return Verdict(kind=VerdictKind.WAIT, why=Reason.E2E, binding=sequence.request.id if sequence else None)
    in_time = spent_s[ahead.finish_run[-1]] <= own_s and spent_s[ahead.first_token_run[-1]] <= own_first_s
    return ADMIT if in_time and not newcomer.lost and lightest_s <= own_tbt_s else LOST


def surely_fits(
    board: Scoreboard,
    spec: EngineSpec,
    table: PerformanceTable,
    newcomer: SequenceState,
    *,
    first: int,
    base_s: float,
    delay_s: float,
    margin: float,
) -> bool:
    """A bound that admits most requests without a projection: as if no sequence ever left, and every iteration were as
    slow as the fullest one.

    A request that passes here would pass the projection too; one that does not may still. O(sequences), in a few array
    operations. Requests with several sequences are left to the projection.
    """
    if board.multi_sequence or newcomer.request.sequences > 1 or newcomer.lost:
        return False
    batch, keep = len(board) + 1 + max(0, board.external.batch), 1.0 - margin
    own = newcomer.limits()
    if newcomer.remaining_tokens * table.slowest_s(batch, 0, 0) > (own.deadline_s - base_s) * keep:
        return False  # most that fail, fail here
    waiting = [*board.pending.values(), newcomer]
    left = np.maximum(board.end - first, 1)
    tokens = left + (board.tokens_at_start + (first - board.start))
    block = spec.block_tokens
    kv_blocks = int(((tokens + (block - 1)) // block).sum()) + max(0, board.external.kv_blocks)
    kv_blocks += sum(-(-(sequence.prefill_tokens + sequence.remaining_tokens) // block) for sequence in waiting)
    prompts = sum(sequence.prefill_tokens for sequence in waiting)
    longest = 0 if spec.chunked else max(sequence.prefill_tokens for sequence in waiting)
    prefill = min(prompts, max(longest, spec.prefill_budget_tokens))
    budget = spec.prefill_budget_tokens - batch
    if budget < 1 or kv_blocks > spec.kv_blocks or not table.inside(batch, kv_blocks, prefill):
        return False
    step_s = table.slowest_s(batch, kv_blocks, 0) * _ROUNDING
    prompt_s = table.slowest_s(batch, kv_blocks, prefill) * _ROUNDING
    if step_s > min(board.tightest_tbt_s(), own.tbt_s) * keep:
        return False
    # Until all have started, an iteration takes `budget` prompt tokens, or finishes a prompt, or none is there yet.
    later = max(0, *(sequence.earliest - first for sequence in waiting))
    started_s = delay_s + (later + len(waiting) - (-prompts // budget)) * prompt_s
    if bool((started_s + left * step_s > (board.deadline_s - base_s) * keep).any()):
        return False
    limits = [sequence.limits() for sequence in waiting]
    return all(
        started_s + sequence.remaining_tokens * step_s <= (limit.deadline_s - base_s) * keep
        and started_s <= (limit.first_token_deadline_s - base_s) * keep
        for sequence, limit in zip(waiting, limits, strict=True)
    )
