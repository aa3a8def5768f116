"""What a clock and a power limit make of a kernel; on the data itself where that is at hand."""

import math

import pytest
from matplotlib.figure import Figure

from throttllem.physics.catalogue import Catalogue
from throttllem.physics.clock import clock_scale
from tools.fidelity.a100_fit import GPU
from tools.fidelity.kernel_law import COMPUTE, MEMORY, Kernel, KernelRow, describe, freest, predict, unheld
from tools.fidelity.kernels import section
from tools.fidelity.section import Section
from tools.testbed.report import DATA

pytestmark = pytest.mark.slow

CATALOGUE = Catalogue.load()
A100 = CATALOGUE.gpu(GPU)
KERNELS = {
    MEMORY: Kernel(name=MEMORY, base_w=100.0, slope_w=120.0, top_s=22.0),
    COMPUTE: Kernel(name=COMPUTE, base_w=60.0, slope_w=235.0, top_s=12.0),
}
CLOCKS, LIMITS = (1005, 1200, 1410), (150.0, 200.0, 300.0)
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the reference data (../shared/data) is not here")


def runs() -> list[KernelRow]:
    """Both kernels as the law has them."""
    points = [(kernel, clock, limit) for kernel in KERNELS.values() for clock in CLOCKS for limit in LIMITS]
    made = [(*point, *predict(A100, *point)) for point in points]
    return [
        KernelRow(kernel=kernel.name, clock_mhz=clock, limit_w=limit, time_s=time_s, power_w=power_w)
        for kernel, clock, limit, time_s, power_w in made
    ]


def test_without_a_limit_watts_are_base_and_slope() -> None:
    kernel = KERNELS[COMPUTE]
    assert predict(A100, kernel, 1410, math.inf) == pytest.approx((12.0, 295.0))
    scale = clock_scale(A100.time, A100.power, 1005, 1410)
    expected = (12.0 * scale.compute, 60.0 + 235.0 * scale.switching)
    assert predict(A100, kernel, 1005, math.inf) == pytest.approx(expected)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_a_limit_holds_the_watts_and_costs_time(kernel: Kernel) -> None:
    free_s, free_w = predict(A100, kernel, 1410, 400)
    held_s, held_w = predict(A100, kernel, 1410, 150)
    assert held_w == 150 < free_w
    assert held_s > free_s
    assert predict(A100, kernel, 1200, 150) == (held_s, held_w)  # whatever clock above it was asked for
    assert predict(A100, kernel, 705, 150) == predict(A100, kernel, 705, math.inf)


def test_a_kernel_comes_back_from_its_runs() -> None:
    for name, kernel in KERNELS.items():
        found = describe(A100, runs(), name)
        assert (found.base_w, found.slope_w, found.top_s) == pytest.approx(
            (kernel.base_w, kernel.slope_w, kernel.top_s), rel=1e-3
        )


def test_held_runs_say_nothing_of_the_free_watts() -> None:
    assert [row.limit_w for row in freest(runs(), COMPUTE)] == [300.0] * 3
    held = [row for row in runs() if row not in unheld(runs())]
    assert {(row.kernel, row.clock_mhz, row.limit_w) for row in held} >= {(COMPUTE, 1410, 200.0), (MEMORY, 1410, 150.0)}
    assert (MEMORY, 1005, 300.0) not in {(row.kernel, row.clock_mhz, row.limit_w) for row in held}


@pytest.fixture(scope="module")
def found() -> Section:
    return section(DATA, CATALOGUE)


@needs_data
def test_targets(found: Section) -> None:
    """All but one: without 1,005 MHz no kernel is near the memory knee (the section's text)."""
    assert [target.met for target in found.targets] == [True, True, False, True, True]
    assert found.targets[2].found.endswith("(without 1,005 MHz)")


@needs_data
def test_time_and_watts_under_every_limit(found: Section) -> None:
    assert {row.held_out for row in found.rows} > {"nothing", "each clock", "each limit"}
    for row in found.rows:
        assert row.errors.median < 0.035, row
        assert row.errors.worst < (0.03 if row.what.startswith("time") else 0.07), row


@needs_data
def test_plots_are_drawn(found: Section) -> None:
    for plot in found.plots:
        figure = Figure(figsize=(8, 4.5))
        plot.draw(figure)
        assert len(figure.axes) == 2
