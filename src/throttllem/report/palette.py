"""Colours of the report, for a light and a dark page: one per policy name, distinct for the colour-blind and in print.

Figures are drawn in the light theme's colours; the page replaces each by its dark counterpart. Hues follow Okabe and
Ito, "Color Universal Design" (2008), at 3:1 contrast to the page (WCAG 2.2, 1.4.11).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Ink:
    """One colour in both themes."""

    light: str
    dark: str


TEXT = Ink(light="#1b2129", dark="#e8ecf1")
SOFT = Ink(light="#56606c", dark="#a5b0bd")
GRID = Ink(light="#e3e7ec", dark="#2b333d")
CARD = Ink(light="#ffffff", dark="#171c23")
SLO = Ink(light="#b3261e", dark="#ff8a80")

_NAMED = {
    "triton": Ink(light="#6b7683", dark="#9aa5b1"),
    "throttllem": Ink(light="#0072b2", dark="#4daae6"),
    "least-energy": Ink(light="#c2500a", dark="#f0894d"),
    # Autoscaling keeps its policy's hue and changes its lightness (and its lines are dashed).
    "triton+autoscale": Ink(light="#343b44", dark="#d8dee5"),
    "throttllem+autoscale": Ink(light="#00426b", dark="#a6d8fa"),
    "least-energy+autoscale": Ink(light="#762c00", dark="#fcc7a6"),
}
_OTHERS = (
    Ink(light="#00795a", dark="#35c69a"),
    Ink(light="#a64d8a", dark="#e08cc3"),
    Ink(light="#8a6d00", dark="#e0c14a"),
    Ink(light="#5b4bb7", dark="#a79bf2"),
)


def policy_inks(policies: Sequence[str]) -> list[Ink]:
    """The colour of each policy: the fixed one of its name, else the next of those for other names."""
    others = iter(range(len(policies)))
    return [_NAMED[name] if name in _NAMED else _OTHERS[next(others) % len(_OTHERS)] for name in policies]


def dark_colours(policies: Sequence[str]) -> dict[str, str]:
    """The dark counterpart of every light colour that figures of these policies use."""
    return {ink.light: ink.dark for ink in (TEXT, SOFT, GRID, CARD, SLO, *policy_inks(policies))}
