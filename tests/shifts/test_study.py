"""The study of shifts: its cells are drawn by number, and what it measures is what a hand can count."""

import numpy as np
import pytest

from tools.shifts.cells import CELLS, ENGINES, KINDS, SEED, cell
from tools.shifts.document import HEAD, rows
from tools.shifts.measure import VARIANTS, Measured, longest, owed


def test_the_cells_are_the_same_every_time_and_cover_kinds_and_engines_alike():
    drawn = [cell(number, SEED) for number in range(CELLS)]
    assert drawn == [cell(number, SEED) for number in range(CELLS)]
    pairs = [(one.kind, one.engine) for one in drawn]
    assert {pairs.count((kind, engine)) for kind in KINDS for engine in ENGINES} <= {13, 14}
    assert all(0.3 <= one.load <= 0.7 and 150 <= one.at_s < one.until_s for one in drawn)
    assert all(one.load * one.size <= 0.95 for one in drawn if one.kind == "load step")


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_a_cell_shifts_either_its_requests_or_its_engine(number):
    one, clocks = cell(number, SEED), tuple(range(210, 1411, 15))
    plain = []
    assert bool(one.shifts(clocks)) == (one.requests(plain) is plain)


def test_owed_is_what_the_worst_window_has_beyond_the_allowed():
    met = [True, False, False, True, False, True]
    found = list(owed(met, 0.25))
    assert found == pytest.approx([0, 0.75, 1.5, 1.25, 2.0, 1.75])
    windows = [sum(not one for one in met[i:5]) - 0.25 * (5 - i) for i in range(5)]
    assert found[4] == pytest.approx(np.max(windows))


def test_the_longest_stretch():
    assert longest(value > 1 for value in [0, 2, 2, 0, 2]) == 2
    assert longest([]) == 0


def test_a_row_a_kind_and_variant_and_the_energy_against_the_maximum_clock():
    def measured(number, variant, energy_j):
        return Measured(
            cell=cell(number, SEED), variant=variant, asked=0.99, requests=100, attainment=0.98 + number / 100,
            after=0.99, excess=3.0, back=number, energy_j=energy_j,
        )  # fmt: skip

    found = rows(
        [measured(n, variant, joules) for n in (0, 1) for variant, joules in zip(VARIANTS, (10, 6, 5), strict=True)]
    )
    assert {len(row) for row in found} == {len(HEAD)}
    assert [row[0] for row in found] == [KINDS[0]] * 3 + [KINDS[1]] * 3 + ["all"] * 3
    learned = dict(zip(HEAD, found[-1], strict=True))
    assert (learned["cells"], learned["had, %"], learned["cells below asked"]) == ("2", "98.50", "1")
    assert learned["energy against the maximum clock, %"] == "-50.0"
    assert found[0][-1] == ""
