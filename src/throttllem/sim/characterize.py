"""What can an engine bear, and how slow is it then? (the paper: maximum load and E2E SLO of each engine)

Requests with a trace's lengths come as a Poisson stream at the top clock, first come first served, at rising rates. The
maximum sustainable load is the highest rate at which the queue stays short and tokens come in time; the E2E SLO of an
engine is its own p99 there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from throttllem.config import Options
from throttllem.core.clocks.policy import ClockPolicy, ThrottleOptions
from throttllem.core.controller import Controller
from throttllem.core.options import ControllerOptions
from throttllem.core.types import Request, Slo
from throttllem.engines.simulated.fleet import Fleet
from throttllem.sim.driver import Machine, Simulation
from throttllem.sim.recorder import Recorder
from throttllem.sim.result import RunResult
from throttllem.sim.traces import Trace

REQUESTS = 2000
"""Requests of one probe."""
LONGEST_QUEUE_S = 1.0
"""A load is sustained while 99 of 100 requests wait no longer than this for a place in the batch."""
_STEPS = 7
METHOD = {"requests": REQUESTS, "longest_queue_s": LONGEST_QUEUE_S, "steps": _STEPS}
"""What a cached characterisation depends on besides its inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """One engine's characterisation. `max_rps` sustained requests/s; p99 E2E and TBT at the top clock there."""

    tp: int
    max_rps: float
    e2e_p99_s: float
    tbt_p99_s: float
    tokens_per_joule: float
    rejected: float
    """Fraction of the trace's requests that the engine can never hold; they are left out."""


def characterize(fleet: Fleet, tp: int, trace: Trace, options: Options, *, seed: int, promised: Slo) -> Capacity:
    """Find one engine's maximum load by bisection between nothing and its saturated throughput.

    99 of 100 requests must keep what is `promised`: time between tokens, and E2E and TTFT where given (sizes that share
    the E2E SLO of the largest). `max_rps` 0: no load at all does; the p99 figures are then those at the highest load
    that keeps the queue short. Raises ValueError if no request of the trace fits the engine.
    """
    found = _bisect(fleet, tp, trace, options, seed=seed, promised=promised)
    if found.max_rps == 0.0 and promised != Slo():  # what it cannot keep says nothing of how fast it is
        found = replace(_bisect(fleet, tp, trace, options, seed=seed, promised=Slo()), max_rps=0.0)
    return found


def _bisect(fleet: Fleet, tp: int, trace: Trace, options: Options, *, seed: int, promised: Slo) -> Capacity:
    requests, rejected = sample_requests(fleet, tp, trace, options, seed)
    saturated = _probe(fleet, tp, requests, options, rps=1e6, seed=seed)
    low, high = 0.0, saturated.completed / saturated.duration_s
    best: RunResult | None = None
    for _ in range(_STEPS):
        rate = (low + high) / 2
        result = _probe(fleet, tp, requests, options, rps=rate, seed=seed)
        if _sustained(result, promised):
            low, best = rate, result
        else:
            high = rate
    shown = best or saturated
    assert shown.e2e_s.p99 is not None
    return Capacity(
        tp=tp,
        max_rps=low,
        e2e_p99_s=shown.e2e_s.p99,
        tbt_p99_s=shown.tbt_s.p99 or 0.0,
        tokens_per_joule=shown.tokens_per_joule,
        rejected=rejected,
    )


def sample_requests(
    fleet: Fleet, tp: int, trace: Trace, options: Options, seed: int
) -> tuple[list[tuple[int, int, int]], float]:
    """(prompt, answer, max_tokens) of `REQUESTS` requests drawn from those of the trace that fit, and the share that
    does not.
    """
    limits = answer_limits(trace, fleet, options)
    blocks = -(-(trace.prompt_tokens + limits) // options.batching.block_tokens)
    spec = fleet.specs[tp]
    fits = np.flatnonzero((trace.prompt_tokens + limits <= spec.max_context_tokens) & (blocks <= spec.kv_blocks))
    if not fits.size:
        raise ValueError(f"no request of {trace.name} fits {fleet.model} at TP {tp} on {fleet.gpu}")
    chosen = np.random.default_rng([seed, tp]).choice(fits, REQUESTS)
    triples = zip(
        trace.prompt_tokens[chosen].tolist(), trace.output_tokens[chosen].tolist(), limits[chosen].tolist(), strict=True
    )
    return list(triples), 1.0 - fits.size / trace.requests


def answer_limits(trace: Trace, fleet: Fleet, options: Options) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """max_tokens of each request: what its client asks for, cut to the model's context as servers do.

    A request whose true answer does not fit keeps a limit that does not fit either, so that it is rejected.
    """
    asked = options.batching.max_tokens or 1 << int(trace.output_tokens.max() - 1).bit_length()
    context = fleet.specs[fleet.sizes[-1]].max_context_tokens
    return np.maximum(np.minimum(asked, context - trace.prompt_tokens), trace.output_tokens)


def _probe(
    fleet: Fleet, tp: int, triples: list[tuple[int, int, int]], options: Options, *, rps: float, seed: int
) -> RunResult:
    gaps_s = np.random.default_rng([seed, tp, 1]).exponential(1.0 / rps, len(triples))
    arrivals_s = (np.cumsum(gaps_s) - gaps_s[0]).tolist()
    slo = Slo()
    requests = [
        Request(id=i, arrival_s=at_s, prompt_tokens=prompt, output_tokens=answer, max_tokens=limit, slo=slo)
        for i, (at_s, (prompt, answer, limit)) in enumerate(zip(arrivals_s, triples, strict=True))
    ]
    controller = Controller(
        ControllerOptions(throttle=ThrottleOptions(policy=ClockPolicy.TOP), slo_aware=False, specs=fleet.specs)
    )
    recorder = Recorder(bin_s=max(1.0, arrivals_s[-1] / 100))
    machine = Machine(
        specs=fleet.specs, physics=fleet.physics, switch_latency_s=0.0, startup_w=0.0, gpus=tp, noise=options.noise
    )
    simulation = Simulation(controller, machine, recorder, seed=seed)
    simulation.run(requests, tp)
    return recorder.result(
        policy="triton",
        slo=slo,
        duration_s=simulation.now_s,
        energy_j=simulation.energy_j,
        idle_energy_j=simulation.idle_energy_j,
        lost=0,
        preemptions=simulation.preemptions,
    )


def _sustained(result: RunResult, promised: Slo) -> bool:
    kept = (
        (result.queue_s, LONGEST_QUEUE_S),
        (result.e2e_s, promised.e2e_s),
        (result.tpot_s, promised.tbt_s),
        (result.ttft_s, promised.ttft_s),
    )
    return all(limit is None or found.p99 is None or found.p99 <= limit for found, limit in kept)
