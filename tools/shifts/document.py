"""The tables of docs/evaluation/guarantee.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tools.shifts.cells import CELLS, KINDS, SEED
from tools.shifts.measure import BASELINE, FIXED, LEARNED, VARIANTS, Measured
from tools.testbed.report import markdown_rows, replace_between

COMMAND = "make shifts"
END = "<!-- /shifts -->"
HEAD = (
    "shift",
    "margins",
    "cells",
    "asked, %",
    "had, %",
    "after the shift, %",
    "cells below asked",
    "owed at most, mean",
    "owed at most, worst",
    "back within, p90",
    "back within, worst",
    "energy against the maximum clock, %",
)


def rows(measured: Sequence[Measured]) -> list[tuple[str, ...]]:
    """One row a kind of shift and variant, then all."""
    found = []
    for kind in (*KINDS, "all"):
        for variant in VARIANTS:
            chosen = [one for one in measured if one.variant == variant and kind in (one.cell.kind, "all")]
            if chosen:
                found.append(_row(kind, variant, chosen, measured))
    return found


def _row(kind: str, variant: str, chosen: Sequence[Measured], measured: Sequence[Measured]) -> tuple[str, ...]:
    numbers = {one.cell.number for one in chosen}
    top_j = sum(one.energy_j for one in measured if one.variant == BASELINE and one.cell.number in numbers)
    requests = sum(one.requests for one in chosen)
    back = sorted(one.back for one in chosen)
    energy = sum(one.energy_j for one in chosen) / top_j - 1.0
    return (
        kind,
        {BASELINE: "none: `triton`", FIXED: "initial, fixed", LEARNED: "learned"}[variant],
        str(len(chosen)),
        f"{chosen[0].asked * 100:.1f}",
        f"{sum(one.attainment * one.requests for one in chosen) / requests * 100:.2f}",
        f"{sum(one.after for one in chosen) / len(chosen) * 100:.2f}",
        str(sum(one.attainment < one.asked for one in chosen)),
        f"{sum(one.excess for one in chosen) / len(chosen):.1f}",
        f"{max(one.excess for one in chosen):.1f}",
        str(back[(len(back) * 9) // 10 - 1]),
        str(back[-1]),
        "" if variant == BASELINE else f"{energy * 100:+.1f}",
    )


def write(root: Path, measured: Sequence[Measured]) -> None:
    """Fill the page."""
    page = root / "docs/evaluation/guarantee.md"
    mark = f"<!-- shifts: written by `{COMMAND}` -->"
    runs = f"{len(measured) // len(VARIANTS)} of {CELLS} runs, seed {SEED}."
    replace_between(page, mark, END, f"{runs}\n\n{markdown_rows(HEAD, rows(measured))}\n")
