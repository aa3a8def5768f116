"""`throttllem reproduce`: run the paper's evaluation, judge every claim, show it as a table and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from throttllem.config import LengthOptions
from throttllem.physics.catalogue import Catalogue
from throttllem.profiling.score import ScoreCard
from throttllem.profiling.tables import Progress
from throttllem.report.basis import SIMULATED
from throttllem.report.metrics import ABSENT, change, milliseconds, percent
from throttllem.report.metrics import seconds as seconds_text
from throttllem.reproduce.claims import Outcome, Standing
from throttllem.reproduce.evidence import Evidence, label
from throttllem.reproduce.experiments import (
    BASELINE,
    ERROR,
    ORACLE,
    SECONDS,
    TRACE,
    Comparison,
    compare,
    engine_studies,
    half_load_study,
    size_study,
    summed,
)
from throttllem.reproduce.findings import outcomes as judged
from throttllem.reproduce.probes import PROFILED, clock_sweep, kv_correlation, score_card
from throttllem.sim.parallel import Task, side_by_side
from throttllem.sim.study import Study

_STYLES = {
    Standing.REPRODUCED: "green",
    Standing.BETTER: "bold green",
    Standing.NOT_REPRODUCED: "bold red",
    Standing.OURS: "cyan",
}
T = TypeVar("T")
_ID_WIDTH, _VERDICT_WIDTH = 18, 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """Every claim judged, and the runs behind it."""

    outcomes: tuple[Outcome, ...]
    evidence: Evidence

    @property
    def lengths(self) -> str:
        """How output lengths were predicted where a claim does not name the predictor."""
        return self.evidence.sizes.lengths

    @property
    def headline(self) -> str:
        """The first line of every output."""
        same = "as the gateway does" if self.lengths == "online" else "known in advance, which no gateway can"
        return (
            f"{SIMULATED} Output lengths: {self.lengths} ({same}); both-oracle: an oracle; both-30 and figures "
            '"at 30 % error": an oracle with 30 % error at p95.'
        )


def reproduce(
    catalogue: Catalogue,
    cache_dir: Path,
    *,
    workers: int,
    seed: int,
    trace: str | None = None,
    seconds: float = SECONDS,
    lengths: Literal["online", "oracle"] = "online",
    progress: Progress = lambda *_: None,
) -> Reproduction:
    """Every claim of the paper and of ours, in order. `trace` None: the built-in one; `seconds` cuts it once scaled.

    `lengths`: how output lengths are predicted where a claim does not name the predictor.
    Deterministic but for the decision times. Raises ValueError for a trace that cannot be read, or with which an engine
    completes no request.
    """
    source = trace or TRACE
    sweep = clock_sweep(catalogue, source, seed=seed)
    base = LengthOptions(predictor=lengths)
    studies = {
        name: [
            *engine_studies(source, lengths=predicted, seconds=seconds, seed=seed),
            size_study(source, lengths=predicted, seconds=seconds, seed=seed),
        ]
        for name, predicted in {"base": base, "oracle": ORACLE, "error": ERROR}.items()
        if name != "oracle" or base != ORACLE
    }
    half = half_load_study(source, lengths=base, seconds=seconds, seed=seed)
    cards = _prepare(studies["base"], catalogue, cache_dir, workers=workers, seed=seed, progress=progress)
    every = [study for group in studies.values() for study in group]
    found = compare([*every, half], catalogue, cache_dir, workers=workers, progress=progress)
    check_completed(found)
    groups = dict(zip(studies, batched(found[:-1], len(studies["base"])), strict=True))
    *engines, sizes = groups["base"]
    *engines_oracle, sizes_oracle = groups.get("oracle", groups["base"])
    *engines_error, sizes_error = groups["error"]
    evidence = Evidence(
        engines=tuple(engines),
        engines_oracle=tuple(engines_oracle),
        engines_error=tuple(engines_error),
        sizes=sizes,
        sizes_oracle=sizes_oracle,
        sizes_error=sizes_error,
        sizes_half=found[-1],
        cards=cards,
        correlation=kv_correlation(catalogue, seed=seed),
        sweep=sweep,
    )
    return Reproduction(outcomes=tuple(judged(evidence)), evidence=evidence)


def batched(values: Sequence[T], count: int) -> list[Sequence[T]]:
    """Parts of `count` values each."""
    return [values[start : start + count] for start in range(0, len(values), count)]


def runs_table(evidence: Evidence) -> Table:
    """Every run: energy against its baseline, SLOs, and TTFT, TPOT and E2E at p50 and p99."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("engine\npolicy, lengths")
    for head in ("energy\n%", "SLO\nmet %", "TTFT s\np50", "\np99", "TPOT ms\np50", "\np99", "E2E s\np50", "\np99"):
        table.add_column(head, justify="right", no_wrap=True)
    for comparison in (*evidence.comparisons, evidence.sizes_half):
        rate = comparison.baseline.requests / comparison.baseline.duration_s
        table.add_row(Text(f"{comparison.name}, {rate:.2f} requests/s", style="bold"))
        for run in comparison.runs.values():
            latencies = (
                text(value)
                for found, text in ((run.ttft_s, seconds_text), (run.tpot_s, milliseconds), (run.e2e_s, seconds_text))
                for value in (found.p50, found.p99)
            )
            saved = change(comparison.saved(run.policy)) if run.policy != BASELINE else ABSENT
            name = f"  {run.policy}, {comparison.lengths}"
            table.add_row(Text(name), saved, percent(run.slo.attainment), *latencies)
    return table


def claims_table(outcomes: Sequence[Outcome], width: int = 100) -> Group:
    """The table, the tally, and the reasons as a list."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, width=width)
    table.add_column("id", width=_ID_WIDTH, overflow="fold")
    table.add_column("claim", ratio=5, overflow="fold")
    table.add_column("paper", ratio=4, overflow="fold")
    table.add_column("ours", ratio=4, overflow="fold")
    table.add_column("verdict", width=_VERDICT_WIDTH, no_wrap=True)
    for outcome in outcomes:
        claim = outcome.claim
        verdict = Text(outcome.standing.value, style=_STYLES[outcome.standing])
        table.add_row(*(Text(part) for part in (claim.id, claim.text, claim.paper_text, outcome.ours_text)), verdict)
    reasons = Table.grid(padding=(0, 1, 0, 0))
    reasons.add_column(width=_ID_WIDTH, overflow="fold")
    reasons.add_column()
    for outcome in outcomes:
        if outcome.why:
            reasons.add_row(Text(outcome.claim.id), Text(outcome.why))
    return Group(table, Text(score(outcomes), style="bold"), Text(), reasons)


def reproduction_json(found: Reproduction) -> dict[str, object]:
    """Schema 1: what it rests on, the tally, every claim with figure, ours, verdict, reason, criterion and what was
    run, and the figures of every run.
    """
    return {
        "schema": 1,
        "basis": {"figures": "simulated", "statement": found.headline, "lengths": found.lengths},
        "score": score(found.outcomes),
        "tally": tally(found.outcomes),
        "claims": [outcome.to_json() for outcome in found.outcomes],
        "runs": [
            {"engine": comparison.name, "lengths": comparison.lengths, **run.to_json()}
            for comparison in (*found.evidence.comparisons, found.evidence.sizes_half)
            for run in comparison.runs.values()
        ],
    }


def tally(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Number of claims by verdict."""
    counts = Counter(outcome.standing for outcome in outcomes)
    return {standing.value: counts[standing] for standing in Standing}


def check_completed(comparisons: Sequence[Comparison]) -> None:
    """Raises ValueError for a run that completed no request: no claim can be judged by it."""
    for comparison in comparisons:
        for run in comparison.runs.values():
            if not run.completed:
                raise ValueError(
                    f"{label(comparison, run)}: none of {run.requests} requests was completed; give a longer trace, or "
                    f"one whose requests fit ({comparison.command})"
                )


def score(outcomes: Sequence[Outcome]) -> str:
    """The tally as a sentence."""
    counts = tally(outcomes)
    good = counts[Standing.REPRODUCED.value] + counts[Standing.BETTER.value]
    judged_in_all = good + counts[Standing.NOT_REPRODUCED.value]
    return (
        f"{good} of {judged_in_all} claims reproduced, {counts[Standing.BETTER.value]} of them better than the paper."
    )


def _prepare(
    studies: Sequence[Study], catalogue: Catalogue, cache_dir: Path, *, workers: int, seed: int, progress: Progress
) -> tuple[ScoreCard, ...]:
    """Fill the cache with what the studies need, and score the models."""
    tasks: list[Task[ScoreCard | None]] = [partial(_card, catalogue, model, sizes, seed) for model, sizes in PROFILED]
    tasks += [partial(_warm, study, catalogue, cache_dir) for study in reversed(studies)]
    whole = summed("profiling and characterising", len(tasks), progress)
    done = side_by_side(tasks, workers=workers, progress=whole)
    return tuple(card for card in done if card is not None)


def _card(catalogue: Catalogue, model: str, sizes: tuple[int, ...], seed: int, _: Callable[[float], None]) -> ScoreCard:
    return score_card(catalogue, model, sizes, seed=seed)


def _warm(study: Study, catalogue: Catalogue, cache_dir: Path, report: Callable[[float], None]) -> None:
    # Each stage begins at 0 again; characterising takes most of the time, so its share is reported.
    study.prepare(catalogue, cache_dir, lambda what, share: report(share if what == "characterising" else 0.0))
