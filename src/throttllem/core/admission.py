"""Which waiting requests may join an engine that serves, first come first served (the paper's admission control).
A request never overtakes another, except where those that cannot meet their SLO are rejected.

The request joins the scoreboard virtually; then three checks at the maximum clock, in the paper's order: the KV cache
never overflows, the time between tokens holds, and every request meets its deadlines, not only the newcomer. Most
requests pass a bound that needs no projection. Knows nothing of how clocks are chosen or engines started.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.compiled import compiled
from throttllem.core.engine_state import EngineState
from throttllem.core.forecast.horizon import Horizon, look_ahead
from throttllem.core.forecast.margins import Margins
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.forecast.projection import project
from throttllem.core.options import ControllerOptions
from throttllem.core.scoreboard import Scoreboard, SequenceState
from throttllem.core.types import EngineSpec, Reason, Request, Verdict, VerdictKind

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Steps = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

ADMIT = Verdict(kind=VerdictKind.ADMIT, why=Reason.FITS)
NO_ENGINE = Verdict(kind=VerdictKind.WAIT, why=Reason.NO_ENGINE)
GATHERED = Verdict(kind=VerdictKind.WAIT, why=Reason.GATHERING)
LOST = Verdict(kind=VerdictKind.LOST, why=Reason.OWN_DEADLINE)
_ROUNDING = 1 + 1e-6
"""The projection adds up and compares in other orders and in single precision than the bound."""
_MOST_WAIT_VERDICTS = 8
"""Verdicts to wait in one pass at most: each costs a projection."""
_MOST_EXAMINED = 64
"""Waiting requests that one pass looks at, however long the queue is."""
_SLACK = 64
_RANK = MappingProxyType({VerdictKind.ADMIT: 0, VerdictKind.LOST: 1, VerdictKind.WAIT: 2, VerdictKind.REJECT: 3})
"""Of several engines' verdicts the lowest counts."""
Candidates = Callable[[Request], Sequence[EngineState]]
"""The engines that a request may join, best first; none where none serves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """Requests that `left` the queue: rejected ones (REJECT), and those that are on an engine's scoreboard now. `asked`
    are the engines that were considered.
    """

    left: list[tuple[SequenceState, EngineState, Verdict]]
    asked: list[EngineState]


class AdmissionQueue:
    """The queue of one controller, its only writer. It decides, and keeps the engine's scoreboard.

    `waiting` holds the requests by id, in order of arrival; `head` is why the first of them waits (None: nothing
    does); `next_expiry_s` is when the next of them has waited too long (inf: none will). `held` are requests that can
    wait, in order of arrival: admission is not checked before their release, of all at `release_s` (inf: none is held).
    """

    def __init__(self, options: ControllerOptions, margins: Margins) -> None:
        self.waiting: OrderedDict[int, SequenceState] = OrderedDict()
        self.head: Verdict | None = None
        self.next_expiry_s = math.inf
        self.held: OrderedDict[int, SequenceState] = OrderedDict()
        self.release_s = math.inf
        self._options = options
        self._margins = margins
        self._margin = options.admission.margin_in_force
        self._rejects = options.slo_aware and options.admission.rejects
        self._expiries: list[tuple[float, int]] = []

    def hold(self, sequence: SequenceState) -> None:
        """A request that can wait is held."""
        self.held[sequence.request.id] = sequence
        self.release_s = min(self.release_s, sequence.hold_until_s)

    def release(self, now_s: float, *, remaining_tokens: float = math.inf) -> bool:
        """Held requests of at most `remaining_tokens` join the queue at its end; returns whether there were any."""
        released = [sequence for sequence in self.held.values() if sequence.remaining_tokens <= remaining_tokens]
        for sequence in released:
            del self.held[sequence.request.id]
            sequence.released_s = now_s
            self.push(sequence)
        self._find_release()
        return bool(released)

    def push(self, sequence: SequenceState) -> None:
        """A request joins at the end. Where requests are rejected it expires: when it can no longer meet its own SLO
        even alone, or when its patience ends.
        """
        self.waiting[sequence.request.id] = sequence
        if not self._rejects:
            return
        patient_until_s = self._patient_until_s(sequence)
        sequence.expires_s = min(expiry_s(sequence, self._options.tables.values()), patient_until_s)
        self._note_expiry(sequence)

    def push_back(self, sequence: SequenceState) -> None:
        """A request that was dispatched before joins ahead of those that arrived later. O(n)."""
        arrival_s = sequence.request.arrival_s
        later = [key for key, other in self.waiting.items() if other.request.arrival_s > arrival_s]
        self.push(sequence)
        for request_id in later:
            self.waiting.move_to_end(request_id)

    def restore(self, waiting: Iterable[SequenceState], head: Verdict | None, held: Iterable[SequenceState]) -> None:
        """Continue, in a new queue, from what another one held."""
        self.head = head
        for sequence in held:
            self.hold(sequence)
        for sequence in waiting:
            self.waiting[sequence.request.id] = sequence
            self._note_expiry(sequence)

    def take(self, request_id: int) -> SequenceState | None:
        """A request leaves, from anywhere in the queue; None if it is not in it. O(log n) amortised."""
        if (held := self.held.pop(request_id, None)) is not None:
            self._find_release()
            return held
        sequence = self.waiting.pop(request_id, None)
        if sequence is not None and self._expiries:
            self._forget_expiries()
        return sequence

    def expire(self, now_s: float) -> list[tuple[SequenceState, Reason]]:
        """Requests that have waited too long, with the reason; they leave. O(1) when there are none."""
        expired = []
        while self.next_expiry_s <= now_s:
            sequence = self.take(self._expiries[0][1])
            assert sequence is not None, "the first expiry is always of a request that waits"
            held_back = now_s >= self._patient_until_s(sequence)
            expired.append((sequence, Reason.HELD_BACK if held_back else Reason.OWN_DEADLINE))
        return expired

    def least_size(self) -> int:
        """The smallest engine size that the first request fits on, so that it cannot starve; 0: any will do."""
        if not self.waiting:
            return 0
        request = next(iter(self.waiting.values())).request
        fitting = [tp for tp, spec in self._options.startable.items() if never_fits(request, spec) is None]
        return min(fitting, default=0)

    def admit(self, now_s: float, sole: Sequence[EngineState], candidates: Candidates) -> Admitted:
        """Decide on the first request while it may join the `sole` engine that serves or, where that is empty, one of
        its `candidates`; where requests are rejected, on all in order. It joins the first engine that admits it, or
        else the first with the best verdict.
        """
        self.head = GATHERED if self.held else None
        left: list[tuple[SequenceState, EngineState, Verdict]] = []
        asked: dict[int, EngineState] = {}
        blocked: list[SequenceState] = []
        for sequence in islice(self.waiting.values(), _MOST_EXAMINED if self._rejects else None):
            if blocked and any(_is_no_lighter(sequence, other) for other in blocked):
                if not self._may_be_passed(sequence):
                    break
                continue
            engine, verdict, crowded = None, NO_ENGINE, len(self.waiting) - len(left) > 1
            for asks in sole or candidates(sequence.request):
                assert asks.spec is not None, "an engine that serves is ready"
                asked[asks.engine] = asks
                if sequence.request.prefixes:
                    sequence.request = sequence.request.on(asks.engine)
                sequence.earliest = asks.iteration + (asks.began_s is not None)
                found = self._verdict(asks, asks.spec, sequence, now_s, crowded=crowded)
                if engine is None or _RANK[found.kind] < _RANK[verdict.kind]:
                    engine, verdict = asks, found
                if found.kind is VerdictKind.ADMIT:
                    break
            if engine is not None and sequence.request.prefixes:
                sequence.request = sequence.request.on(engine.engine)
            if engine is not None and verdict.kind is not VerdictKind.WAIT:
                sequence.earliest = engine.iteration + (engine.began_s is not None)
                left.append((sequence, engine, self._join(engine, sequence, verdict)))
                continue
            if not blocked:
                self.head = verdict
            blocked.append(sequence)
            if engine is None or len(blocked) == _MOST_WAIT_VERDICTS or not self._may_be_passed(sequence):
                break
        for sequence, _, _ in left:
            del self.waiting[sequence.request.id]
        if self._expiries:
            self._forget_expiries()
        return Admitted(left=left, asked=list(asked.values()))

    def _may_be_passed(self, sequence: SequenceState) -> bool:
        """A request that expires soon anyway holds up no other; one that waits without end would starve."""
        return self._rejects and self._patient_until_s(sequence) < math.inf

    def _patient_until_s(self, sequence: SequenceState) -> float:
        """Until when it may be held back for others; the time in which it was held to gather does not count."""
        return self._options.admission.patient_until_s(sequence.request, sequence.queued_s)

    def _is_patient(self, engine: EngineState, sequence: SequenceState, now_s: float) -> bool:
        """Whether it may be held back for others now. With least energy that only costs: its clock is chosen by what
        requests would have met without (`hindsight`), and a request that waits is late itself. But requests that were
        held come all at once.
        """
        least = self._options.throttle.policy is ClockPolicy.LEAST_ENERGY
        if least and not self._rejects and not engine.gathers:
            return False
        return self._options.admission.is_patient(sequence.request, sequence.queued_s, now_s)

    def _find_release(self) -> None:
        self.release_s = min((sequence.hold_until_s for sequence in self.held.values()), default=math.inf)

    def _join(self, engine: EngineState, sequence: SequenceState, verdict: Verdict) -> Verdict:
        """A request goes to the engine unless it is rejected; what became of it."""
        lost = verdict.kind is VerdictKind.LOST
        if lost and self._rejects:
            return Verdict(kind=VerdictKind.REJECT, why=verdict.why)
        if verdict.kind is not VerdictKind.REJECT:
            sequence.lost, sequence.in_time = lost, not lost
            engine.board.dispatch(sequence)
        return verdict

    def _verdict(
        self, engine: EngineState, spec: EngineSpec, sequence: SequenceState, now_s: float, *, crowded: bool
    ) -> Verdict:
        why = never_fits(sequence.request, spec)
        if why is not None:  # on this engine; a larger one that can hold it serves too, or will be brought up
            startable = self._options.startable.values()
            larger = any(never_fits(sequence.request, other) is None for other in startable)
            return Verdict(kind=VerdictKind.WAIT if larger else VerdictKind.REJECT, why=why)
        if not self._options.slo_aware:
            return ADMIT
        if engine.table is None:
            busy = engine.board.running or engine.board.pending
            full = busy and batch_full(engine.board, spec, sequence)
            return Verdict(kind=VerdictKind.WAIT, why=Reason.BATCH) if full else ADMIT
        return admit(
            engine.board,
            spec,
            engine.table,
            sequence,
            first=engine.iteration,
            base_s=now_s if engine.began_s is None else engine.began_s,
            delay_s=engine.maximum_clock_delay_s(now_s, self._options.throttle.switch_latency_s),
            margin=self._margins.of_admission(engine.board.classes, self._margin),
            patient=self._is_patient(engine, sequence, now_s),
            crowded=crowded,
        )

    def _note_expiry(self, sequence: SequenceState) -> None:
        if sequence.expires_s < math.inf:
            heapq.heappush(self._expiries, (sequence.expires_s, sequence.request.id))
            self.next_expiry_s = self._expiries[0][0]

    def _forget_expiries(self) -> None:
        """Drop the expiries of requests that have left: those at the front, and all once they are many."""
        if len(self._expiries) > 2 * len(self.waiting) + _SLACK:
            self._expiries = [entry for entry in self._expiries if entry[1] in self.waiting]
            heapq.heapify(self._expiries)
        while self._expiries and self._expiries[0][1] not in self.waiting:
            heapq.heappop(self._expiries)
        self.next_expiry_s = self._expiries[0][0] if self._expiries else math.inf


# ---- one request -----------------------------------------------------------------------------------------------------


def refused_by_all(request: Request, specs: Iterable[EngineSpec]) -> Reason | None:
    """Why none of these engines could hold the request even alone; None if one could, or if there are none."""
    why = None
    for spec in specs:
        why = never_fits(request, spec)
        if why is None:
            return None
    return why


def _is_no_lighter(sequence: SequenceState, other: SequenceState) -> bool:
    """Whether a request is in the way as much as the other, at least; then it must wait where the other had to."""
    return (
        sequence.request.prompt_tokens >= other.request.prompt_tokens
        and sequence.output_tokens >= other.output_tokens
        and sequence.sequences >= other.sequences
        and sequence.limits().tbt_s <= other.limits().tbt_s
    )


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
        chunks, rest = divmod(request.computed_prompt_tokens, max(1, largest))
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
    shared = request.common_prompt_tokens // spec.block_tokens * (sequences - request.prompts)
    if -(-tokens // spec.block_tokens) * sequences - shared > spec.kv_blocks:
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
    slowest_s, late, first_late, in_time = _lateness(
        table.maximum_s,
        ahead.cells,
        ahead.length,
        ahead.prefills,
        ahead.finish_run,
        ahead.deadline_s,
        ahead.first_token_run,
        ahead.first_token_deadline_s,
        ahead.base_s,
        delay_s,
        1.0 - margin,
    )
    lightest_s, _ = table.at(table.clocks_mhz[-1], 1, 1, 0)
    unmeetable = lightest_s > tbt_s  # not even a sequence alone meets it: no request need wait for it
    slow = np.float32(slowest_s) > np.float32(tbt_s if alone else tbt_s * (1.0 - margin))
    if slow and (alone or (patient and not unmeetable)):
        return LOST if alone else Verdict(kind=VerdictKind.WAIT, why=Reason.TBT)
    if first_late >= 0 and patient:
        return Verdict(kind=VerdictKind.WAIT, why=Reason.TTFT, binding=ahead.pending[first_late].request.id)
    if late >= 0 and patient:
        ahead.deadline_s[-1] = ahead.first_token_deadline_s[-1] = np.inf  # the others' alone
        sequence = ahead.binding(board, late)
        return Verdict(kind=VerdictKind.WAIT, why=Reason.E2E, binding=sequence.request.id if sequence else None)
    return ADMIT if in_time and not newcomer.lost and lightest_s <= own_tbt_s else LOST


@compiled
def _lateness(
    maximum_s: Steps,
    cells: Ints,
    length: Ints,
    prefills: Bools,
    finish_run: Ints,
    deadline_s: Floats,
    first_token_run: Ints,
    first_token_deadline_s: Floats,
    base_s: float,
    delay_s: float,
    keep: float,
) -> tuple[float, int, int, bool]:
    """The longest iteration without prompts; the first run at whose end a request is late, and the first pending
    request whose first token is (-1: none), both among the others, which keep a part of their time in reserve; whether
    the newcomer, the last of all, is in time.
    """
    slowest_s, spent_s = 0.0, np.empty(cells.size)
    now_s = 0.0
    for run in range(cells.size):
        step_s = maximum_s[cells[run]]
        if not prefills[run]:
            slowest_s = max(slowest_s, step_s)
        now_s += step_s * length[run]
        spent_s[run] = now_s + delay_s
    own, own_first = finish_run.size - 1, first_token_run.size - 1
    late = first_late = -1
    for i in range(own):
        run = finish_run[i]
        if spent_s[run] > (deadline_s[i] - base_s) * keep and (late < 0 or run < late):
            late = run
    for i in range(own_first):
        run = first_token_run[i]
        if spent_s[run] > (first_token_deadline_s[i] - base_s) * keep:
            first_late = i if first_late < 0 else first_late
            late = run if late < 0 or run < late else late
    in_time = spent_s[finish_run[own]] <= deadline_s[own] - base_s
    in_time &= spent_s[first_token_run[own_first]] <= first_token_deadline_s[own_first] - base_s
    return slowest_s, late, first_late, in_time


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

    A request that passes here would pass the projection too; one that does not may still. O(sequences), compiled.
    Requests with several sequences are left to the projection.
    """
    if board.multi_sequence or newcomer.request.sequences > 1 or newcomer.lost:
        return False
    waiting = [
        (sequence.prefill_tokens, sequence.remaining_tokens, sequence.earliest, *sequence.limits()[:3])
        for sequence in (*board.pending.values(), newcomer)
    ]
    hull = table.hull
    return _surely_fits(
        board.columns,
        board.limits,
        len(board.running),
        np.array(waiting, dtype=np.float64),
        max(0, board.external.batch),
        max(0, board.external.kv_blocks),
        first,
        base_s,
        delay_s,
        1.0 - margin,
        (spec.block_tokens, spec.kv_blocks, spec.prefill_budget_tokens, int(spec.chunked)),
        (hull.max_batch, hull.max_kv_blocks, hull.max_prefill_tokens),
        table.slowest,
        *table.offsets,
    )


@compiled
def _surely_fits(
    running: Ints,
    limits: Floats,
    count: int,
    waiting: Floats,
    external_batch: int,
    external_blocks: int,
    first: int,
    base_s: float,
    delay_s: float,
    keep: float,
    engine: tuple[int, int, int, int],
    hull: tuple[int, int, int],
    slowest: Steps,
    batch_offset: Ints,
    kv_offset: Ints,
    prefill_offset: Ints,
) -> bool:
    """The bound over the scoreboard's columns, of which the first `count` are in use, and the requests that wait.

    `waiting` (requests, 6), the newcomer last: tokens of the prompt, tokens to come, earliest iteration, deadline,
    that of the first token, SLO on time between tokens. `engine`: block tokens, KV blocks, prefill budget, chunked.
    """
    block, capacity, prefill_budget, chunked = engine
    requests, own = waiting.shape[0], waiting.shape[0] - 1
    batch = count + requests + external_batch
    at_batch = batch_offset[min(batch, batch_offset.size - 1)]
    if waiting[own, 1] * slowest[at_batch] > (waiting[own, 3] - base_s) * keep:
        return False  # most that fail, fail here
    kv_blocks, prompts, longest, later, tbt_s = external_blocks, 0, 0, 0, np.inf
    for i in range(count):
        tokens = max(running[2, i] - first, 1) + running[1, i] + max(first - running[0, i], 0)
        kv_blocks += (tokens + block - 1) // block
        tbt_s = min(tbt_s, limits[1, i])
    for i in range(requests):
        prompt = int(waiting[i, 0])
        kv_blocks += (prompt + int(waiting[i, 1]) + block - 1) // block
        prompts, longest, later = prompts + prompt, max(longest, prompt), max(later, int(waiting[i, 2]) - first)
        tbt_s = min(tbt_s, waiting[i, 5])
    prefill = min(prompts, prefill_budget if chunked else max(longest, prefill_budget))
    budget = prefill_budget - batch
    if budget < 1 or kv_blocks > capacity or batch > hull[0] or kv_blocks > hull[1] or prefill > hull[2]:
        return False
    at_step = at_batch + kv_offset[min(kv_blocks, kv_offset.size - 1)]
    step_s = slowest[at_step] * _ROUNDING
    prompt_s = slowest[at_step + prefill_offset[min(prefill, prefill_offset.size - 1)]] * _ROUNDING
    if step_s > tbt_s * keep:
        return False
    # Until all have started, an iteration takes `budget` prompt tokens, or finishes a prompt, or none is there yet.
    started_s = delay_s + (later + requests - (-prompts // budget)) * prompt_s
    for i in range(count):
        if started_s + max(running[2, i] - first, 1) * step_s > (limits[0, i] - base_s) * keep:
            return False
    for i in range(requests):
        if started_s + waiting[i, 1] * step_s > (waiting[i, 3] - base_s) * keep:
            return False
        if started_s > (waiting[i, 4] - base_s) * keep:
            return False
    return True
