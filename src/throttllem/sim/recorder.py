"""Measures one run, and makes its result, in memory that does not grow with the run. Knows nothing of policies."""

# Iterations are written down one after the other and summed up many at a time, by a compiled loop that adds in their
# order. What must come between two of them (idle time, another number of GPUs) sums up those before it first.

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from throttllem.core.clocks.savings_estimate import SavingsEstimate
from throttllem.core.compiled import compiled
from throttllem.core.forecast.projection import Projection
from throttllem.core.types import Request, Slo
from throttllem.physics.iterations import STEP, Floats, Ints, Records
from throttllem.sim.result import Distributions, ProjectionError, RunResult, Series, SloOutcome
from throttllem.sim.samples import Samples

Flags = npt.NDArray[np.bool_]

_GAP_EDGES_S = np.concatenate([[0.0], np.geomspace(1e-3, 10.0, 161), [math.inf]])
_STEPS = 4096
"""Iterations that are written down before they are summed up."""
_SUMS = np.dtype(
    [
        ("busy_s", np.float64),
        ("clock", np.float64),
        ("joules", np.float64),
        ("batch", np.float64),
        ("batch_projected", np.float64),
        ("kv", np.float64),
        ("kv_projected", np.float64),
        ("projected_s", np.float64),
    ]
)
"""Sums over the iterations of one bin of the run's time."""


@dataclass(slots=True)
class Life:
    """One request's times on the run's time line; None: did not happen (yet)."""

    request: Request
    begun_s: float | None = None
    first_token_s: float | None = None
    ended_s: float | None = None
    paused_s: float | None = None
    """Since when a preempted request has given no token."""
    energy_j: float = 0.0


@dataclass(slots=True)
class Requests:
    """Sums and samples over all requests; the attainments count requests that met their own SLOs."""

    arrived: int = 0
    completed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    met: int = 0
    met_e2e: int = 0
    met_tbt: int = 0
    met_ttft: int = 0
    e2e_s: Samples = field(default_factory=Samples)
    ttft_s: Samples = field(default_factory=Samples)
    tpot_s: Samples = field(default_factory=Samples)
    """Of outputs of two tokens or more."""
    queue_s: Samples = field(default_factory=Samples)

    def completes(self, life: Life) -> None:
        """Count a request that ended."""
        assert life.begun_s is not None and life.first_token_s is not None and life.ended_s is not None
        arrival_s, tokens, slo = life.request.arrival_s, life.request.output_tokens or 0, life.request.slo
        e2e_s, ttft_s = life.ended_s - arrival_s, life.first_token_s - arrival_s
        tpot_s = (life.ended_s - life.first_token_s) / max(1, tokens - 1)
        self.completed += 1
        self.prompt_tokens += life.request.prompt_tokens
        self.generated_tokens += tokens
        self.e2e_s.add(e2e_s)
        self.ttft_s.add(ttft_s)
        self.queue_s.add(life.begun_s - arrival_s)
        if tokens > 1:
            self.tpot_s.add(tpot_s)
        met_e2e = slo.e2e_s is None or e2e_s <= slo.e2e_s
        met_tbt = slo.tbt_s is None or tpot_s <= slo.tbt_s
        met_ttft = slo.ttft_s is None or ttft_s <= slo.ttft_s
        self.met_e2e += met_e2e
        self.met_tbt += met_tbt
        self.met_ttft += met_ttft
        self.met += met_e2e and met_tbt and met_ttft

    def outcome(self, slo: Slo) -> SloOutcome:
        """Fractions that met the SLOs; a rejected request meets none."""
        total = max(1, self.arrived)
        return SloOutcome(
            e2e_s=slo.e2e_s,
            tbt_s=slo.tbt_s,
            ttft_s=slo.ttft_s,
            asked=slo.attainment,
            attainment=self.met / total,
            e2e_attainment=self.met_e2e / total,
            tbt_attainment=self.met_tbt / total,
            ttft_attainment=self.met_ttft / total,
            completed_attainment=self.met / max(1, self.completed),
        )


@dataclass(slots=True)
class Recorder:
    """Everything measured in one run; `bin_s` is the width of the bins of its series.

    `lives` holds the requests that are open, and with `keep_lives` those that have ended too.
    """

    bin_s: float
    keep_lives: bool = False
    estimate: SavingsEstimate | None = None
    """What a gateway would show as saved, fed as a gateway feeds it; of a run that keeps one engine."""
    lives: dict[int, Life] = field(default_factory=dict)
    rejections: dict[str, int] = field(default_factory=dict)
    sizes: list[tuple[float, int]] = field(default_factory=list)
    engines: list[tuple[float, dict[int, int]]] = field(default_factory=list)
    decisions_s: Samples = field(default_factory=Samples)
    switches: int = 0
    steps: Records = field(default_factory=lambda: np.zeros(_STEPS, STEP))
    filled: int = 0
    """Of `steps`: iterations that are written down; an engine that runs many at once writes behind them."""
    _serving: Flags = field(default_factory=lambda: np.zeros(_STEPS, np.bool_))
    """Of each of them: whether its engine takes new requests."""
    _projects: Flags = field(default_factory=lambda: np.zeros(_STEPS, np.bool_))
    _projection: Ints = field(default_factory=lambda: np.zeros((2, _STEPS), np.int64))
    """Whether there was a projection, and its batch and KV blocks."""
    _gpus: int | None = None
    _sums: Records = field(default_factory=lambda: np.zeros(64, _SUMS))
    _queue: list[float] = field(default_factory=list)
    """The longest queue of each bin; as long as there are bins."""
    _tp: list[int | None] = field(default_factory=list)
    _requests: Requests = field(default_factory=Requests)
    _gaps_s: Samples = field(default_factory=Samples)
    _clocks: dict[int, None] = field(default_factory=dict)
    """In order of their first iteration."""
    _busy_s: Floats = field(default_factory=lambda: np.zeros(4096))
    """By clock in MHz."""
    _projected: int = 0
    _errors: Floats = field(default_factory=lambda: np.zeros(2))
    """Sums of the relative errors of batch and KV blocks."""

    def arrived(self, request: Request) -> None:
        """A request arrived."""
        self._requests.arrived += 1
        self.lives[request.id] = Life(request)

    def rejected(self, request_id: int, why: str) -> None:
        """A request ended without its last token: it was not dispatched, or its engine was lost."""
        self.rejections[why] = self.rejections.get(why, 0) + 1
        if not self.keep_lives:
            del self.lives[request_id]

    def ended(self, request_id: int, at_s: float, energy_j: float) -> None:
        """A request gave its last token."""
        life = self.lives[request_id] if self.keep_lives else self.lives.pop(request_id)
        life.ended_s, life.energy_j = at_s, energy_j
        self._requests.completes(life)

    def engine(self, at_s: float, tp: int, change: int, *, pooled: bool) -> None:
        """An engine is up (`change` 1), or is no more (-1)."""
        if not pooled:
            self.sizes += [(at_s, tp)] if change > 0 else []
            return
        before = self.engines[-1][1] if self.engines else {}
        counts = before | {tp: before.get(tp, 0) + change}
        if self.engines and self.engines[-1][0] == at_s:
            self.engines.pop()
        self.engines.append((at_s, {size: count for size, count in sorted(counts.items()) if count}))

    def ran(self, iterations: int, clock_mhz: int, *, first: int, projection: Projection | None, serving: bool) -> None:
        """Iterations of one engine from number `first` on, which were written to `steps`, and their projection."""
        filled, self.filled = self.filled, self.filled + iterations
        self._serving[filled : self.filled] = serving
        self._projects[filled : self.filled] = projection is not None
        if projection is not None:
            _project(self._projection[:, filled : self.filled], first - projection.first, projection)
        if clock_mhz not in self._clocks:
            self._clocks[clock_mhz] = None
            if clock_mhz >= self._busy_s.size:
                self._busy_s = np.append(self._busy_s, np.zeros(clock_mhz))
        if self.filled == _STEPS:
            self._sum_up()

    def prompt(self, request_id: int, at_s: float) -> None:
        """A part of a request's prompt is processed in an iteration that begins now."""
        life = self.lives[request_id]
        if life.begun_s is None:
            life.begun_s = at_s

    def preempted(self, request_id: int, at_s: float) -> None:
        """A request gives no token from now on."""
        self.lives[request_id].paused_s = at_s

    def _sum_up(self) -> None:
        """Sum up the iterations that are written down."""
        if not self.filled:
            return
        steps = self.steps[: self.filled]
        self.filled = 0
        self._bin(int(steps["begin_s"].max() / self.bin_s))
        marks = self._serving, self._projects, self._projection
        self._projected += _add(steps, *marks, self.bin_s, self._sums, self._busy_s, self._errors)
        decodes = steps["sequences"] > 0
        self._gaps_s.extend(steps["seconds"][decodes], steps["sequences"][decodes])
        if self.estimate is not None:
            self.estimate.stepped(
                seconds=steps["seconds"],
                joules=steps["joules"],
                output_tokens=steps["sequences"],
                prompts=steps["prompts"],
                prompt_tokens=steps["prompt_tokens"],
                kv_blocks=steps["kv_blocks"],
                clocks_mhz=steps["clock_mhz"],
            )

    def token(self, request_id: int, at_s: float) -> None:
        """A request gave its first token, or its first after a preemption: that wait is a gap like any other."""
        life = self.lives[request_id]
        if life.first_token_s is None:
            life.first_token_s = at_s
        elif life.paused_s is not None:
            self._sum_up()
            self._gaps_s.add(at_s - life.paused_s)
        life.paused_s = None

    def idle(self, from_s: float, to_s: float, watts: float) -> None:
        """Power without an iteration, spread over the bins that it covers."""
        self._sum_up()
        if self.estimate is not None:
            self.estimate.idle(to_s - from_s, watts * (to_s - from_s))
        for index in range(int(from_s / self.bin_s), int(to_s / self.bin_s) + 1):
            begin_s, end_s = max(from_s, index * self.bin_s), min(to_s, (index + 1) * self.bin_s)
            if end_s > begin_s:
                self._bin(index)
                self._sums["joules"][index] += watts * (end_s - begin_s)

    def state(self, at_s: float, queue: int, gpus: int) -> None:
        """Queue length and GPUs that are up, at a change."""
        if gpus != self._gpus:
            self._sum_up()
        here = self._bin(int(at_s / self.bin_s))
        self._queue[here] = max(self._queue[here], queue)
        self._gpus = gpus
        self._tp[here] = max(self._tp[here] or 0, gpus)

    def result(
        self,
        *,
        policy: str,
        slo: Slo,
        duration_s: float,
        energy_j: float,
        idle_energy_j: float,
        lost: int,
        preemptions: int,
    ) -> RunResult:
        """All measurements of the run."""
        self._sum_up()
        of = self._requests
        gaps, sequences = self._gaps_s.points()
        busy_s_by_mhz = {mhz: float(self._busy_s[mhz]) for mhz in self._clocks}
        busy_s = sum(busy_s_by_mhz.values())
        return RunResult(
            policy=policy,
            requests=of.arrived,
            completed=of.completed,
            rejected=of.arrived - of.completed,
            lost=lost,
            prompt_tokens=of.prompt_tokens,
            generated_tokens=of.generated_tokens,
            duration_s=duration_s,
            energy_j=energy_j,
            idle_energy_j=idle_energy_j,
            saved_estimate=self._saved_estimate(energy_j),
            tokens_per_joule=of.generated_tokens / energy_j if energy_j else 0.0,
            mean_clock_mhz=sum(mhz * s for mhz, s in busy_s_by_mhz.items()) / busy_s if busy_s else 0.0,
            busy_s_by_mhz=dict(sorted(busy_s_by_mhz.items())),
            clock_switches=self.switches,
            preemptions=preemptions,
            ttft_s=of.ttft_s.quantiles(),
            tbt_s=self._gaps_s.quantiles(),
            tpot_s=of.tpot_s.quantiles(),
            e2e_s=of.e2e_s.quantiles(),
            queue_s=of.queue_s.quantiles(),
            slo=of.outcome(slo),
            projection_error=self._projection_error(),
            decision_s=self.decisions_s.quantiles(),
            sizes=self.sizes,
            engines=self.engines,
            rejections=self.rejections,
            series=self._series(),
            distributions=Distributions(
                e2e_s=of.e2e_s.spread(),
                tpot_s=of.tpot_s.spread(),
                tbt_edges_s=_GAP_EDGES_S[:-1].tolist(),
                tbt_counts=np.histogram(gaps, _GAP_EDGES_S, weights=sequences)[0][:-1].astype(int).tolist(),
            ),
        )

    def _bin(self, index: int) -> int:
        """The bin, made if it was not there."""
        while len(self._tp) <= index:
            self._tp.append(self._gpus)
            self._queue.append(0.0)
        if index >= self._sums.size:
            self._sums = np.append(self._sums, np.zeros(index + 1, _SUMS))
        return index

    def _saved_estimate(self, energy_j: float) -> float | None:
        top_j = self.estimate.joules() if self.estimate is not None else 0.0
        return 1.0 - energy_j / top_j if top_j > 0 else None

    def _projection_error(self) -> ProjectionError | None:
        if not self._projected:
            return None
        batch, kv = (self._errors / self._projected).tolist()
        return ProjectionError(batch=batch, kv=kv)

    def _series(self) -> Series:
        bins = len(self._tp)
        sums = self._sums[:bins]
        busy_s, projected_s = sums["busy_s"].tolist(), sums["projected_s"].tolist()
        means = {name: _means(sums[name].tolist(), busy_s) for name in ("clock", "batch", "kv")}
        projected = {name: _means(sums[name].tolist(), projected_s) for name in ("batch_projected", "kv_projected")}
        return Series(
            time_s=[index * self.bin_s for index in range(bins)],
            clock_mhz=means["clock"],
            power_w=[joules / self.bin_s for joules in sums["joules"].tolist()],
            batch=means["batch"],
            batch_projected=projected["batch_projected"],
            kv_blocks=means["kv"],
            kv_projected=projected["kv_projected"],
            queue=self._queue,
            tp=self._tp,
        )


def _means(sums: list[float], seconds: list[float]) -> list[float | None]:
    """Of each bin; None where no time counts."""
    return [total / over_s if over_s else None for total, over_s in zip(sums, seconds, strict=True)]


def _project(projected: Ints, offset: int, projection: Projection) -> None:
    """Batch and KV blocks, shape (2, iterations), of those `offset` after the projection's first; 0 beyond its end."""
    projected[:] = 0
    inside, skipped = slice(max(0, offset), max(0, offset + projected.shape[1])), max(0, -offset)
    batch = projection.batch[inside]
    projected[0, skipped : skipped + batch.size] = batch
    projected[1, skipped : skipped + batch.size] = projection.kv_blocks[inside]


@compiled
def _add(
    steps: Records,
    serving: Flags,
    projects: Flags,
    projection: Ints,
    bin_s: float,
    sums: Records,
    busy_s: Floats,
    errors: Floats,
) -> int:
    """Add iterations to the sums of their bins, the time at their clocks, and the errors of their projections; how many
    were projected.
    """
    projected = 0
    for number in range(steps.size):
        step = steps[number]
        here, batch = sums[int(step.begin_s / bin_s)], step.sequences + step.prompts
        here.joules += step.joules
        busy_s[step.clock_mhz] += step.seconds
        if serving[number]:
            here.busy_s += step.seconds
            here.clock += step.clock_mhz * step.seconds
            here.batch += batch * step.seconds
            here.kv += step.kv_blocks * step.seconds
        if projects[number]:
            projected += 1
            batch_projected, kv_projected = projection[0, number], projection[1, number]
            errors[0] += abs(batch_projected - batch) / batch
            errors[1] += abs(kv_projected - step.kv_blocks) / step.kv_blocks
            if serving[number]:
                here.projected_s += step.seconds
                here.batch_projected += batch_projected * step.seconds
                here.kv_projected += kv_projected * step.seconds
    return projected
