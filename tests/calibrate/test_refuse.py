"""What is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from throttllem.calibrate.calibration import check, fit_points
from throttllem.calibrate.points import Point
from throttllem.calibrate.refuse import check_fit, check_held_out, percent
from throttllem.profiling.profile import ProfileError

from .synthetic import BATCHES, CLOCKS, LIKE, MODEL, measure

FILE = Path("p.csv")
GOOD = measure(LIKE)


def refused(points: list[Point]) -> str:
    with pytest.raises(ProfileError) as error:
        check([point._replace(row=row) for row, point in enumerate(points)], LIKE, MODEL, FILE)
    return str(error.value)


def test_good_points_pass_and_so_do_fifteen():
    check(GOOD, LIKE, MODEL, FILE)
    few = measure(LIKE, clocks=CLOCKS[::2], batches=(1, 8, 64), sizes=(1,))
    check([point for number, point in enumerate(few) if number % 12 in (0, 3, 5, 8, 11)], LIKE, MODEL, FILE)


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
    assert "(80 of 160 rows cannot be)" in found


def test_absurd_errors_are_told_in_few_words():
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
