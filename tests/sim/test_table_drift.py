"""Engines that are slower than their table, in simulation: corrected, or at the maximum clock; healthy ones are not."""

import random

import pytest
from core.toy import TOP_MHZ, spec
from sim.toy_runs import simulate

from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.types import Reason, Request, SetClock, Slo
from throttllem.engines.simulated.engine import Noise

SLO = Slo(e2e_s=1.8, tbt_s=0.05)
SPECS = {1: spec(tp=1, kv_blocks=200, max_batch=16, prefill_budget_tokens=64, chunked=True)}


def requests(seed, seconds, slo):
    """Two a second on average."""
    dice, at_s, found = random.Random(seed), 0.0, []
    while (at_s := at_s + dice.expovariate(2.0)) < seconds:
        tokens = dice.randrange(20, 60)
        key, prompt = len(found), dice.randrange(4, 20)
        found.append(
            Request(id=key, arrival_s=at_s, prompt_tokens=prompt, max_tokens=tokens, output_tokens=tokens, slo=slo)
        )
    return found


def ran(slower, seed, seconds=30, slo=SLO):
    """The run, and what telemetry sees of its engine at the end."""
    noise = Noise(time=0.02, power=0.02)
    run = simulate(
        requests(seed, seconds, slo), ClockPolicy.LEAST_ENERGY, specs=SPECS, slower=slower, seed=seed, noise=noise
    )
    (engine,) = run.controller.snapshot().engines
    return run, engine


def violated(run):
    late = [life for life in run.lives.values() if life.ended_s - life.request.arrival_s > life.request.slo.e2e_s]
    return len(late) / len(run.lives)


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 30), marks=pytest.mark.slow)])
def test_a_healthy_engine_is_never_corrected(seeds):
    for seed in seeds:
        _, engine = ran(1.0, seed)
        assert any(band.metered_s > 3 for band in engine.table_drift)
        assert {band.factor for band in engine.table_drift} == {1.0}
        assert not engine.beyond_table


def test_an_engine_15_percent_slower_than_its_table_keeps_its_slos():
    run, engine = ran(1.15, seed=1)
    assert violated(run) == 0
    assert not engine.beyond_table
    assert all(1.08 < band.factor < 1.22 for band in engine.table_drift)
    assert min(plan.mhz for plan in planned(run)) < TOP_MHZ


def test_an_engine_three_times_slower_runs_at_the_maximum_clock_and_says_why():
    run, engine = ran(3.0, seed=1, slo=Slo(e2e_s=60.0))
    assert engine.beyond_table
    assert min(plan.mhz for plan in planned(run)) < TOP_MHZ
    assert (planned(run)[-1].mhz, planned(run)[-1].why) == (TOP_MHZ, Reason.TABLE_DRIFT)


def planned(run):
    """All clock commands."""
    return [command.plan for _, _, commands in run.log for command in commands if isinstance(command, SetClock)]
