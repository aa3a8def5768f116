"""The grid: cells are told apart, and what is judged is not what is tuned on."""

from collections import Counter

import pytest

from throttllem.arena.cells import GRIDS, JUDGING, TUNING


@pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
def test_names_are_unique(grid):
    names = [cell.name for cell in grid.cells]
    assert len(set(names)) == len(names)


def test_judging_has_the_groups_of_the_study():
    assert Counter(cell.group for cell in JUDGING.cells) == {
        **{"25 %": 6, "50 %": 6, "100 %": 6, "code": 3, "Mooncake": 3},
        **{"tight TBT": 5, "TTFT 1 s": 9, "length error 0.3": 4},
    }


def test_nothing_is_tuned_on_what_is_judged():
    assert {cell.engine for cell in TUNING.cells}.isdisjoint(cell.engine for cell in JUDGING.cells)
    assert {cell.load for cell in TUNING.cells}.isdisjoint(cell.load for cell in JUDGING.cells)
    assert set(TUNING.seeds(100)).isdisjoint(JUDGING.seeds(100))


def test_cells_are_chosen_by_name_or_group():
    assert {cell.group for cell in JUDGING.matching(["code"]).cells} == {"code"}
    found = JUDGING.matching(["h100-*ttft1s*", "Mooncake"])
    assert {cell.group for cell in found.cells} == {"TTFT 1 s", "Mooncake"}
    assert found.first_seed == JUDGING.first_seed
    with pytest.raises(ValueError, match=r"--cells cod: no cell of the judging grid matches; did you mean code"):
        JUDGING.matching(["cod"])
