"""Measures one run, and makes its result. Knows nothing of policies."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from throttllem.core.forecast.projection import Projection
from throttllem.core.types import Request, Slo
from throttllem.engines.simulated.batcher import Iteration
from throttllem.sim.result import Distributions, ProjectionError, Quantiles, RunResult, Series, SloOutcome

Floats = npt.NDArray[np.float64]

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
class Recorder:
    """Everything measured in one run; `bin_s` is the width of the bins of its series."""

    bin_s: float
    lives: dict[int, Life] = field(default_factory=dict)
    rejections: dict[str, int] = field(default_factory=dict)
    sizes: list[tuple[float, int]] = field(default_factory=list)
    decisions_s: list[float] = field(default_factory=list)
    switches: int = 0
    _gpus: int | None = None
    _bins: list[Bin] = field(default_factory=list)
    _gaps_s: list[float] = field(default_factory=list)
    _gap_sequences: list[int] = field(default_factory=list)
    _busy_s: dict[int, float] = field(default_factory=dict)
    _projected: int = 0
    _batch_error: float = 0.0
    _kv_error: float = 0.0

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
        if iteration.decode_sequences:
            self._gaps_s.append(seconds)
            self._gap_sequences.append(iteration.decode_sequences)
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
            self._gaps_s.append(at_s - life.paused_s)
            self._gap_sequences.append(1)
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
        done = [life for life in self.lives.values() if life.ended_s is not None]
        generated = sum(life.request.output_tokens or 0 for life in done)
        e2e, ttft, tpot, queue = (_times(done, kind) for kind in ("e2e", "ttft", "tpot", "queue"))
        gaps, sequences = np.asarray(self._gaps_s), np.asarray(self._gap_sequences)
        busy_s = sum(self._busy_s.values())
        return RunResult(
            policy=policy,
            requests=len(self.lives),
            completed=len(done),
            rejected=len(self.lives) - len(done),
            lost=lost,
            prompt_tokens=sum(life.request.prompt_tokens for life in done),
            generated_tokens=generated,
            duration_s=duration_s,
            energy_j=energy_j,
            idle_energy_j=idle_energy_j,
            tokens_per_joule=generated / energy_j if energy_j else 0.0,
            mean_clock_mhz=sum(mhz * s for mhz, s in self._busy_s.items()) / busy_s if busy_s else 0.0,
            busy_s_by_mhz=dict(sorted(self._busy_s.items())),
            clock_switches=self.switches,
            preemptions=preemptions,
            ttft_s=quantiles(ttft),
            tbt_s=quantiles(gaps, sequences),
            tpot_s=quantiles(tpot),
            e2e_s=quantiles(e2e),
            queue_s=quantiles(queue),
            slo=_outcome(list(self.lives.values()), slo),
            projection_error=self._projection_error(),
            decision_s=quantiles(np.asarray(self.decisions_s)),
            sizes=self.sizes,
            rejections=self.rejections,
            series=self._series(),
            distributions=Distributions(
                e2e_s=e2e.tolist(),
                tpot_s=tpot.tolist(),
                tbt_edges_s=_GAP_EDGES_S[:-1].tolist(),
                tbt_counts=np.histogram(gaps, _GAP_EDGES_S, weights=sequences)[0][:-1].astype(int).tolist(),
            ),
        )

    def _bin(self, index: int) -> Bin:
        while len(self._bins) <= index:
            self._bins.append(Bin(tp=self._gpus))
        return self._bins[index]

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


def quantiles(values: Floats, weights: npt.NDArray[np.int64] | None = None) -> Quantiles:
    """Mean and percentiles (nearest rank), weighted where single values stand for several."""
    if not values.size:
        return Quantiles(mean=None, p50=None, p90=None, p99=None)
    order = np.argsort(values, kind="stable")
    ranks = np.cumsum(np.ones(values.size) if weights is None else weights[order])
    p50, p90, p99 = (
        float(values[order[min(int(np.searchsorted(ranks, q * ranks[-1])), values.size - 1)]]) for q in (0.5, 0.9, 0.99)
    )
    return Quantiles(mean=float(np.average(values, weights=weights)), p50=p50, p90=p90, p99=p99)


def _times(done: list[Life], kind: str) -> Floats:
    """One duration of every completed request, seconds; `tpot` leaves one-token outputs out."""
    values = []
    for life in done:
        assert life.begun_s is not None and life.first_token_s is not None and life.ended_s is not None
        arrival_s = life.request.arrival_s
        match kind:
            case "e2e":
                values.append(life.ended_s - arrival_s)
            case "ttft":
                values.append(life.first_token_s - arrival_s)
            case "queue":
                values.append(life.begun_s - arrival_s)
            case _:
                tokens = life.request.output_tokens or 0
                if tokens > 1:
                    values.append((life.ended_s - life.first_token_s) / (tokens - 1))
    return np.asarray(values, dtype=np.float64)


def _outcome(lives: list[Life], slo: Slo) -> SloOutcome:
    met = [_met(life) for life in lives]
    completed = [all(entry) for entry, life in zip(met, lives, strict=True) if life.ended_s is not None]
    total = max(1, len(lives))
    e2e, tbt, ttft = (sum(entry[i] for entry in met) / total for i in range(3))
    return SloOutcome(
        e2e_s=slo.e2e_s,
        tbt_s=slo.tbt_s,
        ttft_s=slo.ttft_s,
        attainment=sum(all(entry) for entry in met) / total,
        e2e_attainment=e2e,
        tbt_attainment=tbt,
        ttft_attainment=ttft,
        completed_attainment=sum(completed) / max(1, len(completed)),
    )


def _met(life: Life) -> tuple[bool, bool, bool]:
    """Which of a request's own SLOs were met: E2E, time between tokens (its mean), TTFT."""
    if life.ended_s is None or life.first_token_s is None:
        return False, False, False
    slo, arrival_s = life.request.slo, life.request.arrival_s
    mean_gap_s = (life.ended_s - life.first_token_s) / max(1, (life.request.output_tokens or 1) - 1)
    return (
        slo.e2e_s is None or life.ended_s - arrival_s <= slo.e2e_s,
        slo.tbt_s is None or mean_gap_s <= slo.tbt_s,
        slo.ttft_s is None or life.first_token_s - arrival_s <= slo.ttft_s,
    )
