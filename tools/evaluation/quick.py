"""A quick profile against a full one and against the truth: on GPUs with random constants, and on published sweeps.

Both profiles are simulated measurements with scatter of the same GPU; what a table costs is simulated, too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from throttllem.calibrate.fit import with_constants
from throttllem.calibrate.prior import around, priors
from throttllem.calibrate.quick import quick_law, quick_table
from throttllem.config import Options
from throttllem.core.clocks.policy import parse_policy
from throttllem.core.forecast.performance_table import Calibrated, PerformanceTable
from throttllem.core.types import EngineSpec, Slo
from throttllem.engines.simulated.fleet import Fleet, build_fleet
from throttllem.physics.catalogue import Catalogue, Gpu
from throttllem.physics.engine import EnginePhysics
from throttllem.profiling.bake import bake
from throttllem.profiling.live.plan import LivePlan, LivePoint, live_points, quick_plan
from throttllem.profiling.live.run import chosen_clocks, quick_clocks
from throttllem.profiling.measure import Point, blocks, measured_row
from throttllem.profiling.profile import COLUMNS, OPTIONAL, ProfileError, spec_of
from throttllem.profiling.tabulate import tabulate
from throttllem.profiling.train import train
from throttllem.sim import parallel
from throttllem.sim.characterize import Capacity
from throttllem.sim.study import Scenario
from throttllem.sim.traces.trace import load_trace
from tools.evaluation.quick_sweeps import sweep_tables
from tools.testbed.report import Section, Table, Workspace

KINDS = ("a100-40gb-pcie", "h100-80gb-sxm", "a40-48gb", "l40s-48gb")
MODEL = "llama-3-8b"
GPUS_OF_A_KIND = 5
SEED = 1000
"""Of the first GPU; other seeds served to choose clocks and points."""
SCATTER = (0.02, 0.03)
"""Of single measurements of seconds and watts: that of published ones."""
MOVED = 0.5
"""Constants move by this part of their prior's spread, knees by the whole."""
EVALUATED = 2000
BATCH, SECONDS = 24, 300.0
"""Mean batch that the load makes at the top clock, and how long it lasts."""
TEXT = """\
A quick profile is `profile --quick`: some ten batches at four clocks, ten minutes. A full one is `profile` with its
defaults: 60 points at eight clocks. Both are **simulated** measurements of GPUs that do not exist: the constants of
{kinds}
are moved at random, by half of their prior's spread (knees by the whole), {count} GPUs in all; single measurements
scatter by 2 % in seconds and 3 % in watts. The law's form is the fitted one, so errors of the form do not show here;
the published sweeps below have them.

*Errors* are against the GPU's true law at {points:,} random points (batch, KV, clock from the lowest of the quick
profile on; three in ten with a prompt), where no profile measured. *Stated* is the error that the law carries: p90 of
held-out clocks or batch sizes, with scatter (a table adds the error of its cells). *Cost* is what `least-energy` spends
with a table on five minutes of `azure-conv-like` at a mean batch of {batch}, against the same policy with a table of
the true law, on the true GPU; *saving* is against the maximum clock. SLOs: 1.5 times the seconds of a token at that
batch, and twice the E2E of 500 tokens. *Attainment* is that of completed requests. With the quick table the stated
error is reserved of every SLO, as `serve` does it. Less energy than with the true law's table is within what a slightly
different attainment is worth.

A full profile costs more here because trees know only the clocks that were measured: with eight from the lowest to the
highest the best clock is often between two of them. A quick profile is worse where watts bend between its upper two
clocks (a knee of watts at 0.9 of the top): watts there are off by up to the p95 shown.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A table against the truth: relative errors (median, p95) of seconds and watts, joules of a run, attainment."""

    seconds: tuple[float, float]
    watts: tuple[float, float]
    energy_j: float
    attainment: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One random GPU. `refused`: the error of `train`, in which case nothing else is known of the quick profile."""

    kind: str
    seed: int
    knees: tuple[float, float]
    """Of memory and of watts, as fractions of the top clock."""
    top_j: float = 0.0
    truth_j: float = 0.0
    truth_attainment: float = 0.0
    quick: Judged | None = None
    full: Judged | None = None
    stated: Calibrated | None = None
    refused: str | None = None


def section(workspace: Workspace) -> Section:
    """All GPUs, two at a time, and the sweeps."""
    jobs = [(kind, SEED + number) for number in range(1 if workspace.quick else GPUS_OF_A_KIND) for kind in KINDS]
    tasks = [functools.partial(_trial, kind, seed) for kind, seed in jobs]
    trials = parallel.side_by_side(tasks, workers=2, progress=lambda index, share: None)
    used = [trial for trial in trials if trial.quick and trial.full]
    for trial in trials:
        workspace.report(f"{trial.kind} {trial.seed}: {trial.refused or _words(trial)}")
    text = TEXT.format(kinds=", ".join(KINDS), count=len(trials), points=EVALUATED, batch=BATCH)
    tables = (_errors(used), _costs(used), _each(trials), *sweep_tables())
    return Section(title="Quick against full profile", text=text, tables=tables, results={"trials": trials})


# ---- one GPU -----------------------------------------------------------------------------------------------------


def moved_gpu(like: Gpu, seed: int) -> Gpu:
    """A GPU that does not exist; constants that are zero stay so."""
    rng, values = np.random.default_rng(seed), {}
    for constant in around(like, priors(like), like):
        share = 2 * MOVED if constant.path.endswith("knee_mhz") else MOVED
        value = constant.start * float(np.exp(rng.normal(0.0, share * constant.spread)))
        values[constant.path] = min(max(value, 1.02 * constant.low), 0.98 * constant.high)
    return with_constants(like, values)


def quick_profile(engine: EnginePhysics, spec: EngineSpec, clocks_mhz: Iterable[int], seed: int) -> pl.DataFrame:
    """What `profile --quick` would measure of that engine, with scatter."""
    return _measured(engine, spec, quick_plan(), clocks_mhz, seed).with_columns(quick=pl.lit(1))


def full_profile(engine: EnginePhysics, spec: EngineSpec, seed: int) -> pl.DataFrame:
    """What `profile` with its defaults would."""
    return _measured(engine, spec, LivePlan(), chosen_clocks(spec.clocks_mhz, None), seed)


def _measured(
    engine: EnginePhysics, spec: EngineSpec, plan: LivePlan, clocks_mhz: Iterable[int], seed: int
) -> pl.DataFrame:
    points = [
        (point.number, iteration)
        for point in live_points(spec, plan)
        for clock in clocks_mhz
        for iteration in _iterations(point, clock, plan, spec)
    ]
    rows = [(*measured_row(engine, spec, iteration), number) for number, iteration in points]
    schema = {column.name: column.dtype for column in (*COLUMNS, *OPTIONAL)} | {"point": pl.Int64}
    frame, rng = pl.DataFrame(rows, schema=schema, orient="row"), np.random.default_rng(seed)
    scattered = {
        name: frame[name] * np.exp(rng.normal(0.0, scatter, frame.height))
        for name, scatter in zip(("seconds", "watts"), SCATTER, strict=True)
    }
    return frame.with_columns(**scattered)


def _iterations(point: LivePoint, clock_mhz: int, plan: LivePlan, spec: EngineSpec) -> Iterator[Point]:
    """Decode steps while contexts grow, then each burst of prompts."""
    for step in range(plan.steps if point.batch else 0):
        held = point.batch * blocks(point.context_tokens + 16 * step, spec)
        yield Point(clock_mhz=clock_mhz, decode_batch=point.batch, decode_blocks=min(held, spec.kv_blocks))
    for number, burst in enumerate(point.bursts):
        length = point.context_tokens + 16 * plan.steps + 64 * number
        prompts = (burst.tokens,) * burst.count
        own = sum(blocks(tokens, spec) for tokens in prompts)
        held = min(point.batch * blocks(length, spec), spec.kv_blocks - own)
        yield Point(clock_mhz=clock_mhz, decode_batch=point.batch, decode_blocks=held, prompts=prompts)


def table_errors(table: PerformanceTable, engine: EnginePhysics, spec: EngineSpec, seed: int) -> NDArray[np.float64]:
    """Relative errors of seconds and watts against the true law, at random points: shape (EVALUATED, 2)."""
    rng, found, names = np.random.default_rng(seed), list[tuple[float, float]](), [column.name for column in COLUMNS]
    while len(found) < EVALUATED:
        clock, batch = int(rng.choice(table.clocks_mhz)), round(spec.max_batch ** rng.random())
        context = int(64 * 64 ** rng.random())
        prompts = (int(16 * 500 ** rng.random()),) if rng.random() < 0.3 else ()
        own = sum(blocks(tokens, spec) for tokens in prompts)
        held = min(batch * blocks(context, spec), spec.kv_blocks - own)
        if held < batch or sum(prompts) + batch > spec.prefill_budget_tokens:
            continue
        point = Point(clock_mhz=clock, decode_batch=batch, decode_blocks=held, prompts=prompts)
        row: dict[str, Any] = dict(zip(names, measured_row(engine, spec, point), strict=False))
        got = table.at(clock, row["batch"], row["kv_blocks"], row["prefill_tokens"])
        found.append((got[0] / row["seconds"] - 1, got[1] / row["watts"] - 1))
    return np.array(found)


def _trial(kind: str, seed: int, progress: object = None) -> Trial:
    like, catalogue = Catalogue.load().gpu(kind), Catalogue.load()
    true, model = moved_gpu(like, seed), catalogue.model(MODEL)
    knees = (true.time.memory_knee_mhz / true.clock_max_mhz, true.power.knee_mhz / true.clock_max_mhz)
    engine = EnginePhysics(true, model, 1)
    fleet = replace(build_fleet(catalogue, kind, MODEL, (1,), Options().batching), physics={1: engine})
    spec = fleet.specs[1]
    trial = Trial(kind=kind, seed=seed, knees=knees)
    try:
        law = quick_law(quick_profile(engine, spec, quick_clocks(like), seed), like, model, Path("quick.csv"))
    except ProfileError as error:
        return replace(trial, refused=str(error))
    quick, profile = quick_table(law, model, spec), full_profile(engine, spec, seed + 1)
    full = bake(train(profile), spec_of(profile, spec))
    run = _Runs(fleet)
    top_j, _ = run("triton", None)
    truth_j, attainment = run(
        "least-energy", tabulate(engine, spec, Calibrated(clocks_mhz=(), seconds_error=0, watts_error=0))
    )
    judged = [
        _judged(table, table_errors(_from(table, quick.clocks_mhz[0]), engine, spec, seed), run("least-energy", table))
        for table in (quick, full)
    ]
    return replace(
        trial,
        top_j=top_j,
        truth_j=truth_j,
        truth_attainment=attainment,
        quick=judged[0],
        full=judged[1],
        stated=law.basis,
    )


def _from(table: PerformanceTable, clock_mhz: int) -> PerformanceTable:
    """Without the clocks below."""
    first = next(index for index, mhz in enumerate(table.clocks_mhz) if mhz >= clock_mhz)
    seconds, watts = table.seconds[:, first:], table.watts[:, first:]
    return replace(table, clocks_mhz=table.clocks_mhz[first:], seconds=seconds, watts=watts)


def _judged(table: PerformanceTable, errors: NDArray[np.float64], run: tuple[float, float]) -> Judged:
    (median_s, median_w), (p95_s, p95_w) = np.quantile(np.abs(errors), [0.5, 0.95], axis=0).tolist()
    return Judged(seconds=(median_s, p95_s), watts=(median_w, p95_w), energy_j=run[0], attainment=run[1])


class _Runs:
    """Simulates policies on one true engine under one load."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, spec, engine = fleet, fleet.specs[1], fleet.physics[1]
        trace, top = load_trace("azure-conv-like", seed=SEED), spec.clocks_mhz[-1]
        context = trace.mean_context_tokens
        token_s = engine.iteration(top, BATCH, BATCH * context, 0, 0.0)[0]
        prompt, output = float(trace.arrays.prompt_tokens.mean()), float(trace.arrays.output_tokens.mean())
        prompt_s = engine.iteration(top, BATCH, BATCH * context, round(prompt), prompt**2 / 2)[0] - token_s
        rate = 1 / (prompt_s + output * token_s / BATCH)
        load = trace.requests / trace.duration_s
        self.trace = trace.scaled(peak_rps=trace.peak_rps * rate / load).cut(SECONDS)
        stretched_s = token_s + rate * prompt_s * token_s
        self.slo = Slo(e2e_s=2 * 500 * stretched_s, tbt_s=1.5 * stretched_s)
        self.capacity = Capacity(
            tp=1, max_rps=rate, e2e_p99_s=self.slo.e2e_s or 0, tbt_p99_s=0, tokens_per_joule=0, rejected=0
        )

    def __call__(self, policy: str, table: PerformanceTable | None) -> tuple[float, float]:
        """Joules, and the share of completed requests that met every SLO."""
        options = Options()
        if table is not None and table.calibrated is not None:
            margin = max(options.throttle.margin, table.calibrated.seconds_error)
            options = options.model_copy(
                update={
                    "throttle": replace(options.throttle, margin=margin),
                    "admission": replace(options.admission, margin=margin),
                }
            )
        scenario = Scenario(
            fleet=self.fleet,
            trace=self.trace,
            tables={} if table is None else {1: table},
            capacities={1: self.capacity},
            slo=self.slo,
            options=options.model_copy(update={"length": replace(options.length, predictor="oracle")}),
            seed=SEED,
        )
        found = scenario.run(parse_policy(policy, self.fleet.clocks_mhz, (1,)))
        return found.energy_j, found.slo.completed_attainment


# ---- tables ------------------------------------------------------------------------------------------------------


def _words(trial: Trial) -> str:
    assert trial.quick
    assert trial.full
    return f"quick {trial.quick.energy_j / trial.truth_j - 1:+.1%}, full {trial.full.energy_j / trial.truth_j - 1:+.1%}"


def _errors(trials: Sequence[Trial]) -> Table:
    rows = []
    for name in ("quick", "full"):
        found = [judged for trial in trials if (judged := getattr(trial, name))]
        cells = [_spread([each[place] for each in values]) for values in _both(found) for place in (0, 1)]
        stated = [trial.stated for trial in trials if trial.stated]
        own = [_spread([getattr(each, what) for each in stated]) for what in ("seconds_error", "watts_error")]
        rows.append((name, *cells, *(own if name == "quick" else ("", ""))))
    head = ("profile", "seconds: median", "p95", "watts: median", "p95", "stated: seconds", "watts")
    return Table(caption=f"Errors over {len(trials)} GPUs: median of the GPUs (worst).", head=head, rows=rows)


def _both(found: Sequence[Judged]) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    return [each.seconds for each in found], [each.watts for each in found]


def _costs(trials: Sequence[Trial]) -> Table:
    rows = []
    for name in ("quick", "full"):
        found = [(trial, judged) for trial in trials if (judged := getattr(trial, name))]
        cost = [judged.energy_j / trial.truth_j - 1 for trial, judged in found]
        saving = [1 - judged.energy_j / trial.top_j for trial, judged in found]
        less = [trial.truth_attainment - judged.attainment for trial, judged in found]
        rows.append(
            (
                name,
                f"{_mean(cost):+.1%}",
                f"{max(cost):+.1%}",
                f"{_mean(saving):.1%}",
                f"{100 * _mean(less):+.2f}",
                f"{100 * max(less):+.2f}",
            )
        )
    truth = [1 - trial.truth_j / trial.top_j for trial in trials]
    rows.append(("true law", "0", "0", f"{_mean(truth):.1%}", "0", "0"))
    head = (
        "table of",
        "energy above the true law: mean",
        "worst",
        "saving: mean",
        "attainment lost, points: mean",
        "worst",
    )
    return Table(caption="What a table costs (simulated).", head=head, rows=rows)


def _each(trials: Sequence[Trial]) -> Table:
    rows: list[tuple[str, ...]] = []
    for trial in trials:
        first = (trial.kind, f"{trial.knees[0]:.2f}, {trial.knees[1]:.2f}")
        if not (trial.quick and trial.full):
            rows.append(
                (*first, f"refused: {str(trial.refused).partition(': ')[2].partition('.')[0]}", "", "", "", "", "")
            )
            continue
        cells = [
            f"{value:.1%}"
            for value in (trial.quick.seconds[1], trial.full.seconds[1], trial.quick.watts[1], trial.full.watts[1])
        ]
        costs = [f"{judged.energy_j / trial.truth_j - 1:+.1%}" for judged in (trial.quick, trial.full)]
        rows.append((*first, *cells, *costs))
    head = ("like", "knees", "seconds p95: quick", "full", "watts p95: quick", "full", "energy: quick", "full")
    caption = "Each GPU. *Knees*: of memory and of watts, as fractions of the top clock."
    return Table(caption=caption, head=head, rows=rows)


def _spread(values: Sequence[float]) -> str:
    return f"{float(np.median(values)):.1%} ({max(values):.1%})" if values else "-"


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
