"""Speed, measured: one decision at several batch sizes, and virtual seconds per wall second. Run it with `make bench`.

Machines differ and are noisy: medians, p99 and ratios taken side by side in one run are what to quote.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import numpy as np

from throttllem.config import BatchingOptions
from throttllem.core.clocks.policy import ClockPolicy, ThrottleOptions, parse_policy
from throttllem.core.controller import Controller
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.options import ControllerOptions
from throttllem.core.types import Arrived, Cancelled, EngineReady, EngineSpec, Event, Request, Slo, Stepped, Timer
from throttllem.engines.simulated.fleet import build_fleet
from throttllem.option_sources import load_options
from throttllem.physics.catalogue import Catalogue
from throttllem.physics.engine import EnginePhysics
from throttllem.profiling.measure import ProfilePlan
from throttllem.profiling.tables import performance_tables, profile_fleet
from throttllem.profiling.train import Trained, train
from throttllem.sim.study import Study

SIZES = (32, 128, 256)
ROUNDS = 400
SLO = Slo(e2e_s=60.0, tbt_s=0.2)


def main() -> None:
    """Measure everything and print a table; `--json FILE` writes it too."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--seconds", type=float, default=3600.0, help="virtual seconds of the chat trace")
    chosen = arguments.parse_args()
    # Two more than are measured: a full batch would hold the newcomer back without a look at its future.
    batching = BatchingOptions(max_batch=max(SIZES) + 2)
    fleet = build_fleet(Catalogue.load(), "a100-40gb-sxm", "llama-2-13b", (4,), batching)
    cache = load_options().options.cache_dir.expanduser()
    table = performance_tables(fleet, cache, seed=0)[4]
    trained = train(profile_fleet(fleet, ProfilePlan()))
    results: dict[str, object] = {"clocks": len(fleet.clocks_mhz)}
    print(f"one decision: admission and clock, {len(fleet.clocks_mhz)} clocks, horizon to the last finish")
    for policy in (ClockPolicy.THROTTLLEM, ClockPolicy.LEAST_ENERGY):
        for count in SIZES:
            results[f"{policy.value}-{count}"] = report(policy, count, decisions(fleet.specs[4], table, policy, count))
    results["trees-128"] = trees(trained, 128)
    results["estimates"] = estimates()
    results["simulation"] = simulation(chosen.seconds, cache)
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1) + "\n")


def decisions(spec: EngineSpec, table: PerformanceTable, policy: ClockPolicy, count: int) -> tuple[list[float], int]:
    """Seconds from an arrival to the plan of the clock, `count` requests running; iterations to the last finish."""
    controller = Controller(
        ControllerOptions(throttle=ThrottleOptions(policy=policy), specs={spec.tp: spec}, tables={spec.tp: table})
    )
    handle(controller, EngineReady(engine=0, spec=spec), 0.0)
    rng = np.random.default_rng(0)
    lengths = [(int(rng.integers(50, 400)), int(rng.integers(100, 1000))) for _ in range(count + ROUNDS)]
    now_s, ended = 0.0, 16
    for index in range(-ended, 0):  # lengths are known, as in a real run
        handle(controller, Arrived(request=request(index, now_s, 200, 2)), now_s)
        handle(controller, Stepped(engine=0, iteration=2 * (index + ended), started=(index,)), now_s)
        handle(controller, Stepped(engine=0, iteration=2 * (index + ended) + 1, finished=(index,)), now_s)
        now_s += 0.1
    for index in range(count):
        handle(controller, Arrived(request=request(index, now_s, *lengths[index])), now_s)
        now_s += 0.05
        handle(controller, Stepped(engine=0, iteration=2 * ended + index, started=(index,)), now_s)
    running = controller.snapshot().engines[0].running
    assert running == count, f"{running} of {count} requests were admitted"
    taken: list[float] = []
    for index in range(count, count + ROUNDS):
        newcomer = Arrived(request=request(index, now_s, *lengths[index]))
        begin = time.perf_counter()
        handle(controller, newcomer, now_s)
        taken.append(time.perf_counter() - begin)
        handle(controller, Cancelled(request_id=index), now_s)
        now_s += 0.01  # a plan of the load is due now and then, as in a real run
    projection = controller.projection(0)
    assert projection is not None
    return taken, projection.horizon


def handle(controller: Controller, event: Event, now_s: float) -> None:
    """One event, and the timer that is needed at once after it: admission, then the clock."""
    controller.handle(event, now_s)
    if controller.next_deadline() == now_s:
        controller.handle(Timer(), now_s)


def request(index: int, now_s: float, prompt: int, answer: int) -> Request:
    """A request whose answer is known."""
    return Request(id=index, arrival_s=now_s, prompt_tokens=prompt, output_tokens=answer, max_tokens=1024, slo=SLO)


def report(policy: ClockPolicy, rows: int, measured: tuple[list[float], int]) -> dict[str, float]:
    """Print and return median and p99."""
    taken, horizon = measured
    median, p99 = statistics.median(taken), statistics.quantiles(taken, n=100)[98]
    print(
        f"  {policy.value:14} {rows:4} running: median {median * 1e3:6.3f} ms, p99 {p99 * 1e3:6.3f} ms, {horizon} its"
    )
    return {"median_s": median, "p99_s": p99, "horizon": horizon}


def trees(trained: Trained, rows: int) -> dict[str, float]:
    """The same horizon asked of the trees themselves, as a binary search over the clocks does: 7 times."""
    horizon = 1000
    batch = np.linspace(rows, 1, horizon).astype(int)
    points = np.stack([np.full(horizon, 4), batch, batch * 8, np.full(horizon, 1050), np.zeros(horizon)], axis=1)
    taken = []
    for _ in range(9):
        begin = time.perf_counter()
        for _ in range(7):
            trained.seconds.predict(points.astype(np.float64), num_threads=1)
        taken.append(time.perf_counter() - begin)
    median = statistics.median(taken)
    print(f"  the trees themselves, {horizon} iterations x 7 clocks of a binary search: median {median * 1e3:.1f} ms")
    return {"median_s": median}


def estimates() -> dict[str, float]:
    """Iterations per second that the physics answers for: decode alone, with a prompt, and above the power limit."""
    catalogue = Catalogue.load()
    gpu, model = catalogue.gpu("a100-40gb-sxm"), catalogue.model("llama-2-13b")
    engine = EnginePhysics(gpu, model, 4)
    tight = EnginePhysics(gpu.model_copy(update={"power": gpu.power.model_copy(update={"limit_w": 200.0})}), model, 4)
    rng = np.random.default_rng(0)
    clocks = rng.choice(gpu.clocks_mhz, 20_000).tolist()
    batches, prompts = rng.integers(1, 100, 20_000).tolist(), rng.integers(1, 2048, 20_000).tolist()
    decode = [(clock, batch, 1000 * batch, 0, 0.0) for clock, batch in zip(clocks, batches, strict=True)]
    mixed = [(*point[:3], prompt, prompt**2 / 2) for point, prompt in zip(decode, prompts, strict=True)]
    kinds = {"decode": (engine, decode), "mixed": (engine, mixed), "limited": (tight, mixed)}
    rates: dict[str, float] = {}
    for name, (physics, points) in kinds.items():
        taken = []
        for _ in range(5):
            begin = time.perf_counter()
            for point in points:
                physics.iteration(*point)
            taken.append(time.perf_counter() - begin)
        rates[name] = len(points) / statistics.median(taken)
    print("the physics: " + ", ".join(f"{name} {rate:,.0f} iterations/s" for name, rate in rates.items()))
    return rates


def simulation(seconds: float, cache: Path) -> dict[str, float]:
    """Virtual seconds per wall second on one core, a decision at every change."""
    study = Study(
        gpu="a100-40gb-sxm",
        model="llama-2-13b",
        sizes=(4,),
        trace=f"azure-conv-like:seconds={seconds:g}",
        policies=("triton", "throttllem", "least-energy"),
        peak_rps=None,
    )
    scenario, _ = study.prepare(Catalogue.load(), cache)
    results: dict[str, float] = {}
    print(f"simulation of {seconds:g} s of chat ({scenario.trace.requests} requests), one core")
    for name in study.policies:
        begin = time.perf_counter()
        run = scenario.run(parse_policy(name, scenario.fleet.clocks_mhz, scenario.fleet.sizes))
        results[name] = run.duration_s / (time.perf_counter() - begin)
        print(f"  {name:14} {results[name]:6.0f} virtual s per wall s")
    results["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {results['peak_memory_mib']:.0f} MiB")
    return results


if __name__ == "__main__":
    main()
