"""Rivals on the toy engine: each serves all requests, below the maximum clock, and follows its parameter."""

import pytest
from sim.toy_runs import simulate, steady

from throttllem.arena.contenders import BEFOREHAND, KNOWN, RIVALS, field_of
from throttllem.arena.rivals.dynamo_llm import EPOCH_S
from throttllem.core.types import Slo

SLO = Slo(e2e_s=40.0, tbt_s=0.3, ttft_s=4.0)


def run(rival, value):
    own = rival.policy(value).own()
    return simulate(steady(2, 1.3 * EPOCH_S, slo=SLO), own=own).result(slo=SLO)


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.name)
def test_it_serves_below_the_maximum_clock(rival):
    top = simulate(steady(2, 1.3 * EPOCH_S, slo=SLO)).result(slo=SLO)
    for value in (min(rival.values), max(rival.values)):
        found = run(rival, value)
        assert found.completed == top.completed
        assert found.mean_clock_mhz <= top.mean_clock_mhz
        assert found.energy_j < 1.05 * top.energy_j


@pytest.mark.parametrize("name", ["power-cap", "eco-freq", "green-llm", "biscale"])
def test_its_parameter_moves_the_clock(name):
    """A tight share of the SLO, or a high cap, takes higher clocks than the other end."""
    rival = next(rival for rival in RIVALS if rival.name == name)
    ends = [run(rival, value).mean_clock_mhz for value in (0.02, 0.95)]
    assert ends[0] != ends[1]
    assert (ends[0] < ends[1]) == (name == "power-cap")


def test_each_has_a_value_set_beforehand():
    assert all(rival.beforehand in rival.values for rival in RIVALS)
    assert {rival.name + BEFOREHAND for rival in RIVALS} <= set(KNOWN)


def test_contenders_are_checked():
    def check(name):
        if name != "fixed:900":
            raise ValueError("unknown policy")

    assert field_of("static, fixed:900", check).plain == ("fixed:900",)
    assert field_of(None, check).names[0] == "triton"
    with pytest.raises(ValueError, match=r"--policies ecofreq: did you mean eco-freq"):
        field_of("ecofreq", check)
    with pytest.raises(ValueError, match="name one or more"):
        field_of(",", check)
