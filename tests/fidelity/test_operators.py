"""Composing measured operators, on tables made up here; then, where the data is, the section itself."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from throttllem.calibrate.fit import with_constants
from throttllem.physics.catalogue import Catalogue, Gpu
from throttllem.physics.model import Model
from tools.fidelity.operator_laws import ALLREDUCE, DECODE, GEMM, OPERATORS, PREFILL, Operator
from tools.fidelity.operator_tables import CONTEXTS, Iteration, OperatorTables, Table, compose
from tools.fidelity.operators import bare, physics_s, refit, section
from tools.fidelity.section import Section
from tools.testbed.report import DATA

pytestmark = pytest.mark.slow

CATALOGUE = Catalogue.load()
A100 = bare(CATALOGUE.gpu("a100-40gb-sxm"), 2.039e12, 85.5e9)
PLAIN, GROUPED = CATALOGUE.model("llama-2-13b"), CATALOGUE.model("llama-3-8b")
WIDTHS = (512, 1024, 2048, 4096, 5120, 8192, 12288, 16384, 65536)
ROWS = tuple(2**power for power in range(14))


def law_tables(gpu: Gpu) -> OperatorTables:
    """What would have been measured if the law were true."""
    products = {(m, n, k): 0.0 for m in ROWS for n in WIDTHS for k in WIDTHS}
    heads = [(h, kv) for kv in (1, 2, 4, 8) for h in (kv, 4 * kv)]
    decode = {(*pair, batch, n): 0.0 for pair in heads for batch in ROWS[:12] for n in CONTEXTS}
    alone = (4, 8, 12, 16, 24, 40)
    prefill = {(*pair, 1, n): 0.0 for pair in [*heads, *((h, h) for h in alone)] for n in CONTEXTS}
    allreduce = {(gpus, 2**power): 0.0 for gpus in (2, 4, 8) for power in range(10, 28)}

    def filled(operator: Operator, table: dict[tuple[int, ...], float], drop: bool = False) -> Table:
        keys = [(key[0], key[1], key[3]) if drop else key for key in table]
        seconds = operator.law(gpu, *(np.array(column, dtype=float) for column in zip(*keys, strict=True)))
        return dict(zip(table, seconds.tolist(), strict=True))

    return OperatorTables(
        gemm=filled(GEMM, products),
        decode=filled(DECODE, decode),
        prefill=filled(PREFILL, prefill, drop=True),
        allreduce=filled(ALLREDUCE, allreduce),
        widths=WIDTHS,
        heads=frozenset(heads),
        alone=alone,
    )


TABLES = law_tables(A100)


def iterations(models: list[Model]) -> list[Iteration]:
    return compose(TABLES, models, lambda model, tp: True)


def test_between_widths_by_a_straight_line_and_beyond_the_last() -> None:
    known = {n: TABLES.gemm[1, n, 4096] for n in WIDTHS}
    assert TABLES.matrix_s(1, 4096, 4096) == known[4096]
    assert TABLES.matrix_s(1, 14336, 4096) == pytest.approx((known[12288] + known[16384]) / 2)
    slope = (known[65536] - known[16384]) / (65536 - 16384)
    assert TABLES.matrix_s(1, 128_256, 4096) == pytest.approx(known[65536] + slope * (128_256 - 65536))


def test_forty_heads_are_eight_at_five_times_the_batch() -> None:
    low, high = TABLES.decode[8, 8, 16, 256], TABLES.decode[8, 8, 32, 256]
    share = math.log2(20 / 16)
    assert TABLES.decode_s(40, 40, 4, 256) == pytest.approx(low ** (1 - share) * high**share)
    assert TABLES.decode_s(5, 5, 4, 256) == pytest.approx(
        TABLES.decode[1, 1, 16, 256] ** (1 - share) * TABLES.decode[1, 1, 32, 256] ** share
    )
    assert TABLES.decode_s(32, 8, 4, 256) == TABLES.decode[32, 8, 4, 256]


def test_an_iteration_is_the_sum_of_its_operators() -> None:
    at = next(i for i in iterations([GROUPED]) if (i.tp, i.decode, i.batch, i.tokens) == (2, True, 8, 512))
    shapes = ((3072, 4096), (4096, 2048), (14336, 4096), (4096, 7168))
    layer = sum(TABLES.matrix_s(8, width, depth) for width, depth in shapes)
    assert at.gemm_s == pytest.approx(32 * layer + TABLES.matrix_s(8, 64_128, 4096))
    assert at.attention_s == pytest.approx(32 * TABLES.decode[16, 4, 8, 512])
    assert at.allreduce_s == pytest.approx(64 * TABLES.allreduce[2, 8 * 4096])
    assert at.measured_s == at.gemm_s + at.attention_s + at.allreduce_s


def test_what_was_not_measured_is_left_out() -> None:
    found = {(i.batch, i.tokens) for i in iterations([PLAIN]) if i.decode and i.tp == 1}
    assert (128, 64) in found
    short = {key: seconds for key, seconds in TABLES.decode.items() if key[2] * key[3] <= 2**16}
    tables = OperatorTables(**{name: getattr(TABLES, name) for name in TABLES.__slots__} | {"decode": short})
    fewer = {(i.batch, i.tokens) for i in compose(tables, [PLAIN], lambda model, tp: tp == 1) if i.decode}
    assert fewer < found
    assert max(batch * tokens for batch, tokens in fewer) <= 2**16 / 5


@pytest.mark.parametrize("model", [PLAIN, GROUPED])
def test_the_engine_adds_up_what_the_operators_say(model: Model) -> None:
    """Straight lines between sizes, and the smooth maximum of sums rather than the sum of smooth maxima: 3 %."""
    there = iterations([model])
    errors = physics_s(A100, there) / np.array([at.measured_s for at in there]) - 1
    assert len(there) > 300
    assert np.abs(errors).max() < 0.06
    assert np.median(np.abs(errors)) < 0.01


def test_a_fit_finds_the_constants_from_which_the_tables_were_made() -> None:
    fitted = refit(A100, TABLES, lambda operator, key: True)
    for operator in OPERATORS:
        assert np.abs(operator.errors(fitted, operator.points(TABLES))).max() < 0.02, operator.name
    assert fitted.time.decode_walk_token_s == pytest.approx(A100.time.decode_walk_token_s, rel=0.01)


def test_a_fit_sees_only_what_it_is_shown_and_leaves_zeros_alone() -> None:
    h100 = CATALOGUE.gpu("h100-80gb-sxm")
    found = DECODE.fit(h100, {key: s for key, s in DECODE.points(TABLES).items() if key[2] > 64})
    fitted = with_constants(h100, {each.constant.path: each.value for each in found})
    assert fitted.time.decode_walk_token_s == fitted.time.decode_split_s == 0
    assert fitted.time.gemm_kernel_s == h100.time.gemm_kernel_s
    assert fitted.time.decode_kernel_s != h100.time.decode_kernel_s


@pytest.fixture(scope="module")
def found() -> Section:
    if not DATA.is_dir():
        pytest.skip("the reference data (../shared/data) is not here")
    return section(DATA, CATALOGUE)


def test_operators_add_up_to_iterations(found: Section) -> None:
    assert all(target.met for target in found.targets)
    assert len(found.targets) == 20  # four of each GPU
    whole = {(row.what, row.held_out): row.errors for row in found.rows}
    for title, count in (("A100", 820), ("H100", 833)):
        shipped = whole[f"{title}: iterations", "nothing"]
        assert shipped.count == count
        assert shipped.median < 0.04
        assert shipped.p90 < 0.10
        assert shipped.worst < 0.22
        for held_out in ("each batch size", "each TP degree", "each KV or prompt length", "all but three batch sizes"):
            assert whole[f"{title}: iterations", held_out].median < 0.05, held_out
    for gpu, constants in found.constants.items():
        for path, value in constants.items():
            shipped_value = getattr(CATALOGUE.gpu(gpu).time, path.removeprefix("time."))
            assert shipped_value == pytest.approx(value, rel=0.05), (gpu, path)


def test_every_plot_draws(found: Section) -> None:
    assert [plot.name for plot in found.plots] == [
        "operators-decode-a100",
        "operators-decode-h100",
        "operators-prefill",
        "operators-errors",
    ]
    for plot in found.plots:
        figure = Figure(figsize=(8, 4.5))
        plot.draw(figure)
        panels = [axes for axes in figure.axes if axes.get_title()]
        assert len(panels) >= 2, plot.name
        assert all(axes.get_xlabel() for axes in panels), plot.name
        assert all(axes.lines or axes.images for axes in panels), plot.name
