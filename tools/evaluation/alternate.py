"""Runs of several ways in turn, with one way twice: what differs between equal ways is noise, and bounds what is found.

A machine that others use too makes any proxy look faster or slower than nothing at all; only the control shows it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tools.evaluation.figures import Figures

DIRECT, AGAIN, THROUGH = "direct", "direct again", "through the gateway"
WAYS = (DIRECT, AGAIN, THROUGH)
BUSY = 4.0
"""Waiting processes per core above which a run says nothing of latencies."""


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
    name: str, run: Callable[[str, str], Figures], urls: Mapping[str, str], rounds: int, say: Callable[[str], None]
) -> Rounds:
    """`run(url, label)` for each of `WAYS` in each round; each way is first, second and third equally often."""
    found: dict[str, list[Round]] = {way: [] for way in WAYS}
    for number in range(rounds):
        turn = number % len(WAYS)
        for way in (*WAYS[turn:], *WAYS[:turn]):
            load = os.getloadavg()[0]
            figures = run(urls[way], f"{name}-{number}-{way}".replace(" ", "-"))
            found[way].append(Round(number=number, load=load, figures=figures))
            say(
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
