"""The virtual-time driver: same seed same run, everybody ends, time and energy add up to what a hand can count."""

from collections import Counter
from itertools import pairwise

import pytest
from core.toy import TOP_MHZ, request
from hypothesis import given, settings
from hypothesis import strategies as st
from sim.toy_runs import FREED_W, GPUS, STARTUP_W, simulate, specs_of, steady

from throttllem.config import FaultOptions
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.lengths.prediction import Noisy
from throttllem.core.pool.pool import PoolOptions
from throttllem.core.types import (
    Arrived,
    ClockRead,
    Dispatch,
    EngineLost,
    EngineReady,
    Fail,
    Reason,
    Request,
    SetClock,
    Slo,
    StartEngine,
    StopEngine,
    Timer,
)
from throttllem.engines.simulated.engine import Noise

POLICIES = list(ClockPolicy)


def json_of(run):
    entry = run.result().to_json()
    del entry["decision_s"]
    return entry


@pytest.mark.parametrize("policy", POLICIES)
def test_same_seed_same_run(policy):
    def once(seed):
        return simulate(
            steady(8, 4), policy, seed=seed, noise=Noise(), scales=True, predictor=Noisy(p95_error=0.3, seed=seed)
        )

    first, again, other = once(5), once(5), once(6)
    assert json_of(first) == json_of(again)
    assert first.log == again.log
    assert json_of(first) != json_of(other)


def test_two_requests_by_hand():
    run = simulate([request(1, 4, 2, arrival_s=1.0), request(2, 4, 2, arrival_s=3.0)])
    # Prompt of 4: 5 + 8 + 4*0.3 = 14.2 ms at 40 + 260*0.6 = 196 W. One row with 5 tokens (1.25 blocks):
    # 5 + 8 + 0.5 + 0.125 = 13.625 ms at 40 + 260*0.65 = 209 W.
    prompt_s, decode_s = 0.0142, 0.013625
    busy_s, busy_j = prompt_s + decode_s, prompt_s * 196 + decode_s * 209
    for key, at_s in ((1, 1.0), (2, 3.0)):
        life = run.lives[key]
        assert (life.begun_s, life.first_token_s) == (at_s, pytest.approx(at_s + prompt_s))
        assert life.ended_s == pytest.approx(at_s + busy_s)
        assert life.energy_j == pytest.approx(busy_j)
    assert run.simulation.now_s == pytest.approx(3.0 + busy_s)
    assert run.simulation.idle_energy_j == pytest.approx(40.0 * (1.0 + 2.0 - busy_s))
    assert run.simulation.energy_j == pytest.approx(2 * busy_j + 40.0 * (3.0 - busy_s))
    result = run.result()
    assert sum(result.series.power_w) * 0.5 == pytest.approx(run.simulation.energy_j)
    assert (result.mean_clock_mhz, result.clock_switches) == (TOP_MHZ, 0)


def test_no_requests_no_time():
    run = simulate([])
    assert (run.simulation.now_s, run.simulation.energy_j) == (0.0, 0.0)
    assert run.result().requests == 0


def test_counted_freed_gpus():
    plain, counted = (simulate(steady(4, 3), freed_w=watts) for watts in (None, FREED_W))
    more_j = FREED_W * (GPUS - 1) * plain.simulation.now_s
    assert counted.simulation.energy_j == pytest.approx(plain.simulation.energy_j + more_j)
    assert counted.simulation.idle_energy_j == pytest.approx(plain.simulation.idle_energy_j + more_j)


@pytest.mark.parametrize("latency_s", [0.0, 0.03])
def test_a_switch_is_in_force_after_its_latency(latency_s):
    tight = steady(10, 3, slo=Slo(e2e_s=0.42))
    run = simulate(tight, ClockPolicy.THROTTLLEM, switch_latency_s=latency_s)
    asked = [(now_s, c.plan.mhz) for now_s, _, out in run.log for c in out if isinstance(c, SetClock)]
    read = [(now_s, event.mhz) for now_s, event, _ in run.log if isinstance(event, ClockRead)]
    assert len({mhz for _, mhz in asked}) > 2 and run.recorder.switches == len(asked)
    assert read == [(pytest.approx(at_s + latency_s), mhz) for at_s, mhz in asked][: len(read)]
    # The engine is busy from the first arrival on, so its iterations follow each other: the first one that begins
    # after the first switch is in force is the first to run at the new clock.
    began_s = 0.0
    for mhz, seconds, _ in run.physics[1].log:
        if began_s > read[0][0]:
            assert mhz == read[0][1]
            return
        assert mhz == TOP_MHZ
        began_s += seconds


def test_a_timer_is_never_early_and_arrivals_are_on_time():
    run = simulate(steady(6, 3), ClockPolicy.LEAST_ENERGY, scales=True)
    assert [now_s for now_s, _, _ in run.log] == sorted(now_s for now_s, _, _ in run.log)
    assert all(now_s == event.request.arrival_s for now_s, event, _ in run.log if isinstance(event, Arrived))
    assert any(isinstance(event, Timer) for _, event, _ in run.log)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_overload_ends_and_is_reported(policy):
    run = simulate(steady(150, 2, answer=30), policy, queue_limit=40)
    result = run.result(Slo(e2e_s=2.0, tbt_s=0.1))
    assert result.completed + result.rejected == result.requests == 300
    assert sum(result.rejections.values()) == result.rejected
    assert 0 < result.slo.attainment < 0.6
    if policy in {ClockPolicy.THROTTLLEM, ClockPolicy.LEAST_ENERGY}:
        assert result.rejections.keys() == {Reason.QUEUE_FULL}
        assert result.lost > 0
        assert max(result.series.queue) == 40
    else:
        assert result.rejected == 0


def test_what_never_fits_is_rejected_and_the_rest_served():
    requests = steady(4, 2)
    requests[3] = request(3, 300, 10, arrival_s=requests[3].arrival_s)
    result = simulate(requests, ClockPolicy.THROTTLLEM).result()
    assert (result.completed, result.rejections) == (7, {Reason.NEVER_FITS_CONTEXT: 1})


@pytest.mark.parametrize("policy", [ClockPolicy.THROTTLLEM, ClockPolicy.LEAST_ENERGY])
@pytest.mark.parametrize("span_s", [3.0, 20.0])
def test_with_exact_lengths_the_projection_is_what_happens(policy, span_s):
    """Whole prompts, no preemption: batch and KV blocks of every iteration, whatever arrives in between."""
    crowd = [
        Request(
            id=n,
            arrival_s=0.37 * n * n % span_s,
            prompt_tokens=1 + 7 * n % 19,
            max_tokens=30,
            slo=Slo(),
            output_tokens=1 + 11 * n % 29,
        )
        for n in range(60)
    ]
    result = simulate(sorted(crowd, key=lambda r: r.arrival_s), policy).result()
    assert result.completed == 60 and max(result.series.queue) > 0
    assert (result.projection_error.batch, result.projection_error.kv) == (0.0, 0.0)


def scaled(**changes):
    """Little, much, little."""
    waves = [(0.0, 1.0, 6), (1.0, 8.0, 40), (8.0, 1.0, 8)]
    requests = [
        Request(
            id=100 * w + n,
            arrival_s=start_s + n / rate,
            prompt_tokens=12,
            max_tokens=40,
            slo=Slo(e2e_s=4.0),
            output_tokens=30,
        )
        for w, (start_s, rate, count) in enumerate(waves)
        for n in range(count)
    ]
    return simulate(sorted(requests, key=lambda r: r.arrival_s), ClockPolicy.THROTTLLEM, scales=True, **changes)


def test_engines_start_late_and_stop_empty():
    run = scaled()
    started = {c.engine: now_s for now_s, _, out in run.log for c in out if isinstance(c, StartEngine)}
    ready = {event.engine: now_s for now_s, event, _ in run.log if isinstance(event, EngineReady)}
    stopped = [c.engine for _, _, out in run.log for c in out if isinstance(c, StopEngine)]
    assert len(started) >= 2 and len(stopped) >= 2
    for engine, at_s in ready.items():
        assert at_s == pytest.approx(started.get(engine, -1.0) + 1.0)
    result = run.result()
    assert [tp for _, tp in result.sizes][:3] == [1, 2, 1]
    assert result.completed == 54
    # The series falls back to one GPU when the larger engine is gone.
    assert (max(tp for tp in result.series.tp if tp), result.series.tp[-1]) == (3, 1)


def counted_by_hand(run, freed_w):
    """Energy of all GPUs from iterations, and the times at which engines start, are ready and stop."""
    end_s = run.simulation.now_s
    events = [(now_s, event) for now_s, event, _ in run.log if isinstance(event, EngineReady)]
    commands = [(now_s, c) for now_s, _, out in run.log for c in out if isinstance(c, StartEngine | StopEngine)]
    tps = {event.engine: event.spec.tp for _, event in events} | {
        c.engine: c.tp for _, c in commands if isinstance(c, StartEngine)
    }
    ready = {event.engine: now_s for now_s, event in events}
    started = {c.engine: now_s for now_s, c in commands if isinstance(c, StartEngine)}
    stopped = {c.engine: now_s for now_s, c in commands if isinstance(c, StopEngine)}
    iterations = [step for physics in run.physics.values() for step in physics.log]
    total_j = sum(seconds * watts for _, seconds, watts in iterations)
    idle_j = taken_gpu_s = 0.0
    for engine, tp in tps.items():
        up_s = stopped.get(engine, end_s) - ready[engine] if engine in ready else 0.0
        starting_s = ready.get(engine, end_s) - started[engine] if engine in started else 0.0
        idle_j += up_s * 40.0 * tp + starting_s * STARTUP_W * tp
        taken_gpu_s += (up_s + starting_s) * tp
    for tp, physics in run.physics.items():
        idle_j -= sum(seconds for _, seconds, _ in physics.log) * 40.0 * tp
    if freed_w is not None:
        idle_j += freed_w * (GPUS * end_s - taken_gpu_s)
    return total_j + idle_j, idle_j


@pytest.mark.parametrize("freed_w", [None, FREED_W])
def test_energy_of_starting_running_draining_and_freed_gpus(freed_w):
    run = scaled(freed_w=freed_w)
    total_j, idle_j = counted_by_hand(run, freed_w)
    assert run.simulation.energy_j == pytest.approx(total_j, rel=1e-9)
    assert run.simulation.idle_energy_j == pytest.approx(idle_j, rel=1e-9)


requests = st.lists(
    st.tuples(st.floats(0.0, 0.6), st.integers(1, 60), st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=40
)


@settings(max_examples=30)
@given(
    requests,
    st.sampled_from(POLICIES),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, FREED_W]),
    st.integers(0, 99),
)
def test_energy_is_that_of_the_requests_and_of_idling(trace, policy, chunked, no_evict, scales, freed_w, seed):
    arrival_s, made = 0.0, []
    for key, (gap_s, prompt, answer, spare) in enumerate(trace):
        arrival_s += gap_s
        made.append(
            request(key, prompt, answer, max_tokens=answer + spare, arrival_s=arrival_s, slo=Slo(e2e_s=3.0, tbt_s=0.08))
        )
    run = simulate(
        made,
        policy,
        scales=scales,
        seed=seed,
        noise=Noise(),
        freed_w=freed_w,
        predictor=Noisy(p95_error=0.9, seed=seed),
        specs=specs_of(chunked=chunked, no_evict=no_evict),
    )
    assert_energy_adds_up(run)


def assert_energy_adds_up(run):
    result = run.result()
    of_requests_j = sum(life.energy_j for life in run.lives.values())
    assert run.simulation.energy_j == pytest.approx(of_requests_j + run.simulation.idle_energy_j, rel=1e-9)
    assert result.completed + result.rejected == result.requests == len(run.lives)
    assert all((life.energy_j > 0) == (life.ended_s is not None) for life in run.lives.values())
    assert sum(result.series.power_w) * 0.5 == pytest.approx(run.simulation.energy_j, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("scales", [False, True])
def test_energy_adds_up_while_rows_are_thrown_out(scales):
    crowd = steady(12, 2, prompt=30, answer=60)
    run = simulate(crowd, scales=scales, noise=Noise(), specs=specs_of(no_evict=False))
    assert run.simulation.preemptions > 0
    assert_energy_adds_up(run)


def test_a_pool_shares_the_requests_and_counts_its_free_gpus():
    slo = Slo(e2e_s=5.0)
    pool = PoolOptions(gpus=5, engines={1: 2, 2: 1})
    run = simulate(steady(30, 4, slo=slo), ClockPolicy.LEAST_ENERGY, tp=2, pool=pool, freed_w=FREED_W)
    given = Counter(out.engine for *_, commands in run.log for out in commands if isinstance(out, Dispatch))
    assert len(given) == 3
    assert given[0] > max(given[1], given[2]) > 15, "the larger one gets more"
    result = run.result()
    assert result.completed == 120
    assert result.engines == [(0.0, {1: 2, 2: 1})]
    assert set(result.series.tp) == {4}
    assert sum(result.series.power_w) * 0.5 == pytest.approx(run.simulation.energy_j)
    without = simulate(steady(30, 4, slo=slo), ClockPolicy.LEAST_ENERGY, tp=2, pool=pool)
    assert run.simulation.energy_j == pytest.approx(without.simulation.energy_j + FREED_W * run.simulation.now_s)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_pool_of_one_engine_runs_as_an_engine_alone(policy):
    def commands(pool):
        return [out for *_, out in simulate(steady(6, 5), policy, pool=pool, noise=Noise()).log]

    assert commands(PoolOptions(gpus=1, engines={1: 1})) == commands(None)


def test_fewer_engines_that_are_busier_take_less_energy():
    """Eight requests a second on one, two or four engines of four GPUs."""
    energies = []
    for engines in (1, 2, 4):
        pool = PoolOptions(gpus=4, engines={1: engines})
        run = simulate(steady(8, 20, slo=Slo(e2e_s=5.0)), ClockPolicy.LEAST_ENERGY, pool=pool, freed_w=FREED_W)
        assert run.result().completed == 160
        energies.append(run.simulation.energy_j)
    assert energies == sorted(energies)


FAULTY = PoolOptions(gpus=6, engines={1: 6})


def faulty(**changes):
    requests = steady(30, 60, slo=Slo(e2e_s=5.0))
    run = simulate(requests, ClockPolicy.LEAST_ENERGY, pool=FAULTY, freed_w=FREED_W, faults=FaultOptions(**changes))
    result = run.result()
    assert len(run.lives) == len(requests) == result.completed + sum(result.rejections.values())
    assert sum(result.series.power_w) * 0.5 == pytest.approx(run.simulation.energy_j)
    return run, result


def test_a_lost_host_fails_only_what_ran_on_it_and_its_engines_are_started_elsewhere():
    run, result = faulty(gpus_per_host=3, host_mtbf_s=40.0, host_repair_s=5.0)
    on, lost = {}, []
    for _, event, commands in run.log:
        failed = {out.request_id for out in commands if isinstance(out, Fail)}
        if isinstance(event, EngineLost):
            lost.append(event.engine)
            assert failed == {request for request, engine in on.items() if engine == event.engine}
        else:
            assert not failed
        on |= {out.request_id: out.engine for out in commands if isinstance(out, Dispatch)}
        for ended in (*getattr(event, "finished", ()), *failed):
            del on[ended]
    assert len(lost) >= 3
    assert result.rejections.keys() == {Reason.ENGINE_LOST}
    counts = [sum(engines.values()) for _, engines in result.engines]
    assert min(counts) <= 3
    assert any(later > before for before, later in pairwise(counts)), "repaired, and taken into use"


def test_starts_that_fail_or_hang_are_repeated_and_hold_nothing_up():
    _, result = faulty(gpus_per_host=1, host_mtbf_s=60.0, host_repair_s=0.0, failed_starts=0.4, hung_starts=0.3)
    counts = [sum(engines.values()) for _, engines in result.engines]
    assert min(counts) < 6
    assert any(later > before for before, later in pairwise(counts)), "some starts succeed"
    assert result.completed > 1000


def test_faults_follow_from_the_seed():
    first, again = (faulty(gpus_per_host=3, host_mtbf_s=40.0, failed_starts=0.3)[0].log for _ in range(2))
    assert first == again
