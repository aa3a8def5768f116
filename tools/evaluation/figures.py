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
HEAD = ("", "direct", "through the gateway", "ratio", "difference")


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


def side_by_side(direct: Sequence[Figures], through: Sequence[Figures]) -> list[tuple[str, ...]]:
    """One row per figure, under `HEAD`. In brackets: the least and the most of the rounds."""
    left, right = medians(direct), medians(through)
    rows: list[tuple[str, ...]] = []
    for name, title in TITLES.items():
        a, b = getattr(left, name), getattr(right, name)
        if a is None or b is None:
            continue
        counted = name in ("requests", "errors")
        rows.append(
            (
                title,
                f"{a:,}" if counted else _with_range(a, [getattr(each, name) for each in direct]),
                f"{b:,}" if counted else _with_range(b, [getattr(each, name) for each in through]),
                "" if counted or not a else f"{b / a:.3f}",
                "" if counted else f"{b - a:+.2f}",
            )
        )
    return rows


def as_dicts(rounds: Iterable[Figures]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(each) for each in rounds]


def _with_range(middle: float, values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{_short(middle)} ({_short(min(found))} to {_short(max(found))})" if len(found) > 1 else _short(middle)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
