"""Measurements that are refused, with the reason, and those that are only suspicious."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from throttllem.calibrate.calibration import check, fit_points
from throttllem.calibrate.fit import Constant, Fitted
from throttllem.calibrate.points import Point
from throttllem.calibrate.validation import (
    check_fit,
    check_held_out,
    far_from_prior,
    fitted_before,
    fitted_to,
    percent,
    watts_of_one_gpu,
)
from throttllem.physics.engine import EnginePhysics
from throttllem.profiling.profile import ProfileError

from .synthetic import BATCHES, CATALOGUE, CLOCKS, LIKE, MODEL, changed_gpu, measure

FILE = Path("p.csv")
GOOD = measure(LIKE)
FEW = measure(LIKE, clocks=CLOCKS[::2], batches=(1, 8, 64), sizes=(1,))
SIZES = measure(LIKE, sizes=(1, 2, 4))
LAW_W = np.array([point.watts for point in SIZES])


def refused(points: list[Point]) -> str:
    with pytest.raises(ProfileError) as error:
        check([point._replace(row=row) for row, point in enumerate(points)], LIKE, MODEL, FILE)
    return str(error.value)


def test_good_points_pass_and_so_do_fifteen():
    check(GOOD, LIKE, MODEL, FILE)
    check([point for number, point in enumerate(FEW) if number % 12 in (0, 3, 5, 8, 11)], LIKE, MODEL, FILE)


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (measure(LIKE, clocks=CLOCKS[:2]), "p.csv: 2 of the 3 distinct clocks that a fit needs (405 and 660)"),
        (measure(LIKE, clocks=CLOCKS[:1]), "1 of the 3 distinct clocks that a fit needs (405)"),
        (measure(LIKE, batches=BATCHES[:1]), "1 of the 2 distinct batch sizes that a fit needs (1)"),
        (measure(LIKE, clocks=CLOCKS[:3], batches=(4, 8), sizes=(1,))[::2][:12], "12 rows are too few: a fit needs 3"),
        ([*measure(LIKE, batches=(4,)), *measure(LIKE, batches=(8,))[:4]], "2 groups of batch sizes"),
    ],
)  # fmt: skip
def test_too_few(points, words):
    assert words in refused(points)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"clock_mhz": 1425}, "p.csv, line 9: 1425 MHz, and a100-40gb-sxm runs at 210 to 1410 MHz"),
        ({"clock_mhz": 195}, "195 MHz"),
        ({"tp": 1, "watts": 490.0}, "line 9: 490 W, and the power limit of 1 x a100-40gb-sxm is 400 W"),
        ({"tp": 2, "watts": 90.0}, "90 W of all GPUs together, and 2 x a100-40gb-sxm draw 110 W idle"),
        ({"seconds": 2e4}, "20000 seconds, and an iteration takes"),
        ({"tp": 3}, "p.csv: tp 3: llama-3-8b has 32 heads, which 3 GPUs cannot share"),
        ({"tp": 1, "kv_tokens": 10**12}, "line 9: 1e+12 tokens in the KV cache, and the whole memory of 1 x a100"),
    ],
)
def test_what_this_gpu_cannot_do(changed, words):
    found = refused([*GOOD[:7], GOOD[7]._replace(**changed), *GOOD[8:]])
    assert words in found and "--like" in found


@pytest.mark.parametrize(("what", "factor"), [("seconds", 1.6), ("watts", 0.6)])
def test_one_point_measured_twice_far_apart(what, factor):
    again = GOOD[50]._replace(**{what: getattr(GOOD[50], what) * factor})
    found = refused([*GOOD, again])
    assert "line 52" in found and f"line {len(GOOD) + 2}" in found and f"{what}; scatter explains" in found
    check([*GOOD, GOOD[50]._replace(**{what: getattr(GOOD[50], what) * (1 + (factor - 1) / 4)})], LIKE, MODEL, FILE)


@pytest.mark.slow
def test_points_that_no_law_follows_are_named():
    """Every fourth row eight times as slow: each is possible, all together are not."""
    torn = [point._replace(seconds=point.seconds * (1 if point.row % 4 else 8)) for point in GOOD]
    with pytest.raises(
        ProfileError, match=r"(half|a tenth) of the seconds are off by \d+% .*worst: line \d+, line \d+"
    ):
        fit_points(torn, LIKE, MODEL, FILE)


def test_every_row_beyond_the_limit_is_counted():
    assert "line 2: 900 W" in (found := refused([p._replace(watts=900.0 * p.tp) for p in GOOD[:80]] + GOOD[80:]))
    assert "(80 of 160 rows are impossible)" in found


def test_absurd_errors_have_few_digits():
    with pytest.raises(ProfileError, match=r"half of the seconds are off by more than 1,000% \(allowed: 25%\)"):
        check_fit(GOOD, np.full((len(GOOD), 2), 1e97), FILE)
    assert (percent(1e97), percent(0.0312), percent(9.87, 0)) == ("more than 1,000%", "3.1%", "987%")


@pytest.mark.parametrize(("median", "p90"), [(0.22, 0.3), (0.1, 0.45)])
def test_held_out_watts_too_far_off(median, p90):
    relative = np.zeros((100, 2))
    relative[:60, 1], relative[60:, 1] = median, p90
    check_held_out("each clock", np.minimum(relative, 0.19), FILE)
    with pytest.raises(ProfileError, match=r"with each clock left out of the fit in turn, (half|a tenth) of the watts"):
        check_held_out("each clock", relative, FILE)


def test_one_batch_size_is_named_before_few_rows():
    assert "1 of the 2 distinct batch sizes" in refused(measure(LIKE, batches=(4,), sizes=(1,))[::4])


# ---- beside a similar GPU ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "factor", "words"),
    [
        ("seconds", 1000, "p.csv: seconds are about 1,000 times what a100-40gb-sxm takes: another unit?"),
        ("seconds", 1e-3, "seconds are about 1/1,000 of what a100-40gb-sxm takes"),
        ("seconds", 100, "seconds are about 100 times"),
        ("seconds", 1e250, "seconds are more than 1,000,000 times"),
        ("watts", 1000, "watts are about 1,000 times what a100-40gb-sxm draws"),
        ("watts", 1e-3, "watts are about 1/1,000 of what"),
    ],
)
def test_another_unit_is_named(what, factor, words):
    assert words in refused([point._replace(**{what: getattr(point, what) * factor}) for point in GOOD])


def test_a_gpu_eight_times_as_fast_passes():
    check([point._replace(seconds=point.seconds / 8) for point in GOOD], LIKE, MODEL, FILE)


def test_seconds_that_fall_with_the_clock():
    backwards = [point._replace(clock_mhz=CLOCKS[0] + CLOCKS[-1] - point.clock_mhz) for point in GOOD]
    assert "at tp 1 seconds fall as the clock falls (like clock^0." in refused(backwards)
    one_size = [point if point.tp == 1 else wrong for point, wrong in zip(GOOD, backwards, strict=True)]
    found = refused(one_size)
    assert "at tp 2 seconds fall" in found
    # The worst are rows of that size: the second half of the lines.
    lines = [int(part.split()[1].rstrip(",.")) for part in found.split("worst: ")[1].split(". ")[0].split(", ")]
    assert len(lines) == 5 and min(lines) > len(GOOD) // 2


def test_seconds_that_the_clock_does_not_move_are_no_contradiction():
    flat = [point._replace(seconds=law(point._replace(clock_mhz=1410))[0]) for point in GOOD]
    check(flat, LIKE, MODEL, FILE)


def test_watts_of_other_rows():
    for seed in range(12):
        watts = np.random.default_rng(seed).permutation([point.watts for point in FEW])
        found = refused([point._replace(watts=float(w)) for point, w in zip(FEW, watts, strict=True)])
        assert "watts do not rise with the clock" in found or "watts do not follow clock and work" in found


@pytest.mark.parametrize("points", [GOOD, FEW])
def test_watts_that_the_clock_does_not_move(points):
    words = "at tp 1 watts do not rise with the clock at equal work (like clock^"
    assert words in refused([point._replace(watts=200.0 * point.tp) for point in points])
    at_top = {(p.tp, p.batch, p.prefill_tokens > 0): p.watts for p in points}
    assert words in refused([p._replace(watts=at_top[p.tp, p.batch, p.prefill_tokens > 0]) for p in points])


def test_watts_that_fall_as_the_clock_rises():
    narrow = measure(LIKE, clocks=(405, 510, 660), sizes=(1,))
    fallen = [point._replace(watts=point.watts * (405 / point.clock_mhz) ** 0.6) for point in narrow]
    assert "watts do not rise" in refused(fallen)


@pytest.mark.parametrize("clocks", [(405, 900, 1410), (405, 510, 660), (900, 1200, 1410), (1290, 1350, 1410)])
@pytest.mark.parametrize("batches", [(1, 8), (1, 4, 24, 128), (64, 128)])
def test_correct_watts_pass(clocks, batches):
    """Of other GPUs too, with 5 % scatter, also where their watts hardly move."""
    for seed, gpu in enumerate([LIKE, changed_gpu(3)[0], CATALOGUE.gpus["a40-48gb"], CATALOGUE.gpus["h100-80gb-sxm"]]):
        coarse = gpu.model_copy(update={"clock_step_mhz": (gpu.clock_max_mhz - gpu.clock_min_mhz) // 5})
        points = measure(coarse, clocks=clocks, batches=batches, sizes=(1,), scatter=(0.03, 0.05), seed=seed)
        like = LIKE.model_copy(update={"power": LIKE.power.model_copy(update={"idle_w": 25.0, "limit_w": 700.0})})
        check(points, like, MODEL, FILE)


def law(point: Point) -> tuple[float, float]:
    return EnginePhysics(LIKE, MODEL, point.tp).iteration(*point.arguments)


# ---- warnings ------------------------------------------------------------------------------------------------------


def test_watts_of_one_gpu_are_recognised_by_size():
    assert list(watts_of_one_gpu(SIZES, LAW_W, "x")) == []
    halved = [point._replace(watts=point.watts / 2) if point.tp == 2 else point for point in SIZES]
    (said,) = watts_of_one_gpu(halved, LAW_W, "x")
    assert said == "at tp 2 the watts are 0.50 of what 2 x x draw: watts of one GPU?"
    assert len(list(watts_of_one_gpu([p._replace(watts=p.watts / p.tp) for p in SIZES], LAW_W, "x"))) == 2


def moved(spreads: float, error: float) -> Fitted:
    return Fitted(
        constant=Constant(path="power.core_w", start=200.0, spread=0.5),
        value=200.0 * math.exp(0.5 * spreads),
        error=error,
    )


def test_only_a_determined_constant_far_from_the_first_guess_is_far_from_prior():
    assert list(far_from_prior([moved(2.9, 0.1), moved(-2.9, 0.1), moved(-3.2, 0.4)], "x")) == []
    (said,) = far_from_prior([moved(-3.2, 0.1)], "x")
    assert said.startswith("power.core_w is 40.4, and 200 was expected of a GPU like x: 3.2 times the usual")


def test_a_first_guess_that_was_fitted_to_the_same_file():
    assert list(fitted_before(LIKE, "p.csv")) == []
    source = LIKE.power_basis.model_copy(update={"source": f"{fitted_to('p.csv')}, 160 rows"})
    like = LIKE.model_copy(update={"power_basis": source})
    (said,) = fitted_before(like, "p.csv")
    assert "was itself fitted to p.csv" in said and "--like" in said
    assert list(fitted_before(like, "p.cs")) == []
