"""How much load an engine sustains, and how slow it is then (the paper: maximum load and E2E SLO of each engine).

Knows nothing of policies. Results are cached under a digest of everything that they depend on.
"""

# The method. Requests with a trace's lengths arrive as a Poisson process at one rate; the engine runs at its maximum
# clock, first come, first served. A rate is sustained while 99 of 100 requests wait at most LONGEST_QUEUE_S for a place
# in the batch and meet the SLOs given. Bisection between zero and the saturated throughput finds the highest such rate
# to 1 / 2^_STEPS of the latter. The engine's E2E SLO is then its own p99 at that rate.

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from throttllem.config import Options
from throttllem.core.clocks.policy import ClockPolicy, ThrottleOptions
from throttllem.core.controller import Controller
from throttllem.core.options import ControllerOptions
from throttllem.core.types import Request, Slo
from throttllem.engines.simulated.fleet import Fleet
from throttllem.files import ensure_writable_dir, write_aside
from throttllem.profiling.tables import Progress, digest
from throttllem.sim.driver import Machine, Simulation
from throttllem.sim.recorder import Recorder
from throttllem.sim.result import RunResult
from throttllem.sim.traces.trace import Trace

Tokens = NDArray[np.int64]

REQUESTS = 2000
"""Requests of one probe."""
LONGEST_QUEUE_S = 1.0
_STEPS = 7
METHOD = {"requests": REQUESTS, "longest_queue_s": LONGEST_QUEUE_S, "steps": _STEPS}
"""What a cached characterisation depends on besides its inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """One engine's characterisation: sustained requests/s, and E2E and TBT p99 at the maximum clock under that load."""

    tp: int
    max_rps: float
    e2e_p99_s: float
    tbt_p99_s: float
    tokens_per_joule: float
    rejected: float
    """Fraction of the trace's requests that the engine can never hold; they are left out."""


def capacities(
    fleet: Fleet,
    trace: Trace,
    options: Options,
    cache_dir: Path,
    *,
    seed: int,
    slo: Slo,
    progress: Progress = lambda *_: None,
) -> dict[int, Capacity]:
    """Every engine size, the largest first. Where `slo` has no E2E, the E2E p99 of the largest is the others' SLO."""
    found: dict[int, Capacity] = {}
    for done, tp in enumerate(reversed(fleet.sizes)):
        progress("characterising", done / len(fleet.sizes))
        if found and slo.e2e_s is None:
            slo = replace(slo, e2e_s=found[fleet.sizes[-1]].e2e_p99_s)
        found[tp] = _cached(fleet, tp, trace, options, cache_dir, seed=seed, slo=slo)
    progress("characterising", 1.0)
    return found


def _cached(fleet: Fleet, tp: int, trace: Trace, options: Options, cache_dir: Path, *, seed: int, slo: Slo) -> Capacity:
    alone = replace(fleet, specs={tp: fleet.specs[tp]}, physics={tp: fleet.physics[tp]})
    inputs = {
        "engines": alone.fingerprint(),
        "gpu": fleet.gpu,
        "model": fleet.model,
        "trace": trace.name,
        "lengths": trace.summary.lengths_sha256,
        "engine": asdict(options.batching),
        "noise": asdict(options.noise),
        "method": METHOD,
        "seed": seed,
        "slo": {name: getattr(slo, name) for name in ("e2e_s", "tbt_s", "ttft_s")},
    }
    file = ensure_writable_dir(cache_dir) / f"capacity-{digest(inputs)}.json"
    try:
        return Capacity(**json.loads(file.read_text())["capacity"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        capacity = characterize(fleet, tp, trace, options, seed=seed, slo=slo)
    with write_aside(file) as aside:
        aside.write_text(json.dumps({"inputs": inputs, "capacity": asdict(capacity)}, indent=1))
    return capacity


def characterize(fleet: Fleet, tp: int, trace: Trace, options: Options, *, seed: int, slo: Slo) -> Capacity:
    """One engine's maximum load: 99 of 100 requests meet `slo`.

    `max_rps` 0: no load meets it; the p99 figures are then those at the highest load that keeps the queue short. Raises
    ValueError if no request of the trace fits the engine.
    """
    found = _bisect(fleet, tp, trace, options, seed=seed, slo=slo)
    if found.max_rps == 0.0 and (slo.e2e_s or slo.tbt_s or slo.ttft_s):
        found = replace(_bisect(fleet, tp, trace, options, seed=seed, slo=Slo()), max_rps=0.0)
    return found


def _bisect(fleet: Fleet, tp: int, trace: Trace, options: Options, *, seed: int, slo: Slo) -> Capacity:
    requests, rejected = sample_requests(fleet, tp, trace, options, seed)
    saturated = _probe(fleet, tp, requests, options, rps=1e6, seed=seed)
    low, high = 0.0, saturated.completed / saturated.duration_s
    best: RunResult | None = None
    for _ in range(_STEPS):
        rate = (low + high) / 2
        result = _probe(fleet, tp, requests, options, rps=rate, seed=seed)
        if _sustained(result, slo):
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
    """(prompt, output, max_tokens) of `REQUESTS` requests drawn from those of the trace that fit the engine, and the
    fraction that does not fit.
    """
    fitting = sum(columns[0].size for columns in _fitting(fleet, tp, trace, options))
    if not fitting:
        raise ValueError(f"no request of {trace.name} fits {fleet.model} at TP {tp} on {fleet.gpu}")
    drawn = np.random.default_rng([seed, tp]).integers(0, fitting, REQUESTS)
    chosen = np.empty((REQUESTS, 3), np.int64)
    first = 0
    for columns in _fitting(fleet, tp, trace, options):
        here = (drawn >= first) & (drawn < first + columns[0].size)
        chosen[here] = np.stack(columns, axis=1)[drawn[here] - first]
        first += columns[0].size
    return [(prompt, output, limit) for prompt, output, limit in chosen.tolist()], 1.0 - fitting / trace.requests


def _fitting(fleet: Fleet, tp: int, trace: Trace, options: Options) -> Iterator[tuple[Tokens, Tokens, Tokens]]:
    """Prompt, output and max_tokens of the requests that fit the engine, block by block."""
    spec = fleet.specs[tp]
    for _, prompt, output, limit in limited(trace, fleet, options):
        blocks = -(-(prompt + limit) // spec.block_tokens)
        fits = (prompt + limit <= spec.max_context_tokens) & (blocks <= spec.kv_blocks)
        yield prompt[fits], output[fits], limit[fits]


def limited(
    trace: Trace, fleet: Fleet, options: Options
) -> Iterator[tuple[NDArray[np.float64], Tokens, Tokens, Tokens]]:
    """Arrival, prompt, output and max_tokens of the trace's requests, block by block.

    max_tokens is the client's limit, cut to the model's context as servers do. A request whose output does not fit
    keeps a limit that does not fit either, so that it is rejected.
    """
    limit = options.batching.max_tokens or 1 << (trace.summary.longest_output_tokens - 1).bit_length()
    context = fleet.specs[fleet.sizes[-1]].max_context_tokens
    for arrival_s, prompt, output in trace.blocks():
        yield arrival_s, prompt, output, np.maximum(np.minimum(limit, context - prompt), output)


def _probe(
    fleet: Fleet, tp: int, lengths: list[tuple[int, int, int]], options: Options, *, rps: float, seed: int
) -> RunResult:
    """One run at the maximum clock under a Poisson load."""
    gaps_s = np.random.default_rng([seed, tp, 1]).exponential(1.0 / rps, len(lengths))
    arrivals_s = (np.cumsum(gaps_s) - gaps_s[0]).tolist()
    slo = Slo()
    requests = [
        Request(id=i, arrival_s=at_s, prompt_tokens=prompt, output_tokens=output, max_tokens=limit, slo=slo)
        for i, (at_s, (prompt, output, limit)) in enumerate(zip(arrivals_s, lengths, strict=True))
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


def _sustained(result: RunResult, slo: Slo) -> bool:
    limits = (
        (result.queue_s, LONGEST_QUEUE_S),
        (result.e2e_s, slo.e2e_s),
        (result.tpot_s, slo.tbt_s),
        (result.ttft_s, slo.ttft_s),
    )
    return all(limit is None or found.p99 is None or found.p99 <= limit for found, limit in limits)
