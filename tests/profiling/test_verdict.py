"""The verdict on a table: which measurements and which scores are named, and the words for each."""

from dataclasses import replace

import polars as pl
import pytest

from throttllem.config import BatchingOptions
from throttllem.engines.simulated.fleet import build_fleet
from throttllem.physics.catalogue import Catalogue
from throttllem.profiling.measure import ProfilePlan, profile_engine
from throttllem.profiling.score import Score, ScoreCard
from throttllem.profiling.tables import profile_fleet
from throttllem.profiling.train import TrainSettings
from throttllem.profiling.verdict import judge

CATALOGUE = Catalogue.load(None)
FLEET = build_fleet(CATALOGUE, "a100-40gb-sxm", "llama-2-13b", (4,), BatchingOptions())
PROFILE = profile_fleet(FLEET, ProfilePlan(rows=300))


def score(split="random 90/10", **changes):
    good = Score(split=split, tp=4, rows=30, r2=0.99, mae_ips=1.0, mape_seconds=0.03, mape_watts=0.02)
    return replace(good, **changes)


def verdict(profile=PROFILE, *scores, accept=False):
    card = ScoreCard(gpu="", model="", rows=300, settings=TrainSettings(), scores=scores or (score(),))
    return judge(profile, card, FLEET.physics[4], accept=accept)


def times(column, factor):
    return PROFILE.with_columns(pl.col(column) * factor)


def test_a_simulated_engine_of_any_kind_is_within_physics():
    assert verdict().faults == ()
    for gpu in ("a40-48gb", "h200-141gb-sxm", "l4-24gb"):
        fleet = build_fleet(CATALOGUE, gpu, "llama-3-8b", (1,), BatchingOptions())
        card = ScoreCard(gpu="", model="", rows=300, settings=TrainSettings(), scores=(score(tp=1),))
        assert judge(profile_fleet(fleet, ProfilePlan(rows=150)), card, fleet.physics[1], accept=False).faults == ()


@pytest.mark.parametrize(
    ("column", "factor", "words"),
    [
        ("seconds", 1e3, "column seconds looks like milliseconds .*: divide it by 1000"),
        ("seconds", 1e6, "column seconds looks like microseconds .*: divide it by 1e\\+06"),
        ("watts", 1e3, "column watts looks like milliwatts .*: divide it by 1000"),
        ("watts", 1e-3, "column watts looks like kilowatts .*: multiply it by 1000"),
        ("watts", 0.25, "column watts looks like the watts of one of 4 GPUs"),
        ("watts", 2.0, "watts are above the power limit of 4 x a100-40gb-sxm, 1600 W"),
        ("watts", 0.05, "watts are below half of what 4 x a100-40gb-sxm draw idle, 331 W"),
        ("seconds", 0.25, "faster than memory bandwidth and peak of llama-2-13b on 4 x a100-40gb-sxm allow"),
        ("seconds", 5.0, "iterations take [567] times as long as"),
        ("watts", 0.5, "watts are 0.[45]. times those of llama-2-13b on 4 x a100-40gb-sxm by physics"),
        ("seconds", 20.0, "iterations take 2[0-9] times as long as llama-2-13b on 4 x a100-40gb-sxm would need"),
    ],
)
def test_measurements_that_cannot_be(column, factor, words):
    found = verdict(times(column, factor))
    assert not found.sound
    (fault,) = found.faults
    assert pl.Series([fault]).str.contains(words)[0], fault


@pytest.mark.parametrize(
    ("column", "factor", "doubt"), [("seconds", 2.5, "a slow engine"), ("watts", 0.65, "check the")]
)
def test_what_is_odd_and_may_be_right_refuses_nothing(column, factor, doubt):
    found = verdict(times(column, factor))
    assert found.sound and not found.faults
    assert doubt in found.doubts[0]
    assert verdict().doubts == ()


def test_a_profile_says_whether_the_engine_speculated():
    plain, fast = (PROFILE.with_columns(tokens_per_step=pl.lit(rate)) for rate in (1.0, 2.5))
    assert [verdict(each).tokens_per_step for each in (PROFILE, plain, fast)] == [None, 1.0, 2.5]
    assert [verdict(each).doubts for each in (PROFILE, plain)] == [(), ()]
    assert "the engine speculated in the profile (2.5 tokens a step)" in verdict(fast).doubts[0]


def test_clocks_that_were_not_in_force():
    """All rows at the maximum clock, whatever their column says."""
    spec = replace(FLEET.specs[4], clocks_mhz=(1410,))
    top = profile_engine(FLEET.physics[4], spec, ProfilePlan(rows=300))
    said = top.with_columns(clock_mhz=1410 - 15 * (pl.int_range(pl.len()) % 81))
    seconds, watts = verdict(said).faults
    assert "seconds do not rise at low clocks" in seconds
    assert "watts do not fall at low clocks" in watts
    assert verdict(said.with_columns(any_clock=pl.lit(1))).faults == (), "seconds of all clocks claim no effect of them"
    assert verdict(top).faults == ()


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pl.lit(900.0).alias("watts"), "watts never change (900 W in all rows)"),
        (
            pl.col("clock_mhz").clip(upper_bound=1005),
            "highest clock of the profile is 1005 MHz, and a100-40gb-sxm goes up",
        ),
        (pl.col("clock_mhz") * 1000, "column clock_mhz holds 210000 to 1410000, and a100-40gb-sxm has 210 to 1410 MHz"),
    ],
)
def test_columns_that_no_gpu_gives(column, words):
    assert any(words in fault for fault in verdict(PROFILE.with_columns(column)).faults)


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ((score(mape_seconds=0.49),), "seconds are 49% off on average"),
        ((score(r2=0.65),), "R2 of 0.65"),
        ((score(), score("batch sizes left out", mape_watts=0.2)), "with batch sizes left out, watts are 20% off"),
        ((score("clocks left out", mape_seconds=0.3),), "seconds are 30% off"),
        ((score("top fifth of KV left out"),), "no rows could be held out"),
    ],
)
def test_a_model_that_does_not_predict(scores, words):
    (fault,) = verdict(PROFILE, *scores).faults
    assert words in fault


def test_a_few_clocks_are_no_evidence_of_a_gap_that_the_table_does_not_have():
    few = PROFILE.filter(pl.col("clock_mhz") % 150 == 60)
    assert few["clock_mhz"].n_unique() == 9
    assert verdict(few, score(), score("clocks left out", mape_seconds=0.3)).faults == ()


def test_the_user_overrules_and_the_faults_stay_known():
    found = verdict(times("watts", 1e3), accept=True)
    assert (found.sound, found.accepted, len(found.faults)) == (True, True, 1)
    assert not verdict(accept=True).accepted


def test_the_errors_are_those_of_the_worst_split():
    found = verdict(PROFILE, score(), score("batch sizes left out", mape_seconds=0.07, mape_watts=0.01))
    assert (found.seconds_error, found.watts_error) == (0.07, 0.02)
