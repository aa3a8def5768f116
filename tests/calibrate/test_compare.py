"""What is seen beside a GPU like it, before any fit: units, columns of other rows, watts without a clock."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from throttllem.calibrate.calibration import check
from throttllem.calibrate.points import Point
from throttllem.physics.engine import EnginePhysics
from throttllem.profiling.profile import ProfileError

from .synthetic import CATALOGUE, CLOCKS, LIKE, MODEL, changed_gpu, measure

FILE = Path("p.csv")
GOOD = measure(LIKE)
FEW = measure(LIKE, clocks=CLOCKS[::2], batches=(1, 8, 64), sizes=(1,))


def refused(points: list[Point]) -> str:
    with pytest.raises(ProfileError) as error:
        check([point._replace(row=row) for row, point in enumerate(points)], LIKE, MODEL, FILE)
    return str(error.value)


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
def test_another_unit(what, factor, words):
    assert words in refused([point._replace(**{what: getattr(point, what) * factor}) for point in GOOD])


def test_a_gpu_eight_times_as_fast_has_no_other_unit():
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
def test_honest_watts_pass(clocks, batches):
    """Of other GPUs too, with 5 % scatter, also where their watts hardly move."""
    for seed, gpu in enumerate([LIKE, changed_gpu(3)[0], CATALOGUE.gpus["a40-48gb"], CATALOGUE.gpus["h100-80gb-sxm"]]):
        coarse = gpu.model_copy(update={"clock_step_mhz": (gpu.clock_max_mhz - gpu.clock_min_mhz) // 5})
        points = measure(coarse, clocks=clocks, batches=batches, sizes=(1,), scatter=(0.03, 0.05), seed=seed)
        like = LIKE.model_copy(update={"power": LIKE.power.model_copy(update={"idle_w": 25.0, "limit_w": 700.0})})
        check(points, like, MODEL, FILE)


def law(point: Point) -> tuple[float, float]:
    return EnginePhysics(LIKE, MODEL, point.tp).iteration(*point.asked)
