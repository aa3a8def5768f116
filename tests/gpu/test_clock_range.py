"""Ranges of clocks: what is one, and how they are written."""

import json

import pytest

from throttllem.gpu.clock_range import ClockRange


@pytest.mark.parametrize(("low", "high"), [(900, 600), (0, 900), (-1, 5)])
def test_a_range_is_two_clocks_in_order(low, high):
    with pytest.raises(ValueError, match="the lower one first"):
        ClockRange(low, high)


def test_parsed_from_the_command_line_and_written_as_json():
    clocks = ClockRange.parse("600-1410")
    assert (clocks.low_mhz, clocks.high_mhz, str(clocks)) == (600, 1410, "600 to 1410 MHz")
    assert json.dumps(clocks) == "[600, 1410]"


@pytest.mark.parametrize("text", ["", "600", "600-", "-600-900", "600-900-1200", "a-b", "1410-600"])
def test_what_is_no_range(text):
    with pytest.raises(ValueError):
        ClockRange.parse(text)
