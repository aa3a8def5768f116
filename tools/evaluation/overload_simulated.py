"""The overload test on simulated hardware, in virtual time: an A100 engine that batches as vLLM does, and nothing else.

The limit stands for `--max-num-queued-reqs`: with that many requests in the engine, others are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from throttllem.config import BatchingOptions, Noise
from throttllem.core.clocks.policy import ClockPolicy, ThrottleOptions
from throttllem.core.controller import Controller
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.lengths.online import OnlineLengthPredictor
from throttllem.core.lengths.prediction import LengthPredictor
from throttllem.core.options import AdmissionOptions, ControllerOptions, Unmeetable
from throttllem.core.types import Arrived, Command, Event, Reason, Reject, Request, Slo, Stepped
from throttllem.engines.simulated.fleet import Fleet, build_fleet
from throttllem.physics.catalogue import Catalogue
from throttllem.profiling.tables import performance_tables
from throttllem.sim.driver import Machine, Simulation
from throttllem.sim.recorder import Life, Recorder
from tools.evaluation.overload_load import Lengths, Outcome, Slos, azure, judge

GPU, MODEL, TP = "a100-40gb-sxm", "llama-2-13b", 4
BATCHING = BatchingOptions(block_tokens=16, chunked=True, prefill_budget_tokens=2048, max_batch=256)
LENGTHS = Lengths(prompt_divisor=1.0, prompt_cap=3000, answer_divisor=1.0, answer_cap=1000)
MAX_TOKENS = 1024
LIMITS = (32, 48, 64, 72, 80, 88, 96, 112, 128, 160, 192, 256)
WARM_S, JUDGED_S = 30.0, 240.0
SATURATED = 1500


class Limited(Controller):
    """First come, first served at the top clock, with at most `limit` requests in the engine (None: any number)."""

    def __init__(self, fleet: Fleet, limit: int | None) -> None:
        top = ThrottleOptions(policy=ClockPolicy.TOP)
        super().__init__(ControllerOptions(throttle=top, slo_aware=False, specs=fleet.specs))
        self._limit, self._inside = limit, 0

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """As the controller does, but for the limit."""
        match event:
            case Arrived(request=request):
                if self._limit is not None and self._inside >= self._limit:
                    return [Reject(request_id=request.id, why=Reason.QUEUE_FULL)]
                self._inside += 1
            case Stepped(finished=finished):
                self._inside -= len(finished)
        return super().handle(event, now_s)


class Maker(Protocol):
    """Makes a controller for a run; one that learned on the load of another seed may be carried over inside."""

    def __call__(self) -> Controller:
        """A new one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The engine, its table, and the saturated throughput in requests/s."""

    fleet: Fleet
    tables: dict[int, PerformanceTable]
    capacity_rps: float
    slo: Slos

    def limited(self, limit: int | None, seed: int) -> Outcome:
        """vLLM alone."""
        return _outcome(self, Limited(self.fleet, limit), seed)

    def gateway(self, predictor: LengthPredictor, seed: int, policy: ClockPolicy) -> Outcome:
        """The gateway's core in front of it."""
        options = ControllerOptions(
            throttle=ThrottleOptions(policy=policy),
            admission=AdmissionOptions(unmeetable=Unmeetable.REJECT),
            predictor=predictor,
            specs=self.fleet.specs,
            tables=self.tables,
        )
        return _outcome(self, Controller(options), seed)


def bench(cache: Path) -> Bench:
    """Capacity and SLOs by the rule of the real part. Deterministic."""
    fleet = build_fleet(Catalogue.load(None), GPU, MODEL, (TP,), BATCHING)
    tables = performance_tables(fleet, cache, seed=0)
    empty = Slos(e2e_s=float("inf"), tbt_s=float("inf"))
    burst, busy_s = _run(fleet, Limited(fleet, None), _requests(1e6, SATURATED, 0, Slo()), seed=0)
    capacity = SATURATED / busy_s
    saturated = judge(_results(burst), empty, from_s=0, to_s=busy_s)
    half, ended_s = _run(fleet, Limited(fleet, None), _requests(capacity / 2, SATURATED, 1, Slo()), seed=1)
    relaxed = judge(_results(half), empty, from_s=0, to_s=ended_s)
    slo = Slos(e2e_s=2 * relaxed.e2e_p99_s, tbt_s=1.5 * saturated.tbt_p50_s)
    return Bench(fleet=fleet, tables=tables, capacity_rps=capacity, slo=slo)


def learned(found: Bench, seed: int, policy: ClockPolicy) -> OnlineLengthPredictor:
    """What the gateway's length predictor knows after a run on another seed."""
    predictor = OnlineLengthPredictor()
    found.gateway(predictor, seed, policy)
    return predictor


def _outcome(found: Bench, controller: Controller, seed: int) -> Outcome:
    rate = 2 * found.capacity_rps
    slo = Slo(e2e_s=found.slo.e2e_s, tbt_s=found.slo.tbt_s)
    requests = _requests(rate, int(rate * (WARM_S + JUDGED_S + 10)), seed, slo)
    lives, _ = _run(found.fleet, controller, requests, seed)
    return judge(_results(lives), found.slo, from_s=WARM_S, to_s=WARM_S + JUDGED_S)


def _requests(rate: float, count: int, seed: int, slo: Slo) -> list[Request]:
    draw = np.random.default_rng(seed)
    rows = azure(LENGTHS)
    times = np.cumsum(draw.exponential(1 / rate, count)).tolist()
    picked = draw.integers(0, len(rows), count).tolist()
    return [
        Request(
            id=number,
            arrival_s=at_s,
            prompt_tokens=rows[index][0],
            output_tokens=rows[index][1],
            max_tokens=MAX_TOKENS,
            slo=slo,
        )
        for number, (at_s, index) in enumerate(zip(times, picked, strict=True))
    ]


def _run(fleet: Fleet, controller: Controller, requests: Sequence[Request], seed: int) -> tuple[list[Life], float]:
    machine = Machine(
        specs=fleet.specs, physics=fleet.physics, switch_latency_s=0.2, startup_w=0.0, gpus=TP, noise=Noise()
    )
    recorder = Recorder(bin_s=1.0, keep_lives=True)
    simulation = Simulation(controller, machine, recorder, seed=seed)
    simulation.run(list(requests), TP)
    return list(recorder.lives.values()), simulation.now_s


def _results(lives: Sequence[Life]) -> list[dict[str, object]]:
    """As the client of a real run records it."""
    found: list[dict[str, object]] = []
    for life in lives:
        request = life.request
        one: dict[str, object] = {"at_s": request.arrival_s, "late_s": 0.0, "ended_s": 0.0, "status": 429}
        if life.ended_s is not None and life.first_token_s is not None:
            last_s = life.ended_s - request.arrival_s
            first_s = life.first_token_s - request.arrival_s
            one |= {"status": 200, "done": True, "tokens": request.output_tokens, "ended_s": last_s}
            one |= {"first_s": first_s, "last_s": last_s}
        found.append(one)
    return found
