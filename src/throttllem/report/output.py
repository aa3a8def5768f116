"""What a simulation prints, and its JSON. Both are contracts: the table for people, the JSON for programs."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from rich.console import Console

from throttllem.report.table import results_table
from throttllem.report.verdict import baseline_of, verdict
from throttllem.sim.result import RunResult

_VERSIONS = ("throttllem", "numpy", "lightgbm")


def results_json(scenario: Mapping[str, object], runs: Sequence[RunResult]) -> dict[str, object]:
    """Schema 1 of the contract: every input resolved, and the runs in the order asked for."""
    versions = {name: version(name) for name in _VERSIONS} | {"python": platform.python_version()}
    return {"schema": 1, "scenario": {**scenario, "versions": versions}, "runs": [run.to_json() for run in runs]}


def show_results(scenario: Mapping[str, object], runs: Sequence[RunResult], console: Console | None = None) -> None:
    """Print the table, a sentence for each policy, and why requests were rejected."""
    console = console or Console()
    console.print(results_table(runs, width=console.width))
    baseline = baseline_of(runs)
    for run in runs:
        if run is not baseline:
            console.print(verdict(run, baseline), highlight=False)
    for reason, count in baseline.rejections.items():
        console.print(f"{count} of {baseline.requests} requests were rejected: {reason}", highlight=False)
