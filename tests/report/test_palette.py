from __future__ import annotations

import pytest

from throttllem.report.palette import SLO, SOFT, TEXT, dark_colours, policy_inks

from .factory import make_runs


def test_a_policy_keeps_its_colour_whatever_stands_beside_it() -> None:
    together = policy_inks([run.policy for run in make_runs()])
    assert policy_inks(["least-energy", "throttllem"]) == [together[2], together[1]]
    assert len({ink.light for ink in together}) == len(together)
    assert len({ink.dark for ink in together}) == len(together)


@pytest.mark.parametrize(("theme", "card"), [("light", "#ffffff"), ("dark", "#171c23")])
def test_every_colour_stands_out_from_the_page(theme: str, card: str) -> None:
    names = [run.policy for run in make_runs()] + ["fixed:700", "fixed:800", "fixed:900"]
    for ink in (TEXT, SOFT, SLO, *policy_inks(names)):
        assert contrast(getattr(ink, theme), card) >= 3, ink


def test_every_light_colour_has_one_dark_counterpart() -> None:
    names = [run.policy for run in make_runs()]
    assert len(dark_colours(names)) == 5 + len(names)


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)
