"""What a simulation prints, and its JSON. Both are contracts: the table for people, the JSON for programs."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from rich.console import Console

from throttllem.report.table import results_table
from throttllem.report.verdict import baseline_of, verdict
from throttllem.sim.result import RunResult

_NOTEWORTHY = 0.005
_VERSIONS = ("throttllem", "numpy", "lightgbm")


def results_json(scenario: Mapping[str, object], runs: Sequence[RunResult]) -> dict[str, object]:
    """Schema 1 of the contract: every input resolved, and the runs in the order asked for."""
    versions = {name: version(name) for name in _VERSIONS} | {"python": platform.python_version()}
    return {"schema": 1, "scenario": {**scenario, "versions": versions}, "runs": [run.to_json() for run in runs]}


def show_results(scenario: Mapping[str, Any], runs: Sequence[RunResult], console: Console | None = None) -> None:
    """Print the table, a sentence for each policy, why requests were rejected, and how far the physics is to be
    believed there.
    """
    console = console or Console()
    console.print(results_table(runs, width=console.width))
    baseline = baseline_of(runs)
    for run in runs:
        if run is not baseline:
            console.print(verdict(run, baseline), highlight=False)
    for line in (*_rejected(runs), _trusted(scenario, runs)):
        console.print(line, highlight=False)


def _rejected(runs: Sequence[RunResult]) -> Iterator[str]:
    """How many requests were rejected and why, and by whom where policies differ."""
    for reason in dict.fromkeys(reason for run in runs for reason in run.rejections):
        counts = {run.policy: run.rejections.get(reason, 0) for run in runs}
        who = "" if len(set(counts.values())) == 1 else ": " + ", ".join(f"{name} {n}" for name, n in counts.items())
        yield f"{max(counts.values())} of {runs[0].requests} requests were rejected: {reason}{who}"


def _trusted(scenario: Mapping[str, Any], runs: Sequence[RunResult]) -> str:
    """What the simulated GPU's figures rest on, for the largest engine, and how much of each run was outside of it."""
    engine = scenario["engines"][-1]
    parts = []
    for figure, reach in engine["physics"].items():
        low, high = reach["clocks_mhz"]
        beyond = {run.policy: _share_outside(run, low, high) for run in runs}
        ran = ", ".join(f"{share:.0%} of {policy}'s time" for policy, share in beyond.items() if share >= _NOTEWORTHY)
        doubts = [
            *([f"modelled for {ran}"] if ran else []),
            *([f"below the top clock modelled: {reach['below_top']}"] if reach["below_top"] else []),
        ]
        if reach["why"]:
            parts.append(f"{figure} modelled, not measured ({reach['why']})")
        else:
            said = f" ({'; '.join(doubts)})" if doubts else ""
            parts.append(f"{figure} {reach['kind']} from {low} to {high} MHz{said}")
    return f"Simulated GPU, TP {engine['tp']}: {'; '.join(parts)}."


def _share_outside(run: RunResult, low_mhz: int, high_mhz: int) -> float:
    """Of the time of a run's iterations, the part at clocks outside of that range."""
    busy_s = sum(run.busy_s_by_mhz.values())
    outside_s = sum(seconds for mhz, seconds in run.busy_s_by_mhz.items() if not low_mhz <= mhz <= high_mhz)
    return outside_s / busy_s if busy_s else 0.0
