from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from throttllem.core.forecast.performance_table import Hull, PerformanceTable

HULL = Hull(max_batch=3, max_kv_blocks=4, max_prefill_tokens=5)


def table(**changes: object) -> PerformanceTable:
    """2 prefill bins, 3 batch bins, 2 KV bins, 2 clocks; seconds are cell + 1 and a tenth of that at the top clock."""
    cells = np.arange(1, 13, dtype=np.float32)[:, None]
    values: dict[str, object] = {
        "clocks_mhz": (210, 1410),
        "batch_bin": np.array([0, 0, 1, 2], dtype=np.int32),
        "kv_bin": np.array([0, 0, 0, 1, 1], dtype=np.int32),
        "prefill_bin": np.array([0, 1, 1, 1, 1, 1], dtype=np.int32),
        "seconds": cells * np.array([[1.0, 0.1]], dtype=np.float32),
        "watts": cells * np.array([[10.0, 100.0]], dtype=np.float32),
        "hull": HULL,
    }
    return PerformanceTable(**(values | changes))


def test_cells_are_prefill_then_batch_then_kv() -> None:
    cells = table().cells(np.array([1, 2, 3, 3]), np.array([2, 3, 0, 4]), np.array([0, 0, 1, 5]))
    assert cells.tolist() == [0, 3, (1 * 3 + 2) * 2, (1 * 3 + 2) * 2 + 1]


def test_values_beyond_the_ends_count_as_the_ends() -> None:
    beyond = table().cells(np.array([99]), np.array([99]), np.array([99]))
    assert beyond.tolist() == table().cells(np.array([3]), np.array([4]), np.array([5])).tolist() == [11]


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_cells_do_not_change_what_they_are_given(dtype: type) -> None:
    batch, kv, prefill = (np.array([value], dtype=dtype) for value in (2, 3, 1))
    first = table().cells(batch, kv, prefill)
    assert (batch[0], kv[0], prefill[0]) == (2, 3, 1)
    assert first.tolist() == table().cells(batch, kv, prefill).tolist()


def test_single_point() -> None:
    assert table().at(210, 2, 3, 0) == (4.0, 40.0)
    assert table().at(1410, 2, 3, 0) == (pytest.approx(0.4), 400.0)


def test_unknown_clock_is_named() -> None:
    with pytest.raises(ValueError, match=r"clock 900 MHz .* 210 to 1410"):
        table().at(900, 1, 1, 0)


@pytest.mark.parametrize(
    ("point", "inside"), [((3, 4, 5), True), ((4, 4, 5), False), ((3, 5, 5), False), ((3, 4, 6), False)]
)
def test_hull_includes_its_ends(point: tuple[int, int, int], inside: bool) -> None:
    assert table().inside(*point) is inside


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clocks_mhz": (1410, 210)}, "ascending"),
        ({"clocks_mhz": ()}, "ascending"),
        ({"batch_bin": np.array([0, 0, 2, 3], dtype=np.int32)}, "batch_bin must rise by 0 or 1"),
        ({"kv_bin": np.array([1, 1], dtype=np.int32)}, "kv_bin must be one-dimensional and begin with 0"),
        ({"kv_bin": np.array([], dtype=np.int32)}, "kv_bin must be"),
        ({"watts": np.ones((11, 2), dtype=np.float32)}, "watts has the shape"),
        ({"seconds": np.zeros((12, 2), dtype=np.float32)}, "seconds must be positive"),
        ({"seconds": np.full((12, 2), np.nan, dtype=np.float32)}, "seconds must be positive"),
        ({"watts": np.full((12, 2), np.inf, dtype=np.float32)}, "watts must be positive and finite"),
    ],
)
def test_parts_that_do_not_fit_together(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table(**changes)


def test_a_table_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        table().hull = HULL


def test_held_down_every_higher_clock_is_what_the_limit_is() -> None:
    whole = table(
        clocks_mhz=(210, 900, 1410),
        seconds=np.tile(np.array([[3.0, 2.0, 1.0]], dtype=np.float32), (12, 1)),
        watts=np.tile(np.array([[10.0, 20.0, 40.0]], dtype=np.float32), (12, 1)),
    )
    held = whole.capped(1200)
    assert [held.at(mhz, 1, 1, 0) for mhz in held.clocks_mhz] == [(3.0, 10.0), (2.0, 20.0), (2.0, 20.0)]
    assert held.slowest[held.cell(1, 1, 0)] == 2.0 and held.limit_mhz == 1200 and held.base is whole
    assert held.capped(1200) is held
    assert held.capped(300).at(1410, 1, 1, 0) == (3.0, 10.0)
    assert held.capped(100).at(1410, 1, 1, 0) == (3.0, 10.0)  # below what was profiled: the lowest
    assert held.capped(None) is whole and held.capped(1410) is whole and whole.capped(None) is whole


def test_at_a_rate_decoding_takes_a_part_of_a_step_and_prompts_a_whole_one():
    plain = table()
    fast = plain.at_rate(4.0)
    assert fast.at(1410, 2, 3, 0)[0] == pytest.approx(plain.at(1410, 2, 3, 0)[0] / 4)
    assert fast.at(1410, 2, 3, 5) == plain.at(1410, 2, 3, 5)
    assert fast.capped(210).capped(None).at(1410, 2, 3, 0) == fast.at(1410, 2, 3, 0)
    assert fast.at_rate(1.0) is plain
