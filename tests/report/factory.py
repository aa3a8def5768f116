"""Made-up runs for the tests of the report: plausible shapes, no simulator."""

from __future__ import annotations

import random
from dataclasses import replace
from math import sin

from throttllem.sim.result import (
    Distributions,
    ProjectionError,
    Quantiles,
    RunResult,
    Series,
    SloOutcome,
)

BINS = 240


def quantiles(mean: float) -> Quantiles:
    return Quantiles(mean=mean, p50=0.9 * mean, p90=1.6 * mean, p95=1.9 * mean, p99=2.4 * mean)


def slo(attainment: float) -> SloOutcome:
    return SloOutcome(
        e2e_s=16.0,
        tbt_s=0.2,
        ttft_s=None,
        asked=0.99,
        attainment=attainment,
        e2e_attainment=min(1.0, attainment + 0.002),
        tbt_attainment=min(1.0, attainment + 0.006),
        ttft_attainment=1.0,
        completed_attainment=attainment,
    )


def series(share: float, *, projects: bool, scales: bool, duration_s: float, seed: int) -> Series:
    """`share`: of the top clock and of the top power."""
    dice = random.Random(seed)
    load = [0.55 + 0.35 * sin(place / 22) + dice.uniform(-0.08, 0.08) for place in range(BINS)]
    clock = [1410.0 if share >= 1 else min(1410.0, 1410 * (share - 0.22 + 0.35 * part)) for part in load]
    tp = [(1 if part < 0.35 else 2 if part < 0.7 else 4) if scales else 4 for part in load]
    batch = [max(0.0, 60 * part) for part in load]
    return Series(
        time_s=[duration_s * place / BINS for place in range(BINS)],
        clock_mhz=[None if 40 < place < 46 else mhz for place, mhz in enumerate(clock)],
        power_w=[size * 80 + size * 230 * part * share for size, part in zip(tp, load, strict=True)],
        batch=list(batch),
        batch_projected=[rows * dice.uniform(0.98, 1.03) if projects else None for rows in batch],
        kv_blocks=[rows * 31 for rows in batch],
        kv_projected=[rows * 31 * dice.uniform(0.95, 1.04) if projects else None for rows in batch],
        queue=[0.0] * BINS,
        tp=list(tp),
    )


def distributions(slower: float, *, requests: int, seed: int) -> Distributions:
    dice = random.Random(seed)
    edges = [0.004 * 1.06**place for place in range(101)]
    return Distributions(
        e2e_s=[slower * dice.gammavariate(4, 1.35) for _ in range(requests)],
        tpot_s=[slower * dice.gauss(0.042, 0.006) for _ in range(requests)],
        tbt_edges_s=edges,
        tbt_counts=[int(4e5 / (1 + ((place - 34 - 8 * slower) / 5) ** 2)) if place > 25 else 0 for place in range(100)],
    )


def make_run(
    policy: str = "throttllem",
    *,
    energy: float = 1.0,
    attainment: float = 0.989,
    requests: int = 2000,
    rejected: int = 0,
    duration_s: float = 1800.0,
    seed: int = 1,
) -> RunResult:
    """A run that used `energy` times the baseline's energy."""
    projects = not policy.startswith(("triton", "fixed"))
    tokens = 211 * (requests - rejected)
    energy_j = 612_000.0 * energy
    return RunResult(
        policy=policy,
        requests=requests,
        completed=requests - rejected,
        rejected=rejected,
        lost=3,
        prompt_tokens=1014 * requests,
        generated_tokens=tokens,
        duration_s=duration_s,
        energy_j=energy_j,
        idle_energy_j=0.06 * energy_j,
        saved_estimate=None if policy.endswith("+autoscale") else 1 - energy,
        tokens_per_joule=tokens / energy_j if energy_j else 0.0,
        mean_clock_mhz=1410 * energy,
        busy_s_by_mhz={round(1410 * energy): duration_s},
        clock_switches=0 if energy == 1 else 1234,
        preemptions=0,
        ttft_s=quantiles(0.3),
        tbt_s=quantiles(0.05),
        tpot_s=quantiles(0.042),
        e2e_s=quantiles(5.8),
        queue_s=quantiles(0.1),
        slo=slo(attainment),
        projection_error=ProjectionError(batch=0.0012, kv=0.0181) if projects else None,
        decision_s=quantiles(0.0003),
        engines=[],
        sizes=[(0.0, 4), (600.0, 2), (1200.0, 4)] if policy.endswith("+autoscale") else [(0.0, 4)],
        rejections={"the queue is full": rejected} if rejected else {},
        series=series(
            energy, projects=projects, scales=policy.endswith("+autoscale"), duration_s=duration_s, seed=seed
        ),
        distributions=distributions(1.6 - 0.6 * energy, requests=requests, seed=seed),
    )


def make_runs() -> list[RunResult]:
    """The paper's experiment in outline: better, better still, and worse than the baseline."""
    return [
        make_run("triton", seed=1),
        make_run("throttllem", energy=0.688, attainment=0.987, seed=2),
        make_run("least-energy", energy=0.662, attainment=0.988, seed=3),
        make_run("triton+autoscale", energy=0.792, attainment=0.986, seed=4),
        make_run("throttllem+autoscale", energy=0.562, attainment=0.985, seed=5),
        _fixed(make_run("fixed:600", energy=1.04, attainment=0.912, rejected=41, seed=6), mhz=600.0),
    ]


def _fixed(run: RunResult, *, mhz: float) -> RunResult:
    return replace(run, mean_clock_mhz=mhz, series=replace(run.series, clock_mhz=[mhz] * BINS))


SCENARIO: dict[str, object] = {
    "gpu": "a100-40gb-sxm",
    "model": "llama-2-13b",
    "tp": 4,
    "sizes": [1, 2, 4],
    "trace": "azure-conv-like:seconds=1800",
    "slo": {"e2e_s": 16.0, "tbt_s": 0.2, "ttft_s": None},
    "length_error": 0.3,
    "count_freed_gpus": False,
    "seed": 7,
    "versions": {"throttllem": "0.1.0", "numpy": "2.4.6"},
}
