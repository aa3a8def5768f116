"""Ways to one engine in turn and side by side, one of them twice: how far equal ways differ bounds what is found.

A machine that others use too makes any proxy look faster or slower than no proxy; only the control shows it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any

from tools.testbed.figures import Figures
from tools.testbed.report import Table

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


DIRECT, AGAIN, THROUGH = "direct", "direct again", "through the gateway"
WAYS = (DIRECT, AGAIN, THROUGH)
BUSY = 4.0
"""Waiting processes per core above which latencies of a run mean nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One run; `load` is the machine's load average (1 minute) when it began, `number` counts rounds from 0."""

    number: int
    load: float
    figures: Figures

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"round": self.number, "load": self.load, **asdict(self.figures)}


Rounds = Mapping[str, Sequence[Round]]


def alternate(
    name: str, run: Callable[[str, str], Figures], urls: Mapping[str, str], rounds: int, report: Callable[[str], None]
) -> Rounds:
    """`run(url, label)` for each of `WAYS` in each round; each way is first, second and third equally often."""
    found: dict[str, list[Round]] = {way: [] for way in WAYS}
    for number in range(rounds):
        turn = number % len(WAYS)
        for way in (*WAYS[turn:], *WAYS[:turn]):
            load = os.getloadavg()[0]
            figures = run(urls[way], f"{name}-{number}-{way}".replace(" ", "-"))
            found[way].append(Round(number=number, load=load, figures=figures))
            report(
                f"{name}, round {number + 1}, {way}: {figures.requests} requests, {figures.errors} errors, TTFT p50 "
                f"{figures.ttft_p50_ms or 0:.1f} ms, {figures.tokens_per_s:.0f} tokens/s, load {load:.1f}"
            )
    return found


def as_json(rounds: Rounds) -> dict[str, Any]:
    """Every run."""
    return {way: [each.as_dict() for each in runs] for way, runs in rounds.items()}


def loads(rounds: Rounds) -> str:
    """How busy the machine was, in words."""
    seen = [each.load for runs in rounds.values() for each in runs]
    busy = max(seen) > BUSY * len(os.sched_getaffinity(0))
    warning = "; **too busy for its latencies to mean anything: to be measured again**" if busy else ""
    return f"load average at the start of each run {min(seen):.1f} to {max(seen):.1f}{warning}"


def compared_table(name: str, rounds: Rounds) -> Table:
    """All ways side by side."""
    direct, again, through = ([each.figures for each in rounds[way]] for way in WAYS)
    return Table(caption=f"{name} ({loads(rounds)})", head=HEAD, rows=side_by_side(direct, again, through))


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


def _with_range(values: Sequence[float]) -> str:
    return f"{_short(median(values))} ({_short(min(values))} to {_short(max(values))})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
