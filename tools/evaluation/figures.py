"""Figures of one run of a client, medians over rounds, and two ways to the same engine side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Milliseconds, and generated tokens per second of the whole run. None: this client does not tell.

    TTFT is over requests, ITL over gaps between chunks, TPOT over requests' means of all gaps after the first token.
    """

    requests: int
    errors: int
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    itl_p50_ms: float | None
    itl_p99_ms: float | None
    tpot_p50_ms: float | None
    tokens_per_s: float


TITLES = {
    "ttft_p50_ms": "TTFT p50, ms",
    "ttft_p99_ms": "TTFT p99, ms",
    "itl_p50_ms": "ITL p50, ms",
    "itl_p99_ms": "ITL p99, ms",
    "tpot_p50_ms": "TPOT p50, ms",
    "tokens_per_s": "output tokens/s",
    "requests": "requests",
    "errors": "errors",
}
"""In the order of the tables."""
Cells = tuple[str, ...]
HEAD = ("", "direct", "direct again", "through the gateway", "ratio", "beyond noise")


def percentiles_ms(seconds: Sequence[float]) -> tuple[float | None, float | None]:
    """p50 and p99; None where there is nothing."""
    if not len(seconds):
        return None, None
    p50, p99 = np.percentile(np.asarray(seconds) * 1e3, (50, 99))
    return float(p50), float(p99)


def medians(rounds: Sequence[Figures]) -> Figures:
    """Figure by figure; errors and requests of all rounds are added."""
    values: dict[str, Any] = {}
    for field in fields(Figures):
        found = [value for each in rounds if (value := getattr(each, field.name)) is not None]
        if field.name in ("requests", "errors"):
            values[field.name] = sum(found)
        else:
            values[field.name] = median(found) if found else None
    return Figures(**values)


def side_by_side(direct: Sequence[Figures], again: Sequence[Figures], through: Sequence[Figures]) -> list[Cells]:
    """One row per figure, under `HEAD`. In brackets: the least and the most of the rounds.

    The ratio is to both direct ways together. It is beyond noise if no run through the gateway lies among theirs and
    it is further off than they are from each other; otherwise nothing is to be read into it.
    """
    rows: list[Cells] = []
    for name, title in TITLES.items():
        columns = [_values(each, name) for each in (direct, again, through)]
        if not all(columns):
            continue
        if name in ("requests", "errors"):
            rows.append((title, *(f"{sum(column):,}" for column in columns), "", ""))
            continue
        both = columns[0] + columns[1]
        ratio = f"{median(columns[2]) / median(both):.3f}" if median(both) else ""
        rows.append((title, *map(_with_range, columns), ratio, "yes" if _beyond(*columns) else "no"))
    return rows


def _beyond(direct: list[float], again: list[float], through: list[float]) -> bool:
    both = direct + again
    apart = max(through) < min(both) or min(through) > max(both)
    return apart and abs(median(through) - median(both)) > abs(median(direct) - median(again))


def _values(rounds: Sequence[Figures], name: str) -> list[float]:
    return [value for each in rounds if (value := getattr(each, name)) is not None]


def as_dicts(rounds: Iterable[Figures]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(each) for each in rounds]


def _with_range(values: Sequence[float]) -> str:
    return f"{_short(median(values))} ({_short(min(values))} to {_short(max(values))})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
