import numpy as np
import pytest

from throttllem.calibrate.fit import Constant, fit, with_constants
from throttllem.calibrate.prior import CLOCK_POWER, CLOCK_TIME, around, priors
from throttllem.physics.catalogue import Catalogue, Gpu

GPU = Catalogue.load().gpu("a100-40gb-sxm")
HOST = Constant(path="time.host_s", start=1e-3, spread=1.0)
ROW = Constant(path="time.host_request_s", start=1e-5, spread=0.5)


def host_error(gpu: Gpu) -> np.ndarray:
    return np.log(gpu.time.host_s / np.array([3.9e-3, 4e-3, 4.1e-3])) / 0.01


def test_measurements_beat_the_prior_and_silence_leaves_it() -> None:
    found = fit(GPU, [HOST, ROW], host_error)
    host, row = found.constants
    assert host.value == pytest.approx(4e-3, rel=0.01)
    assert found.gpu.time.host_s == host.value
    assert host.determined
    assert host.error == pytest.approx(0.01 / 3**0.5, rel=0.01)
    assert row.value == pytest.approx(1e-5, rel=1e-6)
    assert not row.determined
    assert row.error == pytest.approx(0.5, rel=1e-6)


def test_bounds_hold() -> None:
    found = fit(GPU, [Constant(path="time.host_s", start=1e-3, spread=1.0, high=2e-3)], host_error)
    assert found.constants[0].value == pytest.approx(2e-3, rel=1e-3)


def test_one_wild_measurement_does_not_pull_a_robust_fit() -> None:
    def wild(gpu: Gpu) -> np.ndarray:
        return np.log(gpu.time.host_s / np.array([4e-3] * 20 + [1.0])) / 0.01

    assert fit(GPU, [HOST], wild, robust=True).gpu.time.host_s == pytest.approx(4e-3, rel=0.01)
    assert fit(GPU, [HOST], wild).gpu.time.host_s > 4.5e-3


def test_a_law_without_a_finite_result_is_an_error() -> None:
    with pytest.raises(ValueError, match="no finite time or power"):
        fit(GPU, [HOST], lambda _: np.array([np.nan]))


def test_constants_go_in_by_path() -> None:
    changed = with_constants(GPU, {"startup_s": 31.0, "power.core_w": 1.0, "power.knee_mhz": 2.0, "time.host_s": 3.0})
    assert (changed.startup_s, changed.power.core_w, changed.power.knee_mhz, changed.time.host_s) == (31, 1, 2, 3)
    assert changed.power.limit_w == GPU.power.limit_w
    assert GPU.power.core_w != 1.0


def test_every_prior_is_a_constant_within_its_bounds() -> None:
    for gpu in Catalogue.load().gpus.values():
        for path, constant in priors(gpu).items():
            law, _, name = path.partition(".")
            assert name in type(getattr(gpu, law)).model_fields
            assert constant.low <= constant.start <= constant.high


def test_a_known_gpu_moves_the_middles_only() -> None:
    paths = CLOCK_TIME + CLOCK_POWER
    for free, known in zip(around(GPU, paths), around(GPU, paths, GPU), strict=True):
        law, _, name = known.path.partition(".")
        assert (known.path, known.spread) == (free.path, free.spread)
        assert known.start == getattr(getattr(GPU, law), name)


def test_an_effect_that_a_gpu_lacks_is_not_fitted() -> None:
    without = with_constants(GPU, {"time.decode_walk_token_s": 0.0})
    paths = ("time.decode_walk_token_s", "time.host_s")
    assert [constant.path for constant in around(GPU, paths, without)] == ["time.host_s"]
