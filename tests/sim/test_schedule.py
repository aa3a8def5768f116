"""A schedule of clocks on one engine: the same as a simulation to the bit, from any point on, and in any order."""

from dataclasses import replace

import numpy as np
import pytest
from core.toy import table
from hypothesis import given, settings
from hypothesis import strategies as st

from throttllem.config import BatchingOptions, Noise
from throttllem.core.clocks.policy import ClockPolicy, ThrottleOptions
from throttllem.core.clocks.savings_estimate import SavingsEstimate
from throttllem.core.controller import Controller
from throttllem.core.lengths.prediction import Noisy
from throttllem.core.options import ControllerOptions
from throttllem.core.types import Request, Slo, Stepped
from throttllem.engines.simulated.fleet import build_fleet
from throttllem.physics.catalogue import Catalogue
from throttllem.sim.driver import Machine, Simulation
from throttllem.sim.recorder import Recorder
from throttllem.sim.schedule import Requests, ScheduledEngine

GPU, MODEL = "a100-40gb-sxm", "llama-3-8b"
LATENCY_S, MHZ, TOP_MHZ = 0.2, 810, 1410
NOISE = Noise(time=0.02, power=0.03)
SMALL = {"kv_blocks": 220, "max_batch": 24, "prefill_budget_tokens": 700}
"""An engine that queues, preempts and cuts prompts under the load below."""


def run_schedule(spec, physics, requests, clocks, *, seed, noise, release_s=None):
    """One run from beginning to end."""
    engine = ScheduledEngine(spec, physics, requests, seed=seed, noise=noise)
    return engine.run(engine.begin(), clocks, release_s=release_s)


def engine_of(engine="vllm", **changes):
    fleet = build_fleet(Catalogue.load(None), GPU, MODEL, (1,), BatchingOptions(engine=engine))
    spec = fleet.specs[1]
    return type(spec)(**{name: changes.get(name, getattr(spec, name)) for name in spec.__slots__}), fleet.physics[1]


def load(count=120, rate=4.0, seed=3):
    draw = np.random.default_rng(seed)
    output = draw.integers(1, 120, count)
    return Requests(
        arrival_s=np.cumsum(draw.exponential(1 / rate, count)),
        prompt_tokens=draw.integers(1, 900, count),
        output_tokens=output,
        max_tokens=output + draw.integers(0, 60, count),
    )


def requests_of(requests, slo):
    columns = (requests.arrival_s, requests.prompt_tokens, requests.output_tokens, requests.max_tokens)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [
        Request(id=n, arrival_s=at_s, prompt_tokens=prompt, output_tokens=output, max_tokens=most, slo=slo)
        for n, (at_s, prompt, output, most) in enumerate(rows)
    ]


def simulated(spec, physics, requests, *, watch=None, seed=5):
    """The same load under `fixed:810`, whose clock is in force after the latency of the switch."""
    throttle = ThrottleOptions(policy=ClockPolicy.FIXED, fixed_mhz=MHZ, switch_latency_s=LATENCY_S)
    controller = Controller(ControllerOptions(throttle=throttle, slo_aware=False, specs={1: spec}))
    machine = Machine(
        specs={1: spec}, physics={1: physics}, switch_latency_s=LATENCY_S, startup_w=0.0, gpus=1, noise=NOISE
    )
    recorder = Recorder(bin_s=1.0, keep_lives=True)
    simulation = Simulation(controller, machine, recorder, seed=seed, watch=watch)
    simulation.run(requests_of(requests, Slo()), 1)
    return simulation, recorder


FIXED = ((0.0, TOP_MHZ), (LATENCY_S, MHZ))
ENGINES = [
    ("vllm", {}),
    ("vllm", SMALL),
    ("tensorrt-llm", SMALL | {"kv_blocks": 120}),
    ("sglang", SMALL | {"kv_blocks": 4000}),
]


@pytest.mark.parametrize(("name", "changes"), ENGINES)
def test_it_is_a_simulation_of_the_same_clock_to_the_bit(name, changes):
    spec, physics = engine_of(name, **changes)
    requests = load()
    held = run_schedule(spec, physics, requests, FIXED, seed=5, noise=NOISE)
    simulation, recorder = simulated(spec, physics, requests)
    lives = [recorder.lives[number] for number in range(requests.arrival_s.size)]
    assert held.ended_s.tolist() == [life.ended_s for life in lives]
    assert held.first_token_s.tolist() == [life.first_token_s for life in lives]
    assert (held.energy_j, held.idle_j) == (simulation.energy_j, simulation.idle_energy_j)
    assert held.now_s == simulation.now_s
    assert int(held.batch.counts["preemptions"][0]) == simulation.preemptions
    assert simulation.preemptions > 0 or "kv_blocks" not in changes or spec.no_evict


@pytest.mark.parametrize(("name", "changes"), ENGINES)
def test_many_iterations_at_once_are_those_one_by_one(name, changes):
    """A watch sees every iteration, so a simulation with one steps them one by one."""
    spec, physics = engine_of(name, **changes)
    stepped = []
    (single, alone), (whole, together) = (
        simulated(spec, physics, load(), watch=watch) for watch in (lambda *call: stepped.append(call), None)
    )
    assert (single.now_s, single.energy_j) == (whole.now_s, whole.energy_j)
    for life in alone.lives.values():
        assert life == together.lives[life.request.id]
    figures = [
        recorder.result(policy="", slo=Slo(), duration_s=1.0, energy_j=1.0, idle_energy_j=0.0, lost=0, preemptions=0)
        for recorder in (alone, together)
    ]
    assert figures[0].series == figures[1].series and figures[0].tbt_s == figures[1].tbt_s
    assert figures[0].busy_s_by_mhz == figures[1].busy_s_by_mhz
    assert len(stepped) > sum(figures[0].distributions.tbt_counts) / spec.max_batch


clocks = st.lists(st.sampled_from((210, 600, 810, 1095, 1410)), min_size=1, max_size=12)


@settings(max_examples=30)
@given(clocks, clocks, st.floats(0.0, 40.0), st.booleans())
def test_a_run_continues_from_any_point_as_if_it_had_not_stopped(before, after, at_s, held_back):
    spec, physics = engine_of("vllm", **SMALL)
    requests = load(60)
    release_s = np.ceil(requests.arrival_s / 4) * 4 if held_back else None
    engine = ScheduledEngine(spec, physics, requests, seed=1, noise=NOISE)
    schedule = [(3.0 * n, mhz) for n, mhz in enumerate(before)]
    whole = engine.run(engine.begin(), schedule, release_s=release_s)
    part = engine.run(engine.begin(), schedule, until_s=at_s, release_s=release_s)
    branch = part.copy()
    engine.run(branch, [(0.0, mhz) for mhz in after[:1]], release_s=release_s)
    engine.run(part, schedule, release_s=release_s)
    for one, other in ((whole.ended_s, part.ended_s), (whole.first_token_s, part.first_token_s)):
        assert np.array_equal(one, other)
    assert (whole.energy_j, whole.now_s, whole.iterations) == (part.energy_j, part.now_s, part.iterations)
    early = whole.ended_s < at_s
    assert np.array_equal(branch.ended_s[early], whole.ended_s[early]) and not np.isnan(branch.ended_s).any()


def test_held_requests_start_no_earlier_than_their_release():
    spec, physics = engine_of()
    requests = load(40)
    release_s = np.ceil(requests.arrival_s / 5) * 5
    release_s[3] = 30.0
    held = run_schedule(spec, physics, requests, ((0.0, 1410),), seed=1, noise=NOISE, release_s=release_s)
    assert (held.first_token_s > release_s).all()
    free = run_schedule(spec, physics, requests, ((0.0, 1410),), seed=1, noise=NOISE)
    assert held.idle_j > free.idle_j and held.first_token_s[3] > 30.0


def test_what_never_fits_is_left_out():
    spec, physics = engine_of("vllm", **SMALL)
    requests = load(5)
    requests.max_tokens[2] = 16 * 220
    held = run_schedule(spec, physics, requests, ((0.0, 1410),), seed=1, noise=NOISE)
    assert np.flatnonzero(np.isnan(held.ended_s)).tolist() == [2]


@pytest.mark.parametrize("policy", [ClockPolicy.THROTTLLEM, ClockPolicy.LEAST_ENERGY])
def test_the_core_decides_the_same_if_it_hears_of_the_last_of_many_iterations(policy):
    """Lengths are mispredicted, so sequences outgrow their prediction in between."""
    spec, physics = engine_of("vllm", **SMALL | {"clocks_mhz": (600, 810, 1005, 1200, 1410)})
    toy = table(spec, kv_step=20, prefill_step=512, max_prefill_tokens=4096)

    def run(watch):
        options = ControllerOptions(
            throttle=ThrottleOptions(policy=policy, switch_latency_s=LATENCY_S),
            predictor=Noisy(p95_error=0.4, seed=2),
            specs={1: spec},
            tables={1: toy},
        )
        machine = Machine(
            specs={1: spec}, physics={1: physics}, switch_latency_s=LATENCY_S, startup_w=0.0, gpus=1, noise=NOISE
        )
        recorder = Recorder(bin_s=1.0, estimate=SavingsEstimate(table=toy, spec=spec))
        simulation = Simulation(Controller(options), machine, recorder, seed=3, watch=watch)
        simulation.run(requests_of(load(80, rate=2.0), Slo(e2e_s=5.0, tbt_s=0.1)), 1)
        found = recorder.result(
            policy="", slo=Slo(), duration_s=1.0, energy_j=1.0, idle_energy_j=0.0, lost=0, preemptions=0
        )
        return simulation.now_s, simulation.energy_j, replace(found, decision_s=None)

    events = []
    one_by_one = run(lambda now_s, event, commands: events.append(event))
    assert run(None) == one_by_one
    assert one_by_one[2].clock_switches > 1 and sum(isinstance(event, Stepped) for event in events) > 1000
