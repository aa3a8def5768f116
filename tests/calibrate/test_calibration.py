"""A GPU with changed constants comes back out of noisy measurements of it, and what was never measured is predicted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from throttllem.calibrate import calibration
from throttllem.calibrate.calibration import calibrate_points, fit_points
from throttllem.calibrate.errors import Errors
from throttllem.calibrate.fit import Fit, with_constants
from throttllem.calibrate.points import Point
from throttllem.calibrate.prior import priors
from throttllem.physics.catalogue import Gpu
from throttllem.profiling.profile import ProfileError

from .synthetic import BATCHES, CLOCKS, LIKE, MODEL, changed_gpu, measure, truth_errors

pytestmark = pytest.mark.slow

FILE = Path("new.csv")


@pytest.fixture(scope="module")
def known() -> tuple[Gpu, dict[str, float]]:
    return changed_gpu(4)


@pytest.fixture(scope="module")
def found(known: tuple[Gpu, dict[str, float]]) -> Fit:
    return fit_points(measure(known[0]), LIKE, MODEL, FILE)[1]


def test_clocks_batches_and_contexts_that_were_never_measured(found, known):
    assert np.median(np.abs(truth_errors(LIKE, known[0], measure(known[0])))) > 0.06
    away = measure(known[0], clocks=(510, 705, 1020, 1320), batches=(2, 9, 30, 90), scatter=(0.0, 0.0), seed=5)
    assert np.abs(truth_errors(found.gpu, known[0], away)).max(axis=0) == pytest.approx([0.0, 0.0], abs=0.05)


def test_determined_constants_come_back_within_their_uncertainty(found, known):
    determined = [one for one in found.constants if one.determined]
    assert len(determined) >= 10
    off = [abs(np.log(one.value / known[1][one.constant.path])) / one.error for one in determined]
    assert np.mean(np.array(off) < 2) >= 0.9
    assert max(off) < 3.5


def test_constants_that_the_profile_does_not_determine_are_those_of_like(known):
    alone = [point for point in measure(known[0], sizes=(1,)) if not point.prefill_tokens]
    _, found = fit_points(alone, LIKE, MODEL, FILE)
    moved = {one.constant.path for one in found.constants}
    untold = {path for path in priors(LIKE) if "allreduce" in path or "prefill" in path}
    assert len(untold) >= 6 and not untold & moved
    for path in untold:
        name = path.removeprefix("time.")
        assert getattr(found.gpu.time, name) == getattr(LIKE.time, name)
    assert found.gpu.power.limit_w == LIKE.power.limit_w and "time.gemm_bandwidth_fraction" in moved


def test_held_out_errors_are_little_more_than_the_scatter(known):
    found = calibrate_points(measure(known[0], clocks=CLOCKS[::2], batches=(4, 24)), LIKE, MODEL, FILE)
    assert [score.held_out for score in found.scores] == ["nothing", "each clock", "each batch size", "each tp"]
    own = found.scores[0]
    for score in found.scores:
        assert score.seconds.count == score.watts.count == found.rows
        # Half of a normal scatter lies within 0.67 standard deviations, of 3 % in time and 4 % in power.
        # With a size left out, nothing tells how its GPUs are joined.
        assert 0.01 < score.seconds.median < (0.06 if score.held_out == "each tp" else 0.035)
        assert 0.019 < score.watts.median < 0.045
        assert score.seconds.mean >= own.seconds.mean and score.watts.mean >= own.watts.mean


def test_the_scatter_is_learnt_and_sets_the_uncertainty(known):
    fits = [
        fit_points(measure(known[0], sizes=(1,), repeats=3, scatter=scatter), LIKE, MODEL, FILE)
        for scatter in ((0.08, 0.06), (0.015, 0.02))
    ]
    assert fits[0][0].scatter == pytest.approx((0.08, 0.06), rel=0.25)
    assert fits[1][0].scatter == pytest.approx((0.015, 0.02), rel=0.25)
    doubt = [{one.constant.path: one.error for one in found.constants} for _, found in fits]
    for path in ("time.gemm_norm", "time.decode_bandwidth_fraction", "power.static_w"):
        assert doubt[0][path] > 2 * doubt[1][path]


def test_a_knee_is_known_no_better_than_the_clocks_around_it():
    """The watts of this GPU bend at 1,313 MHz, between 1,155 and 1,410: no row shows where."""
    gpu, moved = changed_gpu(6)
    _, found = fit_points(measure(gpu), LIKE, MODEL, FILE)
    (knee,) = (one for one in found.constants if one.constant.path == "power.knee_mhz")
    assert abs(np.log(knee.value / moved["power.knee_mhz"])) < 2 * knee.error
    assert knee.error >= 255 / 2 / knee.value


def test_three_clocks_tell_the_others(known):
    """The errors are printed (pytest -s): docs/calibrate.md quotes them."""
    hidden = (510, 660, 795, 1020, 1155, 1290)
    _, found = fit_points(measure(known[0], clocks=CLOCKS[::2], repeats=2), LIKE, MODEL, FILE)
    print("\nall but three clocks held out: median, p90, worst of seconds and of watts against the noiseless truth")
    for clock in hidden:
        relative = truth_errors(found.gpu, known[0], measure(known[0], clocks=(clock,), scatter=(0.0, 0.0)))
        both = [Errors.of(relative[:, column]) for column in (0, 1)]
        print(f"{clock} MHz", *(f"{one.median:.1%} {one.p90:.1%} {one.worst:.1%}" for one in both), sep="   ")
        assert both[0].p90 < 0.04 and both[1].p90 < 0.1


def test_same_points_same_constants_and_progress(known):
    points = measure(known[0], clocks=CLOCKS[::2], batches=BATCHES[1:3], sizes=(1,))
    steps: list[tuple[int, int]] = []
    first, again = (
        calibrate_points(points, LIKE, MODEL, FILE, lambda done, total: steps.append((done, total))) for _ in "ab"
    )
    assert first == again
    half = steps[: len(steps) // 2]
    assert [done for done, _ in half] == sorted(done for done, _ in half) and half[-1][0] == half[-1][1]


def test_static_watts_that_the_first_guess_lacks_are_found(known):
    """The H100's entry has none: idle_w holds them. The GPU measured here has 130 W or more."""
    without = with_constants(LIKE, {"power.static_w": 0.0})
    _, found = fit_points(measure(known[0], sizes=(1,)), without, MODEL, FILE)
    (static,) = (one for one in found.constants if one.constant.path == "power.static_w")
    assert static.constant.start == priors(LIKE)["power.static_w"].start
    assert abs(np.log(static.value / known[1]["power.static_w"])) < 3 * static.error


def test_a_fit_that_does_not_converge_is_the_profiles_error(known, monkeypatch):
    def stuck(*_: object, **__: object) -> Fit:
        raise ValueError("the fit did not converge in 9 steps")

    monkeypatch.setattr(calibration, "fit", stuck)
    with pytest.raises(ProfileError, match=r"^new.csv: the fit did not converge in 9 steps. Remove rows .*--like"):
        calibrate_points(measure(known[0], sizes=(1,)), LIKE, MODEL, FILE)


def test_folds_that_say_nothing_of_what_was_left_out_are_refused(monkeypatch, known):
    points = measure(known[0], clocks=CLOCKS[::2], batches=BATCHES[1:3], scatter=(0.0, 0.0))
    monkeypatch.setattr(calibration, "fit_points", lambda *_: (Stuck(), Fit(gpu=known[0], constants=())))
    with pytest.raises(ProfileError, match=r"with each clock left out of the fit in turn, half of the seconds are off"):
        calibrate_points(points, LIKE, MODEL, FILE)


class Stuck:
    """A task whose folds find a GPU that is three times too slow."""

    def fit(self, points: list[Point], most: int) -> Fit:
        slow = LIKE.model_copy(update={"bandwidth_bytes_per_s": LIKE.bandwidth_bytes_per_s / 3})
        return Fit(gpu=slow, constants=())


def test_a_memory_knee_that_starts_below_all_clocks_is_found():
    true = with_constants(LIKE, {"time.memory_knee_mhz": 1150.0})
    low = with_constants(LIKE, {"time.memory_knee_mhz": 450.0})
    points = measure(true, clocks=(960, 1110, 1260, 1410), sizes=(1,), seed=3)
    _, best = fit_points(points, low, MODEL, Path("p.csv"))
    assert best.gpu.time.memory_knee_mhz == pytest.approx(1150, rel=0.05)
