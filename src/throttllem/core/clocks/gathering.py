"""How long requests that can wait are held, so that the engine runs them together and is idle between.

Plans the hold from the performance table and the measured load. Knows nothing of the queue, nor of how a clock is set.
"""

# The theory. An iteration costs nearly the same for one sequence as for ten: its weights are read once. An engine at
# light load spends most of its energy on small batches, and the watts of a running GPU are far above those of an idle
# one even at its lowest clock. If requests that can wait are held for T seconds and released together, the same tokens
# take fewer iterations, and the engine is idle for the time that this leaves.
#
# S(x) is the fraction of outputs longer than x tokens, t the seconds between two tokens, and requests that can wait
# come at a rate r. A gathering of r T requests is released every T seconds; what is left of it after s seconds is
# r T S(s / t). So at phase s of a cycle
#
#     A(s) = m + r T (S(s / t) + S((s + T) / t) + S((s + 2 T) / t) + ...)
#
# sequences are alive on the mean, with m those of the requests that cannot wait. Their number is taken as Poisson: the
# engine runs 1 - e^-A of the time, with A / (1 - e^-A) sequences. The mean over a cycle of the watts of such batches,
# and of idle watts for the rest, is the mean power of this T at this clock. T = 0 is the limit in which all join at
# once: the engine in `steady_load`. (Against simulations at fixed clocks it is within 3 %.)
#
# How long T is, the requests decide: each is held until serving it at the planned clock takes all that its SLOs leave,
# and the first that must go takes the others along. With F the distribution of these slacks, the mean time to that is
#
#     T = integral over t of exp(-r x integral of F from 0 to t),    t up to the longest hold allowed
#
# A higher clock leaves more slack, so T is longer and batches are larger, but each iteration draws more: the clock of
# least mean power is the one to plan for. Nothing is held where that saves too little: where the engine is busy anyway
# (m), where too few requests come, or where an idle GPU draws what a running one does.

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from throttllem.core.engine_state import EngineState
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.scoreboard import SequenceState
from throttllem.core.types import EngineSpec

Floats = npt.NDArray[np.float64]

_LEAST_SAVING = 0.05
"""Nothing is held for a smaller predicted saving of mean power: of 2 % predicted, nothing came (docs/decisions.md)."""
_LEAST_HOLD_S = 3.0
"""A shorter mean hold saves nothing (simulated, fixed holds in 42 scenarios)."""
_SHORTER, _NEARLY = (1.0, 0.5, 0.25, 0.125), 0.9
"""Fractions of the longest allowed hold: the shortest is taken that has this fraction of the saving of the best."""
_PLAN_S = 20.0
"""Time after which a plan is made again, at the next request that can wait."""
_STALE_S = 60.0
"""Time after which a plan that was not made again is no longer in force."""
_RECENT = 256
"""Requests whose SLOs and lengths are kept."""
_ENOUGH = 16
"""Outputs that must have finished before their lengths are known."""
_MOST_CYCLES, _ROUNDS, _STEPS = 32, 6, 24
_MIDDLES = (np.arange(16) + 0.5) / 16
_PHASES, _WEIGHTS = _MIDDLES**3, _MIDDLES**2 / (_MIDDLES**2).sum()
"""Phases of a cycle, dense at its beginning, since a run may be over soon; and the part of the cycle of each."""
_LENGTHS = 64
"""Quantiles by which a distribution of lengths is kept."""
_LONG = 0.99
"""The planned clock serves this fraction of outputs in time."""
_SPREAD = 2.0
"""Standard deviations above the mean of the sequences alive at which it still does."""
_MOST_KV, _MOST_BATCH = 0.85, 0.9
"""A gathering leaves some KV blocks and some of the batch free."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Flow:
    """What comes in: requests/s that can wait and others, tokens of a mean prompt, output lengths (ascending, of all),
    predicted ones (of those that can wait; a prediction may be a bound, by which they are held), and the tightest SLOs
    of those that can wait (inf: none). `most_s`: the longest hold that is allowed.
    """

    waiting_per_s: float
    others_per_s: float
    prompt_tokens: float
    lengths: Floats
    predicted_tokens: Floats
    e2e_s: float
    ttft_s: float
    tbt_s: float
    most_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldPlan:
    """Requests are held `hold_s` after the first of them came. Released, they have their first tokens after `start_s`
    at the latest, then one every `token_s`, at the clock that was planned for. `watts` is the mean power with the hold
    and `watts_at_once` without.
    """

    hold_s: float
    start_s: float
    token_s: float
    watts: float
    watts_at_once: float


@dataclass(slots=True, kw_only=True)
class Gathering:
    """The load of one controller as far as gathering depends on it, and the plan in force (None: nothing is held).

    `sums`: sequences that can wait, other sequences, and prompt tokens of both, exponentially weighted over `window_s`
    since `first_s`, the first request that can wait. `slos`: E2E, TTFT and TBT SLO of recent requests that can wait.
    `predicted_tokens`: what is predicted of their outputs. `lengths`: outputs that finished. `closing`: the gateway
    shuts down, nothing is held any more.
    """

    window_s: float
    first_s: float | None = None
    last_s: float = 0.0
    sums: tuple[float, float, float] = (0.0, 0.0, 0.0)
    slos: deque[tuple[float, float, float]] = field(default_factory=deque)
    predicted_tokens: deque[int] = field(default_factory=deque)
    lengths: deque[int] = field(default_factory=deque)
    plan: HoldPlan | None = None
    planned_at_s: float = -math.inf
    closing: bool = False

    def __post_init__(self) -> None:
        self.slos, self.lengths = deque(self.slos, _RECENT), deque(self.lengths, _RECENT)
        self.predicted_tokens = deque(self.predicted_tokens, _RECENT)

    def arrived(self, sequence: SequenceState, now_s: float) -> None:
        """One request came in."""
        request = sequence.request
        if self.first_s is None:
            self.first_s = self.last_s = now_s
        slo, sequences = request.slo, request.sequences
        if slo.batch:
            self.predicted_tokens.append(sequence.remaining_tokens)
            self.slos.append((slo.e2e_s or math.inf, slo.ttft_s or math.inf, slo.tbt_s or math.inf))
        keep = math.exp(-(now_s - self.last_s) / self.window_s)
        waiting, others, prompts = (total * keep for total in self.sums)
        self.sums = (
            waiting + sequences * slo.batch,
            others + sequences * (not slo.batch),
            prompts + sequences * request.prompt_tokens,
        )
        self.last_s = now_s

    def finished(self, output_tokens: int) -> None:
        """One output ended."""
        if output_tokens > 0:
            self.lengths.append(output_tokens)

    def renew(self, engine: EngineState, now_s: float, *, most_s: float, margin: float) -> None:
        """Plan again for the engine that takes new requests, if the plan is old."""
        if now_s - self.planned_at_s < _PLAN_S:
            return
        self.planned_at_s = now_s
        flow = self._flow(now_s, most_s)
        self.plan = None
        if flow is not None and engine.table is not None and engine.spec is not None:
            self.plan = plan_hold(flow, engine.table, engine.spec, margin=margin)

    def in_force(self, now_s: float) -> HoldPlan | None:
        """The plan by which requests are held now; None: none is."""
        return None if self.closing or now_s - self.planned_at_s >= _STALE_S else self.plan

    def hold_until_s(self, sequence: SequenceState, *, margin: float) -> float:
        """Until when a request that has just come may be held; -inf if it may not.

        Never longer than planned, and no longer than leaves it, at the clock of the plan, time for its own SLOs less
        `margin` of each.
        """
        slo, arrival_s = sequence.request.slo, sequence.request.arrival_s
        if not slo.batch or self.plan is None or self.closing:
            return -math.inf
        first_token_s = (slo.ttft_s or math.inf) * (1.0 - margin) - self.plan.start_s
        last_token_s = (slo.e2e_s or math.inf) * (1.0 - margin) - self.plan.start_s
        last_token_s -= sequence.remaining_tokens * self.plan.token_s
        return arrival_s + min(self.plan.hold_s, first_token_s, last_token_s)

    def _flow(self, now_s: float, most_s: float) -> Flow | None:
        """The load as it stands; None while it is not known, or no request can wait."""
        if self.first_s is None or now_s - self.first_s < self.window_s / 2:
            return None
        if len(self.lengths) < _ENOUGH or not self.slos or not self.sums[0]:
            return None
        seen_s = self.window_s * (1.0 - math.exp(-(now_s - self.first_s) / self.window_s))
        per_s = math.exp(-(now_s - self.last_s) / self.window_s) / seen_s
        waiting, others, prompts = self.sums
        e2e_s, ttft_s, tbt_s = (min(parts) for parts in zip(*self.slos, strict=True))
        return Flow(
            waiting_per_s=waiting * per_s,
            others_per_s=others * per_s,
            prompt_tokens=prompts / (waiting + others),
            lengths=_quantiles(self.lengths),
            predicted_tokens=_quantiles(self.predicted_tokens),
            e2e_s=e2e_s,
            ttft_s=ttft_s,
            tbt_s=tbt_s,
            most_s=most_s,
        )


def _quantiles(tokens: Iterable[int]) -> Floats:
    found: Floats = np.quantile(np.array(list(tokens)), (np.arange(_LENGTHS) + 0.5) / _LENGTHS)
    return found


def left_tokens(engine: EngineState) -> int:
    """Tokens that the longest request in the engine has yet to generate: a held request of no more tokens costs least
    if it joins at once. O(sequences), in one array operation for those that run.
    """
    board = engine.board
    left = max((sequence.remaining_tokens for sequence in board.pending.values()), default=0)
    return max(left, int(board.end.max()) - engine.iteration) if board.running else left


def fills(engine: EngineState, held: Iterable[SequenceState]) -> bool:
    """Whether the held requests take as much of the batch or of the KV blocks as the engine has free for them."""
    spec, board = engine.spec, engine.board
    assert spec is not None
    batch = board.running_sequences + board.pending_sequences
    blocks = board.kv_blocks(engine.iteration - 1)
    for sequence in held:
        batch += sequence.sequences
        tokens = sequence.prefill_tokens + sequence.remaining_tokens
        blocks += -(-tokens // spec.block_tokens) * sequence.sequences
    return batch > _MOST_BATCH * spec.max_batch or blocks > _MOST_KV * spec.kv_blocks


def plan_hold(flow: Flow, table: PerformanceTable, spec: EngineSpec, *, margin: float) -> HoldPlan | None:
    """The longest hold, and the clock to plan for, of least mean power under the SLOs less `margin` of each; None if no
    hold saves enough.
    """
    at_once = _cycle(flow, 0.0, table, spec, margin=margin)
    if not at_once.holds.any():
        return None
    watts_at_once = float(np.where(at_once.holds, at_once.watts, np.inf).min())
    plans = []
    for fraction in _SHORTER:
        most_s = flow.most_s * fraction
        cycle = _cycle(flow, most_s, table, spec, margin=margin)
        clock = int(np.where(cycle.holds, cycle.watts, np.inf).argmin())
        if cycle.holds[clock] and cycle.watts[clock] < watts_at_once * (1.0 - _LEAST_SAVING):
            start_s, token_s, watts = (float(part[clock]) for part in (cycle.start_s, cycle.token_s, cycle.watts))
            plans.append(
                HoldPlan(hold_s=most_s, start_s=start_s, token_s=token_s, watts=watts, watts_at_once=watts_at_once)
            )
    saved_w = max((watts_at_once - plan.watts for plan in plans), default=0.0)
    good = [plan for plan in plans if watts_at_once - plan.watts >= _NEARLY * saved_w]
    return min(good, key=lambda plan: plan.hold_s, default=None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Cycle:
    """One hold at each clock, shape (clocks,) each: mean watts, seconds until the last of a gathering has its first
    token, seconds between tokens of a full gathering, and whether the requests meet their SLOs.
    """

    watts: Floats
    start_s: Floats
    token_s: Floats
    holds: npt.NDArray[np.bool_]


def _cycle(flow: Flow, most_s: float, table: PerformanceTable, spec: EngineSpec, *, margin: float) -> _Cycle:
    """The mean cycle of holds that last `most_s` at most, by the theory above; 0: all join at once."""
    rate, keep, columns = flow.waiting_per_s + flow.others_per_s, 1.0 - margin, np.arange(len(table.clocks_mhz))
    blocks = (flow.prompt_tokens + float(flow.lengths.mean()) / 2) / spec.block_tokens + 0.5

    def look_up(batch: Floats, prompt_tokens: float) -> tuple[Floats, Floats]:
        """Seconds and watts of iterations with `batch` sequences at each clock, shape (phases, clocks)."""
        whole = np.clip(np.round(batch), 1, spec.max_batch).astype(np.int64).ravel()
        kv = np.minimum(np.round(whole * blocks), spec.kv_blocks).astype(np.int64)
        cells = table.cells(whole, kv, np.full(whole.size, round(prompt_tokens), dtype=np.int64)).reshape(batch.shape)
        return table.seconds[cells, columns].astype(np.float64), table.watts[cells, columns].astype(np.float64)

    batch = busy = np.ones((1, columns.size))
    hold_s = np.full(columns.size, most_s)
    for _ in range(_ROUNDS):
        gathered = np.maximum(1.0, flow.waiting_per_s * hold_s)
        chunk = min(max(1.0, float(gathered.mean()) * flow.prompt_tokens), spec.prefill_budget_tokens)
        chunk = min(chunk, table.hull.max_prefill_tokens)
        step_s, step_w = look_up(batch, 0)
        mixed_s, mixed_w = look_up(batch, chunk)
        each_s = _mean(np.maximum(mixed_s - step_s, 0.0)) * max(1.0, flow.prompt_tokens) / chunk
        share = np.minimum(rate * each_s, 0.98)
        token_s = _mean(step_s * busy) / _mean(busy) / (1.0 - share)
        alive = _alive(flow, hold_s, token_s)
        busy = np.maximum(-np.expm1(-alive), 1e-9)
        batch = np.maximum(alive / busy, 1.0)
        peak = np.maximum(alive.max(axis=0), gathered)
        peak = peak + _SPREAD * np.sqrt(peak)
        full_s = look_up(peak[None, :], 0)[0][0]
        start_s = full_s + gathered * each_s
        hold_s = (hold_s + _mean_hold(flow, most_s, start_s, full_s, keep=keep)) / 2  # else it may swing
    prefill = np.minimum(share / _mean(busy), 1.0)
    active_w = step_w * (1.0 - prefill) + mixed_w * prefill
    holds = (peak <= _MOST_BATCH * spec.max_batch) & (peak * blocks <= _MOST_KV * spec.kv_blocks) & (share < 0.98)
    holds &= (full_s <= flow.tbt_s * keep) & (start_s <= flow.ttft_s * keep)
    holds &= start_s + float(np.quantile(flow.lengths, _LONG)) * full_s <= flow.e2e_s * keep
    if most_s:  # until the first of a gathering comes, nothing is held
        holds &= hold_s - 1.0 / flow.waiting_per_s >= _LEAST_HOLD_S
    watts = _mean(busy * active_w + (1.0 - busy) * spec.idle_w)
    return _Cycle(watts=watts, start_s=start_s, token_s=full_s, holds=holds)


def _alive(flow: Flow, hold_s: Floats, token_s: Floats) -> Floats:
    """Sequences alive at each phase of a cycle and clock, shape (phases, clocks)."""
    output_tokens = float(flow.lengths.mean())
    if not hold_s.max() > 0.0:
        return ((flow.waiting_per_s + flow.others_per_s) * output_tokens * token_s)[None, :]
    hold_s = np.maximum(hold_s, float(flow.lengths[-1] * token_s.max()) / _MOST_CYCLES)
    cycles = math.ceil(float((flow.lengths[-1] * token_s / hold_s).max())) + 1
    age_tokens = hold_s * (_PHASES[:, None, None] + np.arange(cycles)[:, None]) / token_s
    left = 1.0 - np.searchsorted(flow.lengths, age_tokens, side="right") / flow.lengths.size
    gathered: Floats = left.sum(axis=1)
    gathered *= flow.waiting_per_s * output_tokens * token_s / np.maximum(_mean(gathered), 1e-9)  # Little's law
    return flow.others_per_s * output_tokens * token_s + gathered


def _mean(phases: Floats) -> Floats:
    """The mean over a cycle; of the one phase of a cycle of no length, itself."""
    found: Floats = phases[0] if len(phases) == 1 else _WEIGHTS @ phases
    return found


def _mean_hold(flow: Flow, most_s: float, start_s: Floats, token_s: Floats, *, keep: float) -> Floats:
    """Mean seconds until the first held request must be released, at each clock, shape (clocks,)."""
    slack_s = np.minimum(flow.e2e_s * keep - flow.predicted_tokens[:, None] * token_s, flow.ttft_s * keep) - start_s
    at_s = (np.arange(_STEPS) + 0.5) / _STEPS * most_s
    due = np.maximum(at_s[:, None, None] - np.maximum(slack_s, 0.0), 0.0).mean(axis=1)
    found: Floats = np.exp(-flow.waiting_per_s * due).mean(axis=0) * most_s
    return found
