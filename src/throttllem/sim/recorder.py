"""Measures one run, and makes its result, in memory that does not grow with the run. Knows nothing of policies."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from throttllem.core.clocks.savings_estimate import SavingsEstimate
from throttllem.core.forecast.projection import Projection
from throttllem.core.types import Request, Slo
from throttllem.engines.simulated.batcher import Iteration
from throttllem.sim.result import Distributions, ProjectionError, RunResult, Series, SloOutcome
from throttllem.sim.samples import Samples

_GAP_EDGES_S = np.concatenate([[0.0], np.geomspace(1e-3, 10.0, 161), [math.inf]])


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
class Bin:
    """Sums over one bin of the run's time."""

    busy_s: float = 0.0
    clock: float = 0.0
    joules: float = 0.0
    batch: float = 0.0
    batch_projected: float = 0.0
    kv: float = 0.0
    kv_projected: float = 0.0
    projected_s: float = 0.0
    queue: float = 0.0
    tp: int | None = None


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
    decisions_s: Samples = field(default_factory=Samples)
    switches: int = 0
    _gpus: int | None = None
    _bins: list[Bin] = field(default_factory=list)
    _requests: Requests = field(default_factory=Requests)
    _gaps_s: Samples = field(default_factory=Samples)
    _busy_s: dict[int, float] = field(default_factory=dict)
    _projected: int = 0
    _batch_error: float = 0.0
    _kv_error: float = 0.0

    def arrived(self, request: Request) -> None:
        """A request arrived."""
        self._requests.arrived += 1
        self.lives[request.id] = Life(request)

    def rejected(self, request_id: int, why: str) -> None:
        """A request ended without being dispatched."""
        self.rejections[why] = self.rejections.get(why, 0) + 1
        if not self.keep_lives:
            del self.lives[request_id]

    def ended(self, request_id: int, at_s: float, energy_j: float) -> None:
        """A request gave its last token."""
        life = self.lives[request_id] if self.keep_lives else self.lives.pop(request_id)
        life.ended_s, life.energy_j = at_s, energy_j
        self._requests.completes(life)

    def iteration(
        self, at_s: float, iteration: Iteration, seconds: float, joules: float, clock_mhz: int, serving: bool
    ) -> Bin:
        """One iteration of one engine; returns its bin, for the projection of the same iteration."""
        here = self._bin(int(at_s / self.bin_s))
        here.joules += joules
        if serving:
            here.busy_s += seconds
            here.clock += clock_mhz * seconds
            here.batch += iteration.batch * seconds
            here.kv += iteration.kv_blocks * seconds
        self._busy_s[clock_mhz] = self._busy_s.get(clock_mhz, 0.0) + seconds
        if self.estimate is not None:
            self.estimate.worked(
                seconds=seconds,
                joules=joules,
                steps=1,
                output_tokens=iteration.decode_sequences,
                prompts=len(iteration.prefills),
                prompt_tokens=sum(tokens for _, tokens in iteration.prefills),
                kv_block_steps=iteration.kv_blocks,
                clock_mhz=clock_mhz,
            )
        if iteration.decode_sequences:
            self._gaps_s.add(seconds, iteration.decode_sequences)
        for request_id in iteration.preempted:
            self.lives[request_id].paused_s = at_s
        for request_id, _ in iteration.prefills:
            life = self.lives[request_id]
            if life.begun_s is None:
                life.begun_s = at_s
        return here

    def token(self, request_id: int, at_s: float) -> None:
        """A request gave its first token, or its first after a preemption: that wait is a gap like any other."""
        life = self.lives[request_id]
        if life.first_token_s is None:
            life.first_token_s = at_s
        elif life.paused_s is not None:
            self._gaps_s.add(at_s - life.paused_s)
        life.paused_s = None

    def projected(self, here: Bin, iteration: Iteration, seconds: float, projection: Projection, serving: bool) -> None:
        """Compare this iteration with its projection; one that ended too early projects 0."""
        offset = iteration.index - projection.first
        inside = 0 <= offset < projection.batch.size
        batch = int(projection.batch[offset]) if inside else 0
        kv = int(projection.kv_blocks[offset]) if inside else 0
        self._projected += 1
        self._batch_error += abs(batch - iteration.batch) / iteration.batch
        self._kv_error += abs(kv - iteration.kv_blocks) / iteration.kv_blocks
        if serving:
            here.projected_s += seconds
            here.batch_projected += batch * seconds
            here.kv_projected += kv * seconds

    def idle(self, from_s: float, to_s: float, watts: float) -> None:
        """Power without an iteration, spread over the bins that it covers."""
        if self.estimate is not None:
            self.estimate.idle(to_s - from_s, watts * (to_s - from_s))
        for index in range(int(from_s / self.bin_s), int(to_s / self.bin_s) + 1):
            begin_s, end_s = max(from_s, index * self.bin_s), min(to_s, (index + 1) * self.bin_s)
            if end_s > begin_s:
                self._bin(index).joules += watts * (end_s - begin_s)

    def state(self, at_s: float, queue: int, gpus: int) -> None:
        """Queue length and GPUs that are up, at a change."""
        here = self._bin(int(at_s / self.bin_s))
        here.queue = max(here.queue, queue)
        self._gpus = gpus
        here.tp = max(here.tp or 0, gpus)

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
        of = self._requests
        gaps, sequences = self._gaps_s.points()
        busy_s = sum(self._busy_s.values())
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
            mean_clock_mhz=sum(mhz * s for mhz, s in self._busy_s.items()) / busy_s if busy_s else 0.0,
            busy_s_by_mhz=dict(sorted(self._busy_s.items())),
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
            rejections=self.rejections,
            series=self._series(),
            distributions=Distributions(
                e2e_s=of.e2e_s.spread(),
                tpot_s=of.tpot_s.spread(),
                tbt_edges_s=_GAP_EDGES_S[:-1].tolist(),
                tbt_counts=np.histogram(gaps, _GAP_EDGES_S, weights=sequences)[0][:-1].astype(int).tolist(),
            ),
        )

    def _bin(self, index: int) -> Bin:
        while len(self._bins) <= index:
            self._bins.append(Bin(tp=self._gpus))
        return self._bins[index]

    def _saved_estimate(self, energy_j: float) -> float | None:
        top_j = self.estimate.joules() if self.estimate is not None else 0.0
        return 1.0 - energy_j / top_j if top_j > 0 else None

    def _projection_error(self) -> ProjectionError | None:
        if not self._projected:
            return None
        return ProjectionError(batch=self._batch_error / self._projected, kv=self._kv_error / self._projected)

    def _series(self) -> Series:
        bins = self._bins
        return Series(
            time_s=[index * self.bin_s for index in range(len(bins))],
            clock_mhz=[b.clock / b.busy_s if b.busy_s else None for b in bins],
            power_w=[b.joules / self.bin_s for b in bins],
            batch=[b.batch / b.busy_s if b.busy_s else None for b in bins],
            batch_projected=[b.batch_projected / b.projected_s if b.projected_s else None for b in bins],
            kv_blocks=[b.kv / b.busy_s if b.busy_s else None for b in bins],
            kv_projected=[b.kv_projected / b.projected_s if b.projected_s else None for b in bins],
            queue=[b.queue for b in bins],
            tp=[b.tp for b in bins],
        )
