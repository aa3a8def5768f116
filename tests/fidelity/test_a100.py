"""The fit of the A100's clock and power laws; on the data itself where that is at hand."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from throttllem.calibrate.fit import with_constants
from throttllem.physics.catalogue import Catalogue
from tools.fidelity.a100_fit import (
    GPU,
    MODEL,
    Cell,
    Lengths,
    Served,
    keep_clocks,
    lengths_of,
    refit,
    without_clock,
)
from tools.fidelity.a100_serving import FEW, SXM, section
from tools.fidelity.kernel_law import KernelRow
from tools.fidelity.section import Section
from tools.testbed.report import DATA

pytestmark = pytest.mark.slow

CATALOGUE = Catalogue.load()
A100, LLAMA = CATALOGUE.gpu(GPU), CATALOGUE.model(MODEL)
LENGTHS = Lengths(prompt_tokens=400.0, output_tokens=300.0)
POINTS = [(clock, batch) for clock in (705, 900, 1110, 1290, 1410) for batch in (4, 16, 64)]
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the reference data (../shared/data) is not here")


def served(law: Served) -> list[Cell]:
    """What that law makes of the points."""
    return [
        Cell(clock_mhz=clock, batch=batch, time_s=time_s, power_w=power_w)
        for (clock, batch), (time_s, power_w) in zip(POINTS, law.at(POINTS), strict=True)
    ]


def test_a_batch_is_its_prompts_and_then_its_answers() -> None:
    law = Served(gpu=A100, model=LLAMA, lengths=LENGTHS)
    short = Served(gpu=A100, model=LLAMA, lengths=Lengths(prompt_tokens=1e-9, output_tokens=300.0))
    (time_s, power_w), (decode_s, decode_w) = law.at([(1410, 64)])[0], short.at([(1410, 64)])[0]
    prompts_s = time_s - decode_s
    assert 0.1 * decode_s < prompts_s < 0.5 * decode_s
    assert power_w > decode_w  # arithmetic draws more


def test_lengths_come_back_from_the_seconds_at_the_top_clock() -> None:
    found = lengths_of(A100, LLAMA, served(Served(gpu=A100, model=LLAMA, lengths=LENGTHS)))
    assert found.prompt_tokens == pytest.approx(LENGTHS.prompt_tokens, rel=0.03)
    assert found.output_tokens == pytest.approx(LENGTHS.output_tokens, rel=0.03)


def test_a_fit_finds_the_law_that_made_the_cells() -> None:
    true = with_constants(A100, {"time.memory_knee_mhz": 950.0, "power.core_w": 150.0, "power.knee_mhz": 1100.0})
    cells = served(Served(gpu=true, model=LLAMA, lengths=LENGTHS))
    fitted = refit(A100, LLAMA, cells, [])
    assert fitted.law.gpu.time.memory_knee_mhz == pytest.approx(950, rel=0.06)
    assert fitted.law.gpu.power.knee_mhz == pytest.approx(1100, rel=0.06)
    ours = fitted.law.of(cells) / np.array([(cell.time_s, cell.power_w) for cell in cells])
    assert np.abs(ours - 1).max() < 0.04  # the scatter that the fit takes the seconds to have


def test_a_clock_is_left_out_of_sweep_and_kernels() -> None:
    cells = served(Served(gpu=A100, model=LLAMA, lengths=LENGTHS))
    kernels = [KernelRow(kernel="k", clock_mhz=clock, limit_w=300, time_s=1, power_w=1) for clock in (1200, 1305)]
    left, rows = without_clock(cells, kernels, 1290)
    assert {cell.clock_mhz for cell in left} == {705, 900, 1110, 1410}
    assert [row.clock_mhz for row in rows] == [1200]
    assert keep_clocks(cells, kernels, lambda clock: clock == 1305) == ([], kernels[1:])


@pytest.fixture(scope="module")
def found() -> Section:
    return section(DATA, CATALOGUE)


@needs_data
def test_targets_are_met(found: Section) -> None:
    assert [target.what for target in found.targets if not target.met] == []


@needs_data
def test_every_fold_is_reported_and_bounded(found: Section) -> None:
    means = {(row.what.split()[0], row.held_out): row.errors.mean for row in found.rows}
    folds = {held_out for _, held_out in means}
    assert len(folds) == 4 + len(FEW)
    assert {"nothing", "each clock", "each batch"} < folds
    for (what, _), mean in means.items():
        assert mean < (0.05 if what == "slow-down" else 0.07)


@needs_data
def test_the_catalogue_ships_what_the_fit_gives(found: Section) -> None:
    for name, constants in found.constants.items():
        shipped = CATALOGUE.gpu(name)
        for path, value in constants.items():
            law, _, key = path.partition(".")
            assert getattr(getattr(shipped, law), key) == pytest.approx(value, rel=0.006), (name, path)
    assert set(found.constants) == {GPU, SXM}


@needs_data
def test_plots_are_drawn(found: Section) -> None:
    for plot in found.plots:
        figure = Figure(figsize=(8, 4.5))
        plot.draw(figure)
        assert len(figure.axes) == 2


def test_serve_needs_a_clock_of_the_gpu() -> None:
    with pytest.raises(ValueError, match="runs at 210 to 1410 MHz"):
        Served(gpu=A100, model=LLAMA, lengths=LENGTHS).at([(1500, 4)])
