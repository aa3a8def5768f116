"""`throttllem reproduce`: run the paper's evaluation, judge every claim, show it as a table and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from throttllem.physics.catalogue import Catalogue
from throttllem.profiling.score import ScoreCard
from throttllem.profiling.tables import Progress
from throttllem.reproduce.claims import Outcome, Standing
from throttllem.reproduce.evidence import Evidence, label
from throttllem.reproduce.experiments import (
    LENGTH_ERROR,
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
    Standing.CALIBRATED: "dim",
    Standing.OURS: "cyan",
}
_ID_WIDTH, _VERDICT_WIDTH = 18, 14


def reproduce(
    catalogue: Catalogue,
    cache_dir: Path,
    *,
    workers: int,
    seed: int,
    trace: str | None = None,
    seconds: float = SECONDS,
    progress: Progress = lambda *_: None,
) -> list[Outcome]:
    """Every claim of the paper and of ours, in order. `trace` None: the built-in one; `seconds` cuts it once scaled.

    Deterministic but for the decision times. Raises ValueError for a trace that cannot be read, or with which an engine
    completes no request.
    """
    source = trace or TRACE
    sweep = clock_sweep(catalogue, source, seed=seed)
    oracle, noisy = (
        [
            *engine_studies(source, length_error=error, seconds=seconds, seed=seed),
            size_study(source, length_error=error, seconds=seconds, seed=seed),
        ]
        for error in (0.0, LENGTH_ERROR)
    )
    cards = _prepare(oracle, catalogue, cache_dir, workers=workers, seed=seed, progress=progress)
    half = half_load_study(source, seconds=seconds, seed=seed)
    found = compare([*oracle, *noisy, half], catalogue, cache_dir, workers=workers, progress=progress)
    check_completed(found)
    *engines, sizes = found[: len(oracle)]
    *engines_error, sizes_error, sizes_half = found[len(oracle) :]
    return judged(
        Evidence(
            engines=tuple(engines),
            engines_error=tuple(engines_error),
            sizes=sizes,
            sizes_error=sizes_error,
            sizes_half=sizes_half,
            cards=cards,
            correlation=kv_correlation(catalogue, seed=seed),
            sweep=sweep,
        )
    )


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
    return Group(table, Text(_tally(outcomes), style="bold"), Text(), reasons)


def outcomes_json(outcomes: Sequence[Outcome]) -> dict[str, object]:
    """Schema 1: the tally, and every claim with figure, ours, verdict, reason, criterion and what was run."""
    return {"schema": 1, "tally": tally(outcomes), "claims": [outcome.to_json() for outcome in outcomes]}


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


def _tally(outcomes: Sequence[Outcome]) -> str:
    counts = tally(outcomes)
    good = counts[Standing.REPRODUCED.value] + counts[Standing.BETTER.value]
    judged_in_all = good + counts[Standing.NOT_REPRODUCED.value]
    return (
        f"{good} of {judged_in_all} claims reproduced, {counts[Standing.BETTER.value]} of them better than the paper; "
        f"{counts[Standing.CALIBRATED.value]} are calibration points and do not count."
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
