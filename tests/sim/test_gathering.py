"""Requests that can wait, in whole simulations: energy falls, and no SLO is violated that was met without."""

from dataclasses import replace

import numpy as np
import pytest
from core.toy import request, spec
from sim.toy_runs import simulate

from throttllem.core.clocks.policy import ClockPolicy, parse_policy
from throttllem.core.types import Slo
from throttllem.sim.own_policy import PolicyError, named_policy

SECONDS = 400.0
ROOMY = spec(kv_blocks=512, max_batch=64, max_context_tokens=512)
SLO = Slo(e2e_s=20.0, tbt_s=0.2)


def arrivals(slo, *, per_s=0.5, seed=3, first_id=0):
    draws = np.random.default_rng(seed)
    at_s = np.cumsum(draws.exponential(1.0 / per_s, int(SECONDS * per_s)))
    outputs = draws.integers(10, 60, at_s.size)
    return [
        request(first_id + key, 8, int(output), arrival_s=float(now_s), slo=slo)
        for key, (now_s, output) in enumerate(zip(at_s, outputs, strict=True))
    ]


def served(requests):
    return simulate(requests, ClockPolicy.LEAST_ENERGY, specs={1: ROOMY}, load_window_s=60.0)


def energy_j(run, end_s):
    """Up to one time, idle after the run's end."""
    return run.simulation.energy_j + (end_s - run.simulation.now_s) * 40.0


def test_gathering_saves_energy_and_meets_every_slo():
    plain = served(arrivals(SLO))
    gathered = served(arrivals(replace(SLO, batch=True)))
    end_s = max(run.simulation.now_s for run in (plain, gathered))
    above_idle = [energy_j(run, end_s) - 40.0 * end_s for run in (plain, gathered)]
    assert above_idle[1] < 0.85 * above_idle[0]
    assert gathered.result(SLO).slo.attainment == plain.result(SLO).slo.attainment == 1.0
    assert gathered.result(SLO).ttft_s.p50 > 10 * plain.result(SLO).ttft_s.p50


def test_requests_that_cannot_wait_are_served_as_if_there_were_no_others():
    """A few that can wait beside them: their first tokens come as fast, within a few iterations."""
    alone = served(arrivals(SLO))
    few = arrivals(replace(SLO, batch=True), per_s=0.1, seed=4, first_id=10_000)
    both = sorted([*arrivals(SLO), *few], key=lambda one: one.arrival_s)
    mixed = served(both)
    assert mixed.result(SLO).slo.attainment == 1.0

    def worst_s(run):
        return max(
            life.first_token_s - life.request.arrival_s for life in run.lives.values() if not life.request.slo.batch
        )

    assert worst_s(mixed) < worst_s(alone) + 0.5


def test_the_name_of_a_policy_that_gathers():
    clocks, sizes = (600, 1400), (1, 2)
    plain = parse_policy("least-energy+autoscale", clocks, sizes)
    found = named_policy("least-energy+autoscale+gather", clocks, sizes)
    assert found == replace(plain, name="least-energy+autoscale+gather", gathers=True)
    with pytest.raises(PolicyError, match="triton holds no request"):
        named_policy("triton+gather", clocks, sizes)
