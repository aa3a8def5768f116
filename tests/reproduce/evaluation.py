"""Made-up evidence for the tests of `reproduce`: the paper's experiments without a simulator."""

from __future__ import annotations

import functools
from dataclasses import replace

from report.factory import make_run, quantiles

from throttllem.config import LengthOptions
from throttllem.profiling.score import QUICK, Score, ScoreCard
from throttllem.reproduce.evidence import HELD_OUT, Evidence
from throttllem.reproduce.experiments import ERROR, ORACLE, Comparison, engine_studies, half_load_study, size_study
from throttllem.reproduce.probes import PROFILED, ClockSweep, KvCorrelation
from throttllem.sim.characterize import Capacity
from throttllem.sim.result import RunResult
from throttllem.sim.study import Study

ONLINE = LengthOptions(predictor="online")
ENERGY = {
    "triton": 1.0,
    "throttllem": 0.7,
    "least-energy": 0.65,
    "triton+autoscale": 0.79,
    "throttllem+autoscale": 0.55,
    "least-energy+autoscale": 0.5,
}


def comparison(study: Study, attainment: float = 0.989) -> Comparison:
    capacities = {
        tp: Capacity(tp=tp, max_rps=2.0 * tp, e2e_p99_s=16.0, tbt_p99_s=0.1, tokens_per_joule=1.0, rejected=0.1)
        for tp in study.sizes
    }
    runs = {
        policy: run(policy, 1 - (1 - ENERGY[policy]) * (1 + 0.02 * study.sizes[-1]), attainment)
        for policy in study.policies
    }
    return Comparison(study=study, capacities=capacities, runs=runs)


def run(policy: str, energy: float, attainment: float) -> RunResult:
    met = 1.0 if policy == "triton" else attainment
    return replace(make_run(policy, energy=energy, attainment=met), e2e_s=quantiles(6.2))


def card(model: str, sizes: tuple[int, ...], mae: float) -> ScoreCard:
    scores = tuple(
        Score(split=HELD_OUT, tp=tp, rows=100, r2=0.99, mae_ips=mae, mape_seconds=0.03, mape_watts=0.03)
        for tp in (None, *sizes)
    )
    return ScoreCard(gpu="a100-40gb-sxm", model=model, rows=1000, settings=QUICK, scores=scores)


@functools.cache
def evidence(*, attainment: float = 0.999, mae: float = 0.5) -> Evidence:
    online, oracle, noisy = (
        [
            *(
                comparison(study, attainment)
                for study in engine_studies("poisson", lengths=lengths, seconds=60.0, seed=3)
            ),
            comparison(size_study("poisson", lengths=lengths, seconds=60.0, seed=3), attainment),
        ]
        for lengths in (ONLINE, ORACLE, ERROR)
    )
    return Evidence(
        engines=tuple(online[:-1]),
        engines_oracle=tuple(oracle[:-1]),
        engines_error=tuple(noisy[:-1]),
        sizes=online[-1],
        sizes_oracle=oracle[-1],
        sizes_error=noisy[-1],
        sizes_half=comparison(half_load_study("poisson", lengths=ONLINE, seconds=60.0, seed=3), attainment),
        cards=tuple(card(model, sizes, mae) for model, sizes in PROFILED),
        correlation=KvCorrelation(batches=(8, 16), tbt=(0.9, 0.98), throughput=(-0.9, -0.8), iterations=10),
        sweep=ClockSweep(
            tp=4,
            batch=100,
            context_tokens=1200,
            best_mhz=1050,
            tpj_gain=0.37,
            throughput_loss=0.06,
            low_excess=0.02,
            lowest_excess=1.3,
        ),
    )
