"""Savings with intervals, and the targets: each is met by figures that meet it, and not by others."""

import math

import pytest
from arena.made import CELLS, entry, outcome
from scipy.stats import t

from throttllem.arena.outcome import best
from throttllem.arena.results.standings import (
    _student_95,
    least,
    online,
    saving,
    share_of_reference,
    shortfall,
    targets,
)


def judged(entries):
    return [target.met for target in targets(entries)]


def test_a_mean_is_over_cells_and_its_interval_over_seeds():
    entries = [
        entry(CELLS[0], 1, static=60.0),
        entry(CELLS[0], 2, static=64.0),
        entry(CELLS[1], 1, static=80.0),
        entry(CELLS[1], 2, static=84.0),
    ]
    found = saving(entries, "static")
    assert found.value == pytest.approx(0.28)
    # The variance between two seeds is 0.0008; two cells, two seeds each, two degrees of freedom.
    assert found.half_width == pytest.approx(4.303 * math.sqrt(0.0008 * (1 / 2 + 1 / 2)) / 2)
    assert saving(entries[:1], "static").half_width is None


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 20, 42, 1000])
def test_quantiles_of_student(freedom):
    assert _student_95(freedom) == pytest.approx(t.ppf(0.975, freedom), rel=0.01)


def test_hindsight_takes_the_least_energy_that_meets_the_slos():
    baseline = outcome(100.0, 0.95)
    late, fine, dear = outcome(50.0, 0.94), outcome(60.0, 0.945), outcome(70.0, 0.96)
    assert best([late, fine, dear], baseline) is fine
    assert best([late, outcome(40.0, 0.9)], baseline) is late


def test_the_least_is_among_those_that_meet_the_slos():
    seeds = [entry(least_energy=60.0, static=55.0, eco_freq=(50.0, 0.9))]
    assert least(seeds, ["least-energy", "static", "eco-freq"]) == "static"
    assert least(seeds, ["eco-freq"]) == "triton"
    assert shortfall(seeds, "eco-freq").value == pytest.approx(0.1)


def test_what_is_chosen_in_hindsight_cannot_be_deployed():
    names = ("triton", "least-energy", "static", "static-yesterday", "agft", "agft-beforehand", "sched", "mine:Policy")
    assert online(names) == ("triton", "least-energy", "static-yesterday", "agft-beforehand", "mine:Policy")


GOOD = {"least_energy": 62.0, "static": 63.0, "sched": 60.0, "least_energy+gather": 56.0, "sched+hold": 50.0}


def good(**changes):
    return [entry(cell, **GOOD | changes) for cell in CELLS]


def test_targets_that_are_met():
    assert judged(good()) == [True, True, True, True, True, True]
    assert share_of_reference(good(), "least-energy", "sched") == pytest.approx(38 / 40)


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"sched": 58.0}, 0),
        ({"static": (60.9, 0.5)}, 1),
        ({"least_energy": (62.0, 0.994)}, 2),
        ({"throttllem": 61.0}, 3),
        ({"throttllem": 61.0}, 4),
        ({"least_energy+gather": 58.0}, 5),
    ],
)
def test_targets_that_are_missed(changes, missed):
    assert judged(good(**changes))[missed] is False


def test_targets_without_their_contenders_are_not_judged():
    assert judged([entry(least_energy=60.0)]) == [None, None, True, True, True, None]
    assert targets([entry(static=60.0)]) == []
