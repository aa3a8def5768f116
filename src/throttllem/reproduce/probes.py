"""Measurements of an engine without a trace: KV use against speed, clock against energy, the performance model.

All on the simulated engine, the sweep of clocks without its noise. Knows nothing of claims.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from throttllem.config import Noise
from throttllem.engines.simulated.engine import SimulatedEngine
from throttllem.engines.simulated.fleet import build_fleet
from throttllem.engines.simulated.presets import batching
from throttllem.physics.catalogue import Catalogue
from throttllem.physics.engine import EnginePhysics
from throttllem.profiling.measure import ProfilePlan
from throttllem.profiling.score import ScoreCard, score_profile
from throttllem.profiling.tables import profile_fleet
from throttllem.reproduce.experiments import BATCHING, ENGINES, GPU, MAIN_MODEL, SIZES
from throttllem.sim.traces.trace import load_trace

KV_TP = 4
KV_BATCHES = (8, 16, 32, 64)
"""Batch sizes of the correlations: each is held while its requests grow from one block to all that fits."""
LOW_MHZ = 840
"""The clock that the paper names as too low."""
PROFILED = ((MAIN_MODEL, SIZES), *(((model, (tp,)) for model, tp in ENGINES if model != MAIN_MODEL)))
"""Models with the sizes that are profiled and scored together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCorrelation:
    """Pearson correlation of KV blocks in use with seconds per iteration and with tokens/s, one per batch size."""

    batches: tuple[int, ...]
    tbt: tuple[float, ...]
    throughput: tuple[float, ...]
    iterations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockSweep:
    """One decode batch over all clocks. `best_mhz` gives most tokens per joule; gains and losses against the top."""

    tp: int
    batch: int
    context_tokens: int
    best_mhz: int
    tpj_gain: float
    throughput_loss: float
    low_excess: float
    """Energy per token at `LOW_MHZ` over that at `best_mhz`, less one."""
    lowest_excess: float
    """The same at the lowest clock."""


def kv_correlation(catalogue: Catalogue, *, seed: int) -> KvCorrelation:
    """Let batches grow on a noisy engine at the top clock, from one block each to the context or the cache's end."""
    fleet = build_fleet(catalogue, GPU, MAIN_MODEL, (KV_TP,), BATCHING)
    spec = fleet.specs[KV_TP]
    tbt, throughput, iterations = [], [], 0
    for batch in KV_BATCHES:
        engine = SimulatedEngine(
            spec, fleet.physics[KV_TP], clock_mhz=spec.clocks_mhz[-1], seed=(seed, batch), noise=Noise()
        )
        prompt = spec.block_tokens // 2
        answer = min(spec.max_context_tokens, spec.kv_blocks // batch * spec.block_tokens) - prompt
        for request_id in range(batch):
            engine.batcher.add(request_id, prompt_tokens=prompt, output_tokens=answer, max_tokens=answer)
        points = []
        while (step := engine.step()) is not None:
            iteration, seconds, _ = step
            if not iteration.prefills:
                points.append((iteration.kv_blocks, seconds))
            engine.finish()
        kv, seconds_each = np.array(points, dtype=np.float64).T
        tbt.append(float(np.corrcoef(kv, seconds_each)[0, 1]))
        throughput.append(float(np.corrcoef(kv, batch / seconds_each)[0, 1]))
        iterations += len(points)
    return KvCorrelation(batches=KV_BATCHES, tbt=tuple(tbt), throughput=tuple(throughput), iterations=iterations)


def clock_sweep(catalogue: Catalogue, trace: str, *, seed: int, tp: int = KV_TP) -> ClockSweep:
    """The largest batch of the trace's typical requests, half-way through their answers, at every clock.

    Raises ValueError where not even one of them fits.
    """
    physics = EnginePhysics(catalogue.gpu(GPU), catalogue.model(MAIN_MODEL), tp)
    most = batching(BATCHING, physics.gpu).max_batch
    lengths = load_trace(trace, seed=seed)
    context = lengths.mean_context_tokens
    batch = min(most, physics.kv_capacity_tokens() // context)
    if batch < 1:
        raise ValueError(
            f"{trace}: a typical request of {context} tokens does not fit {MAIN_MODEL} at TP {tp} on {GPU}"
        )
    points = {mhz: physics.iteration(mhz, batch, batch * context, 0, 0.0) for mhz in physics.gpu.clocks_mhz}
    joules = {mhz: math.prod(point) / batch for mhz, point in points.items()}
    best, top = min(joules, key=joules.__getitem__), max(points)
    return ClockSweep(
        tp=tp,
        batch=batch,
        context_tokens=context,
        best_mhz=best,
        tpj_gain=joules[top] / joules[best] - 1,
        throughput_loss=1 - points[top][0] / points[best][0],
        low_excess=joules[LOW_MHZ] / joules[best] - 1,
        lowest_excess=joules[min(points)] / joules[best] - 1,
    )


def score_card(catalogue: Catalogue, model: str, sizes: tuple[int, ...], *, seed: int) -> ScoreCard:
    """The score card of one model's noisy profile; `seed` is that of the profile, as in `throttllem profile`."""
    fleet = build_fleet(catalogue, GPU, model, sizes, BATCHING)
    return score_profile(profile_fleet(fleet, ProfilePlan(seed=seed)))
