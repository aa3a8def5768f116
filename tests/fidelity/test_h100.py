"""The H100 under load: what the simulator says against what was measured, and the fit against its own simulations."""

from dataclasses import replace

import numpy as np
import pytest

from throttllem.calibrate.fit import with_constants
from throttllem.physics.catalogue import Catalogue
from throttllem.physics.engine import EnginePhysics
from tools.fidelity.h100_load import left_out
from tools.fidelity.load_fit import fit_load, with_gpu
from tools.fidelity.load_runs import GPU, MODEL, LoadPoint, mean_power_w, read_points, settle, simulate
from tools.testbed.report import DATA

pytestmark = pytest.mark.slow

CATALOGUE = Catalogue.load()
MEASURED = pytest.mark.skipif(not DATA.is_dir(), reason="the reference data (../shared/data) is not here")


def point(tp: int, clock_mhz: int, requests_per_s: float) -> LoadPoint:
    return LoadPoint(
        tp=tp, clock_mhz=clock_mhz, requests_per_s=requests_per_s, power_w=1.0, ttft_p99_s=1.0, tpot_p99_s=1.0
    )


def measured(catalogue: Catalogue, at: LoadPoint) -> LoadPoint:
    """What that catalogue's simulator says, as if it had been measured."""
    served = simulate(catalogue, at, requests=300, seeds=(7,))
    return replace(at, power_w=served.power_w, ttft_p99_s=served.ttft_p99_s, tpot_p99_s=served.tpot_p99_s)


def test_groups_hold_every_point_once() -> None:
    points = [point(tp, clock, 1.0) for tp in (4, 8) for clock in (1380, 780)]
    assert left_out(points, lambda each: each.clock_mhz) == [(1, 3), (0, 2)]
    assert left_out(points, lambda each: each.tp) == [(0, 1), (2, 3)]


@pytest.mark.parametrize(("at", "idle"), [(point(4, 780, 0.5), 0.2), (point(8, 1380, 7.0), 0.0)])
def test_the_law_over_a_run_gives_the_watts_of_the_run(at: LoadPoint, idle: float) -> None:
    engine = EnginePhysics(CATALOGUE.gpu(GPU), CATALOGUE.model(MODEL), at.tp)
    served = simulate(CATALOGUE, at, requests=600, seeds=(0,))
    assert mean_power_w(engine, at, served) == pytest.approx(served.power_w, rel=0.01)
    assert served.idle == pytest.approx(idle, abs=0.05)


def test_more_load_takes_longer_in_the_simulator_and_in_its_shadow() -> None:
    engine = EnginePhysics(CATALOGUE.gpu(GPU), CATALOGUE.model(MODEL), 8)
    low, high = point(8, 1380, 2.0), point(8, 1380, 8.0)
    runs = [simulate(CATALOGUE, at, requests=600, seeds=(0,)) for at in (low, high)]
    shadows = [settle(engine, at) for at in (low, high)]
    simulated = runs[1].tpot_p99_s / runs[0].tpot_p99_s
    assert simulated > 1.3
    assert shadows[1][0] / shadows[0][0] == pytest.approx(simulated, rel=0.4)


def test_an_overloaded_engine_has_a_finite_shadow() -> None:
    engine = EnginePhysics(CATALOGUE.gpu(GPU), CATALOGUE.model(MODEL), 4)
    assert all(np.isfinite(settle(engine, point(4, 780, 50.0))))


def test_a_fit_foretells_a_clock_between_those_that_it_saw() -> None:
    """Another GPU's loads at two clocks, simulated; its watts and p99 TPOT at a third and at another rate."""
    changes = {"time.memory_knee_mhz": 1400.0, "power.core_w": 500.0, "power.compute_w": 500.0}
    other = with_gpu(CATALOGUE, with_constants(CATALOGUE.gpu(GPU), changes))
    seen = [measured(other, point(8, clock, rate)) for clock in (780, 1830) for rate in (1.0, 3.0)]
    asked = measured(other, point(8, 1380, 4.0))
    fitted = fit_load(CATALOGUE, seen, requests=100)
    told = measured(with_gpu(CATALOGUE, fitted.gpu), asked)
    assert told.power_w == pytest.approx(asked.power_w, rel=0.15)
    assert told.tpot_p99_s == pytest.approx(asked.tpot_p99_s, rel=0.15)
    assert set(fitted.values) >= {"time.memory_knee_mhz", "power.core_w", "power.knee_mhz", "power.ceiling_mhz"}


@MEASURED
def test_the_shipped_catalogue_serves_as_was_measured() -> None:
    """Every fourth measured load; short runs, so the bounds on p99 are wide."""
    points = read_points(DATA)
    assert len(points) == 47
    some = points[::4]
    served = [simulate(CATALOGUE, at, requests=600, seeds=(0,)) for at in some]
    found = np.array([[each.power_w, each.tpot_p99_s, each.ttft_p99_s] for each in served])
    truth = np.array([[at.power_w, at.tpot_p99_s, at.ttft_p99_s] for at in some])
    medians = np.median(np.abs(found / truth - 1), axis=0)
    print(f"H100 under load: watts {medians[0]:.1%}, p99 TPOT {medians[1]:.1%}, p99 TTFT {medians[2]:.1%}")
    assert medians[0] < 0.04
    assert medians[1] < 0.08
    assert medians[2] < 0.15
