"""The tables of docs/evaluation/savings.md, and what the README says of the demo."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from throttllem.files import write_aside
from throttllem.physics.catalogue import Catalogue
from throttllem.report.certainty import saving_interval
from throttllem.report.metrics import change, milliseconds, percent, saved, seconds
from throttllem.sim.result import RunResult
from throttllem.sim.study import MAXIMUM, Study, run_all
from tools.testbed.report import markdown_rows, replace_between

COMMAND = "make numbers NUMBERS='--only savings'"
END = "<!-- /savings -->"
DEMO = Study(
    gpu="a100-40gb-sxm",
    model="llama-2-13b",
    sizes=(4,),
    trace="azure-conv-like:seconds=1800",
    policies=("triton", "throttllem", "least-energy"),
    peak_rps=MAXIMUM,
)
SIZED = Study(
    gpu="a100-40gb-sxm",
    model="llama-2-13b",
    sizes=(1, 2, 4),
    trace="azure-conv-like",
    policies=("triton", "triton+autoscale", "throttllem+autoscale", "least-energy+autoscale"),
    peak_rps=3.0,
    seconds=1800.0,
)


def mark(name: str) -> str:
    """The mark at which a part begins."""
    return f"<!-- savings {name}: written by `{COMMAND}` -->"


def rows(runs: Sequence[RunResult]) -> str:
    """A table of runs, the first of which is the baseline."""
    head = (
        *("policy", "energy kJ", "tokens/J", "SLO attainment", "TTFT p50, p99", "TPOT p50, p99", "E2E p50, p99"),
        "mean clock",
    )
    return markdown_rows(head, [_row(run, runs[0]) for run in runs])


def _row(run: RunResult, baseline: RunResult) -> tuple[str, ...]:
    interval = saving_interval(run, baseline)
    chance = f", ±{interval[0] * 100:.1f}" if interval else ""
    against = "" if run is baseline else f" ({change(saved(run, baseline))} %{chance})"
    return (
        f"`{run.policy}`",
        f"{run.energy_j / 1e3:,.0f}{against}",
        f"{run.tokens_per_joule:.3f}",
        f"{percent(run.slo.attainment)} %",
        f"{seconds(run.ttft_s.p50)}, {seconds(run.ttft_s.p99)} s",
        f"{milliseconds(run.tpot_s.p50)}, {milliseconds(run.tpot_s.p99)} ms",
        f"{seconds(run.e2e_s.p50)}, {seconds(run.e2e_s.p99)} s",
        f"{run.mean_clock_mhz:.0f} MHz",
    )


def write(root: Path, catalogue: Catalogue, cache_dir: Path, workers: int) -> None:
    """Run both scenarios, the demo's also with other predictions of lengths, and fill page and README."""
    demo, policies = DEMO.prepare(catalogue, cache_dir)
    sized, sizes = SIZED.prepare(catalogue, cache_dir)
    jobs = [
        *((demo, policy) for policy in policies),
        *((demo.with_lengths(other), policies[-1]) for other in ("oracle", "max-tokens")),
        *((sized, policy) for policy in sizes),
    ]
    runs = run_all(jobs, workers=workers)
    baseline, ours = runs[0], runs[2]
    page = root / "docs/evaluation/savings.md"
    took, oracle, limits = (f"{change(saved(run, baseline))} %" for run in (ours, *runs[3:5]))
    lengths = (
        "Output lengths are predicted online, as the gateway does it. With an oracle `least-energy` would take "
        f"{oracle} instead of {took}, with each request's `max_tokens` {limits}."
    )
    replace_between(page, mark("demo"), END, f"{rows(runs[:3])}\n\n{lengths}\n")
    replace_between(page, mark("sizes"), END, f"{rows(runs[5:])}\n")
    text = (
        f"In this simulation `least-energy` ends {percent(saved(ours, baseline))} % below the energy of the maximum "
        f"clock, at {percent(ours.slo.attainment)} % SLO attainment ({percent(baseline.slo.attainment)} % there).\n"
        "Nothing of it is measured: watts are modelled, no clock was set "
        "([what it rests on](docs/evaluation/savings.md)).\n"
    )
    replace_between(root / "README.md", mark("demo"), END, text)
    with write_aside(page.with_suffix(".json")) as aside:
        aside.write_text(json.dumps({"runs": [run.to_json() for run in runs]}, indent=1) + "\n")
