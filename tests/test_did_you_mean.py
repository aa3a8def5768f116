"""Hints for mistyped names."""

import pytest

from throttllem.did_you_mean import did_you_mean

KNOWN = ("dwell_s", "margin", "min_saving", "Reserve")


@pytest.mark.parametrize(
    ("name", "most", "hint"),
    [
        ("dwel_s", 1, "did you mean dwell_s?"),
        ("MARGIN", 1, "did you mean margin?"),
        ("reserve", 1, "did you mean Reserve?"),
        ("marin_saving", 2, "did you mean min_saving or margin?"),
        ("m", 2, "did you mean margin or min_saving?"),
        ("qqqq", 1, "known: dwell_s, margin, min_saving, Reserve"),
    ],
)
def test_hint(name, most, hint):
    assert did_you_mean(name, KNOWN, most=most) == hint
