"""An engine under Poisson load, by the simulator: the figures that were measured, and what its iterations held.

`simulate` is what `throttllem simulate --policy fixed:CLOCK` does with default options; `settle` is its analytic
shadow, quick enough for a fit. Knows nothing of fits.
"""

import math
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import polars as pl

from throttllem.config import Options
from throttllem.core.clocks.policy import parse_policy
from throttllem.core.types import Slo
from throttllem.engines.simulated.fleet import Fleet, build_fleet
from throttllem.physics.catalogue import Catalogue, Gpu
from throttllem.physics.engine import EnginePhysics
from throttllem.physics.model import Model
from throttllem.sim.result import RunResult
from throttllem.sim.study import Scenario
from throttllem.sim.traces.trace import load_trace

FILE = Path("measured") / "h100_llama70b_load.csv"
GPU, MODEL = "h100-80gb-sxm", "llama-3-70b"
PROMPT_TOKENS, ANSWER_TOKENS = 1023, 99
_MEAN_CONTEXT = PROMPT_TOKENS + ANSWER_TOKENS // 2
_MOST_ROWS = 256
_LEAST_SHARE = 0.02
"""Of the time that prompts leave to tokens: below it an engine is overloaded, and a fit must not meet infinity."""
_HALVINGS = 22


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPoint:
    """One measured load; `power_w` of all GPUs."""

    tp: int
    clock_mhz: int
    requests_per_s: float
    power_w: float
    ttft_p99_s: float
    tpot_p99_s: float


class Step(NamedTuple):
    """Iterations that are alike: how many, and the mean of what they held (the arguments of the physics)."""

    iterations: int
    decode_batch: int
    kv_tokens: int
    prefill_tokens: int
    prefill_pairs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What the simulator says of one load. `idle` is the share of the time with nothing running."""

    power_w: float
    ttft_p99_s: float
    tpot_p99_s: float
    idle: float
    steps: tuple[Step, ...]


def read_points(data: Path) -> list[LoadPoint]:
    """The loads measured on H100 with Llama-3.3-70B under vLLM (figures of Louis-99/vllm-fork)."""
    names = ("tensor_parallel", "clock_mhz", "requests_per_s", "power_w_all_gpus", "ttft_p99_s", "tpot_p99_s")
    return [
        LoadPoint(tp=tp, clock_mhz=clock, requests_per_s=rate, power_w=watts, ttft_p99_s=ttft_s, tpot_p99_s=tpot_s)
        for tp, clock, rate, watts, ttft_s, tpot_s in pl.read_csv(data / FILE).select(names).iter_rows()
    ]


def simulate(catalogue: Catalogue, point: LoadPoint, *, requests: int, seeds: Iterable[int]) -> Served:
    """The means over runs of about `requests` requests each, one per seed.

    Every point draws arrivals of its own: with common ones an unlucky draw would bias all points alike.
    """
    runs = [_run(catalogue, point, requests, seed) for seed in seeds]
    return Served(
        power_w=_mean(result.energy_j / result.duration_s for result, _ in runs),
        ttft_p99_s=_mean(result.ttft_s.p99 or math.inf for result, _ in runs),
        tpot_p99_s=_mean(result.tpot_s.p99 or math.inf for result, _ in runs),
        idle=_mean(1 - watched.busy_s / result.duration_s for result, watched in runs),
        steps=tuple(step for _, watched in runs for step in watched.steps()),
    )


def mean_power_w(engine: EnginePhysics, point: LoadPoint, served: Served) -> float:
    """Watts of all GPUs by the law, over the iterations and the idle time of a run."""
    seconds, joules = 0.0, 0.0
    for iterations, rows, kv_tokens, prompt_tokens, pairs in served.steps:
        step_s, step_w = engine.iteration(point.clock_mhz, rows, kv_tokens, prompt_tokens, pairs)
        seconds += iterations * step_s
        joules += iterations * step_s * step_w
    return (1 - served.idle) * joules / seconds + served.idle * engine.idle_w()


def settle(engine: EnginePhysics, point: LoadPoint) -> tuple[float, float]:
    """Mean seconds per token, and of an iteration that takes in a prompt with half the one before it.

    The batch is the fixed point of Little's law; a prompt stretches every row's answer by one prefill.
    """
    low, high = 0.05, float(_MOST_ROWS)
    for _ in range(_HALVINGS):
        batch = math.sqrt(low * high)
        rows = max(1, round(batch))
        plain_s, mixed_s = (
            engine.iteration(point.clock_mhz, rows, rows * _MEAN_CONTEXT, tokens, tokens**2 / 2)[0]
            for tokens in (0, PROMPT_TOKENS)
        )
        left = max(_LEAST_SHARE, 1 - point.requests_per_s * (mixed_s - plain_s))
        mean_s = plain_s / left
        low, high = (batch, high) if ANSWER_TOKENS * point.requests_per_s * mean_s > batch else (low, batch)
    return mean_s, mixed_s + plain_s / 2


class _Watched(EnginePhysics):
    """The law, and a note of everything that was asked of it."""

    def __init__(self, gpu: Gpu, model: Model, tp: int) -> None:
        super().__init__(gpu, model, tp)
        self.busy_s = 0.0
        self._held: defaultdict[tuple[int, int], list[tuple[int, float]]] = defaultdict(list)

    def iteration(
        self, clock_mhz: float, decode_batch: int, kv_tokens: int, prefill_tokens: int, prefill_pairs: float
    ) -> tuple[float, float]:
        """As the law's."""
        found = super().iteration(clock_mhz, decode_batch, kv_tokens, prefill_tokens, prefill_pairs)
        self.busy_s += found[0]
        self._held[decode_batch, prefill_tokens].append((kv_tokens, prefill_pairs))
        return found

    def steps(self) -> list[Step]:
        """The iterations so far; those of equal rows and prompt tokens differ in their context alone."""
        return [
            Step(len(held), rows, round(_mean(kv for kv, _ in held)), tokens, _mean(pairs for _, pairs in held))
            for (rows, tokens), held in self._held.items()
        ]


def _run(catalogue: Catalogue, point: LoadPoint, requests: int, seed: int) -> tuple[RunResult, _Watched]:
    options, rate = Options(), point.requests_per_s
    seed = zlib.crc32(f"{point.tp} {point.clock_mhz} {rate} {seed}".encode())
    fleet = build_fleet(catalogue, GPU, MODEL, (point.tp,), options.batching)
    watched = _Watched(catalogue.gpu(GPU), catalogue.model(MODEL), point.tp)
    lengths = f"input={PROMPT_TOKENS},output={ANSWER_TOKENS}"
    scenario = Scenario(
        fleet=Fleet(gpu=GPU, model=MODEL, specs=fleet.specs, physics={point.tp: watched}),
        trace=load_trace(f"poisson:rate={rate},{lengths},seconds={requests / rate}", seed=seed),
        tables={},  # a fixed clock asks no prediction
        capacities={},
        slo=Slo(),
        options=options,
        seed=seed,
    )
    return scenario.run(parse_policy(f"fixed:{point.clock_mhz}", fleet.clocks_mhz, fleet.sizes)), watched


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
