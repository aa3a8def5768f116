"""Colours of the report: one per policy name, told apart by the colour-blind and in print, for light and dark pages.

Figures name colours by token (`@ink`, `@policy0`); the page puts in the theme's. Hues follow Okabe and Ito,
"Color Universal Design" (2008), set darker on light and lighter on dark for 3:1 contrast (WCAG 2.2, 1.4.11).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Ink:
    """One colour in both themes."""

    light: str
    dark: str


THEME: dict[str, Ink] = {
    "@ink": Ink(light="#1b2129", dark="#e8ecf1"),
    "@soft": Ink(light="#56606c", dark="#a5b0bd"),
    "@grid": Ink(light="#e3e7ec", dark="#2b333d"),
    "@card": Ink(light="#ffffff", dark="#171c23"),
    "@clear": Ink(light="rgba(0,0,0,0)", dark="rgba(0,0,0,0)"),
    "@slo": Ink(light="#b3261e", dark="#ff8a80"),
}

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
    """The colour of each policy: its own where it has a fixed one, else the next of those kept for others."""
    others = iter(range(len(policies)))
    return [_NAMED[name] if name in _NAMED else _OTHERS[next(others) % len(_OTHERS)] for name in policies]


def token(index: int) -> str:
    """The token of the policy at this place."""
    return f"@policy{index}"


def themes(policies: Sequence[str]) -> dict[str, dict[str, str]]:
    """Token to colour, for `light` and for `dark`."""
    inks = THEME | {token(index): ink for index, ink in enumerate(policy_inks(policies))}
    return {
        "light": {name: ink.light for name, ink in inks.items()},
        "dark": {name: ink.dark for name, ink in inks.items()},
    }
