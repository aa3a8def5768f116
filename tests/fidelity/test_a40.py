"""The power law averaged over cells of clock, prompts and batch; on the data itself where that is at hand."""

import pytest
from matplotlib.figure import Figure

from throttllem.calibrate.fit import with_constants
from throttllem.physics.catalogue import Catalogue
from throttllem.physics.engine import EnginePhysics
from tools.fidelity.a40 import GPU, MODEL, Cell, Edges, errors, refit, section, spans, watts
from tools.fidelity.section import Section
from tools.testbed.report import DATA

pytestmark = pytest.mark.slow

CATALOGUE = Catalogue.load()
A40, LLAMA = CATALOGUE.gpu(GPU), CATALOGUE.model(MODEL)
ENGINE = EnginePhysics(A40, LLAMA, 1)
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the reference data (../shared/data) is not here")


def cell(clock_mhz: Edges, prefill_tokens: Edges, decode_batch: Edges, power_w: float = 1.0) -> Cell:
    return Cell(clock_mhz=clock_mhz, prefill_tokens=prefill_tokens, decode_batch=decode_batch, power_w=power_w)


def cells_of(engine: EnginePhysics) -> list[Cell]:
    """Cells over the whole range, with the watts of that engine."""
    edges = [(clock, clock + 150.0) for clock in range(300, 1650, 150)]
    prompts: tuple[Edges, ...] = ((None, 80.0), (80.0, 500.0), (500.0, None))
    batches: tuple[Edges, ...] = ((None, 80.0), (80.0, None))
    bare = [cell(clock, prompt, batch) for clock in edges for prompt in prompts for batch in batches]
    return [cell(c.clock_mhz, c.prefill_tokens, c.decode_batch, watts(engine, c)) for c in bare]


def test_a_narrow_cell_is_its_point() -> None:
    narrow = cell((1199.9, 1200.1), (511.9, 512.1), (31.9, 32.1))
    expected = ENGINE.iteration(1200, 32, 32_000, 512, 512**2 / 2)[1]
    assert watts(ENGINE, narrow) == pytest.approx(expected, rel=1e-3)


def test_prompts_add_watts_at_high_clocks_and_none_at_low_ones() -> None:
    def added(clock: Edges) -> float:
        full, empty = (watts(ENGINE, cell(clock, prompt, (16.0, 64.0))) for prompt in ((500.0, 2000.0), (None, 80.0)))
        return full - empty

    assert added((1350.0, 1500.0)) > 40
    assert added((300.0, 450.0)) < 5


def test_batches_add_more_watts_at_high_clocks() -> None:
    def added(clock: Edges) -> float:
        large, small = (watts(ENGINE, cell(clock, (None, 80.0), batch)) for batch in ((80.0, None), (None, 80.0)))
        return large - small

    assert added((1600.0, 1740.0)) > 20
    assert added((300.0, 450.0)) < 5


def test_a_fit_finds_the_law_that_made_the_cells() -> None:
    true = with_constants(A40, {"power.core_w": 150.0, "power.knee_mhz": 1000.0, "power.limit_w": 400.0})
    found = refit(true, LLAMA, cells_of(EnginePhysics(true, LLAMA, 1)))
    assert found.gpu.power.core_w == pytest.approx(150, rel=0.15)
    assert found.gpu.power.knee_mhz == pytest.approx(1000, rel=0.10)


def test_errors_are_relative() -> None:
    right = cells_of(ENGINE)[0]
    half = cell(right.clock_mhz, right.prefill_tokens, right.decode_batch, right.power_w * 2)
    assert errors(A40, LLAMA, [right, half]) == pytest.approx([0.0, -0.5])


def test_spans_are_of_ranges_with_several_cells() -> None:
    low, high = (None, 285.0), (285.0, 435.0)
    chosen = [cell(low, (None, 100.0), (None, None)), cell(low, (100.0, None), (None, None))]
    assert spans([*chosen, cell(high, (None, None), (None, None))], [90.0, 80.0, 100.0]) == {low: -10.0}


@pytest.fixture(scope="module")
def found() -> Section:
    return section(DATA, CATALOGUE)


@needs_data
def test_targets_are_met(found: Section) -> None:
    assert [target for target in found.targets if not target.met] == []
    assert len(found.targets) == 2


@needs_data
def test_watts_of_cells_left_out(found: Section) -> None:
    medians = {row.held_out: row.errors.median for row in found.rows}
    assert set(medians) == {"nothing", "each clock range", "all clock ranges but three"}
    assert max(medians.values()) < 0.05


@needs_data
def test_the_catalogue_ships_what_the_fit_gives(found: Section) -> None:
    for path, value in found.constants[GPU].items():
        assert getattr(A40.power, path.removeprefix("power.")) == pytest.approx(value, rel=0.006), path


@needs_data
def test_the_plot_is_drawn(found: Section) -> None:
    figure = Figure(figsize=(8, 4.5))
    found.plots[0].draw(figure)
    assert len(figure.axes) == 3  # two, and the colour bar
