"""The figures of a run that tables show: what each is called, how it is written, whether it is good or bad.

One list for the terminal and for the page. Percentages compare with the baseline (see verdict.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from throttllem.report.quantity import ABSENT, change, kilojoules, milliseconds, percent, seconds
from throttllem.report.verdict import factor, is_promise_kept, saved
from throttllem.sim.result import RunResult


class Tone(StrEnum):
    """How a figure compares: with the promise, or with the baseline."""

    PLAIN = "plain"
    GOOD = "good"
    BAD = "bad"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One figure of a run: `text(run, baseline)` writes it, `tone(run, baseline)` judges it.

    `header` is the terminal's (two lines), `title` the page's. `rank` 0 is always shown; the highest is left out first.
    """

    group: str
    title: str
    header: str
    rank: int
    text: Callable[[RunResult, RunResult], str]
    tone: Callable[[RunResult, RunResult], Tone] = lambda run, baseline: Tone.PLAIN


def _saved_text(run: RunResult, baseline: RunResult) -> str:
    return ABSENT if run is baseline else change(saved(run, baseline))


def _saved_tone(run: RunResult, baseline: RunResult) -> Tone:
    fraction = saved(run, baseline)
    if run is baseline or fraction is None or abs(fraction) < 5e-4:
        return Tone.PLAIN
    return Tone.GOOD if fraction > 0 else Tone.BAD


def _factor_text(run: RunResult, baseline: RunResult) -> str:
    ratio = factor(run, baseline)
    return ABSENT if run is baseline or ratio is None else f"{ratio:.2f}x"


def _attainment_tone(run: RunResult, baseline: RunResult) -> Tone:
    return Tone.PLAIN if is_promise_kept(run, baseline) else Tone.BAD


def _against(promise_s: float | None, value_s: float | None) -> Tone:
    if promise_s is None or value_s is None:
        return Tone.PLAIN
    return Tone.BAD if value_s > promise_s else Tone.GOOD


def _loss_tone(count: Callable[[RunResult], int]) -> Callable[[RunResult, RunResult], Tone]:
    return lambda run, baseline: Tone.BAD if count(run) > count(baseline) else Tone.PLAIN


def _timing(title: str, header: str, rank: int, pick: Callable[[RunResult], float | None], *, short: bool) -> Metric:
    write = milliseconds if short else seconds
    unit = "ms" if short else "s"
    return Metric(
        group="Latency",
        title=f"{title}, {unit}",
        header=header,
        rank=rank,
        text=lambda run, _: write(pick(run)),
    )


METRICS: tuple[Metric, ...] = (
    Metric(
        group="Energy",
        title="Energy, kJ",
        header="energy\nkJ",
        rank=0,
        text=lambda run, _: kilojoules(run.energy_j),
    ),
    Metric(
        group="Energy",
        title="Energy against the baseline, %",
        header="vs\nbase %",
        rank=0,
        text=_saved_text,
        tone=_saved_tone,
    ),
    Metric(
        group="Energy",
        title="of it with no request running, kJ",
        header="idle\nkJ",
        rank=13,
        text=lambda run, _: kilojoules(run.idle_energy_j),
    ),
    Metric(
        group="Energy",
        title="Tokens per joule",
        header="tok\n/J",
        rank=1,
        text=lambda run, _: f"{run.tokens_per_joule:.3f}",
    ),
    Metric(
        group="Energy",
        title="Tokens per joule against the baseline",
        header="tok/J\ngain",
        rank=0,
        text=_factor_text,
        tone=_saved_tone,
    ),
    Metric(
        group="Energy",
        title="Mean clock, MHz",
        header="clock\nMHz",
        rank=1,
        text=lambda run, _: f"{run.mean_clock_mhz:.0f}",
    ),
    Metric(
        group="Energy",
        title="Clock switches",
        header="swit-\nches",
        rank=8,
        text=lambda run, _: f"{run.clock_switches:,}",
    ),
    Metric(
        group="Promises",
        title="SLO attainment, %",
        header="SLO\nmet %",
        rank=0,
        text=lambda run, _: percent(run.slo.attainment),
        tone=_attainment_tone,
    ),
    Metric(
        group="Latency",
        title="E2E p99, s",
        header="E2E\np99 s",
        rank=0,
        text=lambda run, _: seconds(run.e2e_s.p99),
        tone=lambda run, _: _against(run.slo.e2e_s, run.e2e_s.p99),
    ),
    _timing("TPOT, mean", "TPOT\nms", 3, lambda run: run.tpot_s.mean, short=True),
    _timing("TBT (single gaps) p99", "TBT99\nms", 5, lambda run: run.tbt_s.p99, short=True),
    _timing("TTFT p50", "TTFT\np50 s", 9, lambda run: run.ttft_s.p50, short=False),
    _timing("TTFT p99", "TTFT\np99 s", 6, lambda run: run.ttft_s.p99, short=False),
    _timing("Queue p99", "queue\np99 s", 12, lambda run: run.queue_s.p99, short=False),
    Metric(
        group="Requests",
        title="Completed",
        header="\ndone",
        rank=7,
        text=lambda run, _: f"{run.completed:,}",
    ),
    Metric(
        group="Requests",
        title="Rejected",
        header="re-\nject",
        rank=2,
        text=lambda run, _: f"{run.rejected:,}",
        tone=_loss_tone(lambda run: run.rejected),
    ),
    Metric(
        group="Requests",
        title="Completed, but marked lost",
        header="\nlost",
        rank=4,
        text=lambda run, _: f"{run.lost:,}",
        tone=_loss_tone(lambda run: run.lost),
    ),
    Metric(
        group="Requests",
        title="Preemptions",
        header="pre-\nempt",
        rank=11,
        text=lambda run, _: f"{run.preemptions:,}",
    ),
    Metric(
        group="Controller",
        title="Mean projection error of batch, %",
        header="batch\nerr %",
        rank=14,
        text=lambda run, _: percent(run.projection_error.batch if run.projection_error else None, decimals=2),
    ),
    Metric(
        group="Controller",
        title="Mean projection error of KV, %",
        header="KV\nerr %",
        rank=15,
        text=lambda run, _: percent(run.projection_error.kv if run.projection_error else None, decimals=2),
    ),
    Metric(
        group="Controller",
        title="One decision p99, ms",
        header="decide\np99 ms",
        rank=16,
        text=lambda run, _: ABSENT if run.decision_s.p99 is None else f"{run.decision_s.p99 * 1e3:.2f}",
    ),
)
