"""The tables of docs/evaluation/sizes.md: engine sizes by energy and risk, by the paper's rule, and the best size and
clock in hindsight.

Traces of others (../shared/data beside the checkout) are never part of the repository; without them nothing is run.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from throttllem.config import Options
from throttllem.core.clocks.policy import Policy, parse_policy
from throttllem.engines.simulated.fleet import build_fleet
from throttllem.files import write_aside
from throttllem.physics.catalogue import Catalogue
from throttllem.report.metrics import ATTAINMENT_SLACK, change, percent, saved, seconds, slo_met
from throttllem.sim.result import RunResult
from throttllem.sim.study import Scenario, Study, run_all
from tools.testbed.report import DATA, MissingError, markdown_rows, replace_between

COMMAND = "make numbers NUMBERS='--only sizes'"
BEGIN, END = f"<!-- sizes: written by `{COMMAND}` -->", "<!-- /sizes -->"
GPU, MODEL, SIZES = "a100-40gb-sxm", "llama-2-13b", (1, 2, 4)
POLICIES = ("triton", "throttllem+autoscale", "least-energy+autoscale")
STATIC_MHZ = (600, 705, 795, 900, 990, 1080, 1410)
"""Clocks of the static engines; each with every size."""
HEAD = (
    *("policy", "energy kJ", "against `triton`", "SLO attainment", "TTFT p50, p99", "E2E p99", "changes"),
    "% of time at TP 1, 2, 4",
)
BIN_S, DAYS, DAY_S = 600.0, (5, 8), 3600.0
"""Of the ServeGen shape: its bins, the days that are taken, and seconds of one in the simulation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One load: a generator or a file, its busiest minute (None: as it is), and the day that its rate repeats."""

    title: str
    trace: str
    peak_rps: float | None = None
    day_s: float = 86400.0
    seed: int = 0
    columns: str | None = None


def scenes(folder: Path) -> tuple[Scene, ...]:
    """Generated days, with seeds that nothing was tuned on, and recorded traces; files are written into `folder`."""
    traces = DATA / "traces"
    chat, code = traces / "azure_llm_2023_conv_first_half.csv", traces / "azure_llm_2023_code.csv"
    shape = traces / "servegen_m_small_rate_10min.csv"
    if not (chat.is_file() and code.is_file() and shape.is_file()):
        raise MissingError("the traces (../shared/data/traces beside the checkout) are not here")
    day = f"azure-conv-like:seconds={DAY_S:g},day={DAY_S:g}"
    return (
        Scene(title="a day of chat in an hour", trace=f"{day},rate=1.9", seed=2001),
        Scene(title="the same at half the rate", trace=f"{day},rate=0.95", seed=2002),
        Scene(title="an hour of Azure chat, slowed to 3 requests/s", trace=str(chat), peak_rps=3.0),
        Scene(title="an hour of Azure code", trace=str(code)),
        Scene(
            title="three days of the ServeGen shape in three hours",
            trace=str(_days(shape, chat, folder / "servegen-days.csv")),
            day_s=DAY_S,
            columns="arrival=arrival_s,prompt=prompt_tokens,generated=output_tokens,unit=s",
        ),
    )


def _days(shape: Path, chat: Path, file: Path) -> Path:
    """Poisson arrivals under the shape of those days, 4 requests/s in the busiest bin, with lengths of chat."""
    with shape.open(newline="") as rows:
        rates = np.array([float(row["rate_rps"]) for row in csv.DictReader(rows)])
    with chat.open(newline="") as rows:
        lengths = [(row["ContextTokens"], row["GeneratedTokens"]) for row in csv.DictReader(rows)]
    bins = round(86400.0 / BIN_S)
    rates = rates[DAYS[0] * bins : DAYS[1] * bins]
    bin_s = BIN_S * DAY_S / 86400.0
    dice = np.random.default_rng(2003)
    counts = dice.poisson(rates / rates.max() * 4.0 * bin_s)
    arrivals = np.sort(np.repeat(np.arange(counts.size) * bin_s, counts) + dice.random(counts.sum()) * bin_s)
    with file.open("w", newline="") as out:
        written = csv.writer(out)
        written.writerow(("arrival_s", "prompt_tokens", "output_tokens"))
        written.writerows((at_s, *lengths[dice.integers(len(lengths))]) for at_s in arrivals.tolist())
    return file


def prepared(scene: Scene, catalogue: Catalogue, cache_dir: Path) -> list[tuple[Scenario, Policy]]:
    """The policies on all sizes, then every size at every static clock, under the same SLOs. Policies that control
    their attainment are asked for as much of it as a static engine needs to count.
    """
    options = Options()
    options = options.model_copy(update={"autoscale": replace(options.autoscale, day_s=scene.day_s)})
    study = Study(
        gpu=GPU,
        model=MODEL,
        sizes=SIZES,
        trace=scene.trace,
        policies=POLICIES,
        peak_rps=scene.peak_rps,
        columns=scene.columns,
        seed=scene.seed,
        options=options,
    )
    scenario, policies = study.prepare(catalogue, cache_dir)
    scenario = replace(scenario, slo=replace(scenario.slo, attainment=1.0 - ATTAINMENT_SLACK))
    jobs = [(scenario, policy) for policy in policies]
    for tp in SIZES:
        fleet = build_fleet(catalogue, GPU, MODEL, (tp,), options.batching)
        for mhz in STATIC_MHZ:
            policy = parse_policy(f"fixed:{mhz}", fleet.clocks_mhz, fleet.sizes)
            jobs.append((replace(scenario, fleet=fleet), replace(policy, name=f"TP {tp} at {mhz:,} MHz all day")))
    return jobs


def best_static(baseline: RunResult, statics: Sequence[RunResult]) -> RunResult:
    """The static engine of least energy, chosen in hindsight among those as good as the baseline."""
    good = [run for run in statics if slo_met(run, baseline)]
    return min(good, key=lambda run: run.energy_j)


def row(run: RunResult, baseline: RunResult) -> tuple[str, ...]:
    """One line of a table."""
    ends = [*run.sizes[1:], (run.duration_s, 0)]
    shares = {tp: 0.0 for tp in SIZES}
    for (began_s, tp), (ended_s, _) in zip(run.sizes, ends, strict=True):
        shares[tp] += (ended_s - began_s) / run.duration_s
    scales = run.policy.endswith("+autoscale")
    return (
        f"`{run.policy}`" if run.policy in POLICIES else run.policy,
        f"{run.energy_j / 1e3:,.0f}",
        "" if run is baseline else f"{change(saved(run, baseline))} %",
        f"{percent(run.slo.completed_attainment)} %",
        f"{seconds(run.ttft_s.p50)}, {seconds(run.ttft_s.p99)} s",
        f"{seconds(run.e2e_s.p99)} s",
        f"{len(list(pairwise(run.sizes)))}" if scales else "",
        ", ".join(f"{share * 100:.0f}" for share in shares.values()) if scales else "",
    )


def write(root: Path, catalogue: Catalogue, cache_dir: Path, workers: int) -> None:
    """Run every scene, and fill the page and its JSON."""
    parts, figures = [], {}
    with TemporaryDirectory() as folder:
        for scene in scenes(Path(folder)):
            jobs = prepared(scene, catalogue, cache_dir)
            runs = run_all(jobs, workers=workers)
            parts.append(_part(scene, jobs[0][0], runs))
            figures[scene.title] = [run.to_json() for run in runs]
            print(parts[-1], flush=True)
    page = root / "docs/evaluation/sizes.md"
    replace_between(page, BEGIN, END, "\n\n".join(parts) + "\n")
    with write_aside(page.with_suffix(".json")) as aside:
        aside.write_text(json.dumps(figures, indent=1) + "\n")


def _part(scene: Scene, scenario: Scenario, runs: Sequence[RunResult]) -> str:
    trace, baseline = scenario.trace, runs[0]
    shown = [*runs[: len(POLICIES)], best_static(baseline, runs[len(POLICIES) :])]
    return (
        f"### {scene.title[0].upper()}{scene.title[1:]}\n\n"
        f"{trace.requests:,} requests in {trace.duration_s / 3600:.2g} h, busiest minute {trace.peak_rps:.2g}/s; "
        f"E2E SLO {scenario.slo.e2e_s:.3g} s.\n\n" + markdown_rows(HEAD, [row(run, baseline) for run in shown])
    )
