"""What was seen of an engine, as rows: from its own steps, else from the arrival of tokens at our end.

A row is kept only where everything in its iteration is known: who decoded, which prompts came whole. Times that were
taken outside the engine come late now and then, and the next one too soon: such rows are means over neighbours.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from throttllem.engines.base import Report
from throttllem.profiling.live.answer import Answer
from throttllem.profiling.live.plan import WINDOW_STEPS

STEPS, STREAMS = "steps", "streams"
WINDOW_S = 0.05
"""A row that is not exact covers so much time, or WINDOW_STEPS: a few milliseconds are what a time may be late."""
IMPLAUSIBLE = 4
NEIGHBOURS_S = 0.025
MOST_NEIGHBOURS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One iteration: `batch` requests of which `prompts` are new, with `prefill_tokens` in all. `by`: who timed it."""

    batch: int
    kv_blocks: int
    prefill_tokens: int
    prompts: int
    prefill_pairs: float
    seconds: float
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How rows are taken. `exact`: the engine timed its steps itself. `decode_s`: seconds per step of the batch as it
    decodes; None: not known yet.
    """

    batch: int
    exact: bool
    decode_s: float | None = None

    @property
    def neighbours(self) -> int:
        """Steps on either side of one that are looked at with it."""
        if self.exact or not self.decode_s:
            return 0
        return max(1, min(MOST_NEIGHBOURS, math.ceil(NEIGHBOURS_S / self.decode_s)))


def decode_sequences(reports: Sequence[Report], pace: Pace) -> list[Row]:
    """Rows of steps with exactly `pace.batch` decode rows and no prompt."""
    rows, window, spent_s = [], 0, 0.0
    for report in reports:
        if not report.seconds or not report.kv_blocks or not _decodes(report, pace.batch):
            window, spent_s = 0, 0.0
            continue
        window, spent_s = window + 1, spent_s + report.seconds
        if pace.exact or _whole(window, spent_s):
            rows.append(_row(pace.batch, report.kv_blocks, (), spent_s / window, STEPS))
            window, spent_s = 0, 0.0
    # A whole window that was heard of at once says nothing.
    usual_s = statistics.median(row.seconds for row in rows) if rows else 0.0
    return [row for row in rows if row.seconds > usual_s / IMPLAUSIBLE]


def prefill_rows(reports: Sequence[Report], lengths: Sequence[int], block_tokens: int, pace: Pace) -> list[Row]:
    """Rows of steps that held `pace.batch` decode rows and whole ones of the prompts of these `lengths`."""
    rows, before = [], None
    for place, report in enumerate(reports):
        among = _prompts_in(report, lengths, pace.batch)
        if not report.prompt_tokens and _decodes(report, pace.batch):
            before = report.kv_blocks
        if not among or (pace.batch and before is None):
            continue
        # The prompts' own blocks may be free again when the engine tells of the step.
        held = (before or 0) + sum(-(-tokens // block_tokens) for tokens in among)
        seconds = report.seconds if pace.decode_s is None else _apart(reports, place, pace.neighbours, pace.decode_s)
        if seconds:
            rows.append(_row(pace.batch + len(among), held, among, seconds, STEPS))
    return rows


def window_rows(answers: Sequence[Answer], block_tokens: int) -> list[Row]:
    """Decode rows from streams: windows of tokens while all `answers` ran, each the median over them."""
    begin_s = max(answer.times_s[0] for answer in answers)
    end_s = min(answer.times_s[-1] for answer in answers)
    first, rows, since = answers[0], [], None
    for place, when_s in enumerate(first.times_s):
        if not begin_s <= when_s <= end_s:
            continue
        if since is None:
            since = place
        from_s = first.times_s[since]
        if not _whole(first.tokens[place] - first.tokens[since], when_s - from_s):
            continue
        paces = [found for answer in answers if (found := mean_gap(answer, from_s, when_s)) is not None]
        if paces:
            held = kv_blocks(answers, (from_s + when_s) / 2, block_tokens)
            rows.append(_row(len(answers), held, (), statistics.median(paces), STREAMS))
        since = place
    return rows


def burst_rows(answers: Sequence[Answer], prompts: Sequence[Answer], block_tokens: int, pace: Pace) -> Iterator[Row]:
    """Rows of prompts that fell among decoding `answers`, from the delay of their tokens that the prompts made.

    The iteration that brought a prompt's first token brought a token to every answer too.
    """
    votes = [vote for answer in answers if (vote := _vote(answer, prompts, pace)) is not None]
    if not votes:
        return
    (together, _), *_ = Counter(places for places, _ in votes).most_common(1)
    for group in range(max(together) + 1):
        members = [prompt for prompt, place in zip(prompts, together, strict=True) if place == group]
        seconds = statistics.median(found[group] for places, found in votes if places == together)
        held = kv_blocks(answers, statistics.median(prompt.times_s[0] for prompt in members), block_tokens)
        lengths = [prompt.prompt_tokens for prompt in members]
        held += sum(-(-tokens // block_tokens) for tokens in lengths)
        yield _row(len(answers) + len(members), held, lengths, seconds, STREAMS)


def lone_row(answers: Sequence[Answer], overhead_s: float, block_tokens: int) -> Row | None:
    """The row of prompts of one length, each of which came alone: their median time to the first token.

    At least that of a decode step, which shows where the overhead hides it; None without an answer.
    """
    firsts = [answer.times_s[0] - answer.sent_s for answer in answers if answer.times_s]
    gaps = [gap for answer in answers if (gap := gap_s(answer)) is not None]
    if not firsts or not gaps:
        return None
    seconds = max(statistics.median(firsts) - overhead_s, statistics.median(gaps))
    tokens = answers[0].prompt_tokens
    return _row(1, -(-tokens // block_tokens), [tokens], seconds, STREAMS)


def gap_s(answer: Answer) -> float | None:
    """Mean seconds per token after the first; None: there are too few."""
    if len(answer.times_s) < 2:
        return None
    return (answer.times_s[-1] - answer.times_s[0]) / (answer.tokens[-1] - answer.tokens[0])


def kv_blocks(answers: Iterable[Answer], when_s: float, block_tokens: int) -> int:
    """Blocks that the answers held then."""
    return sum(-(-(answer.prompt_tokens + max(0, answer.length_at(when_s) - 1)) // block_tokens) for answer in answers)


def _row(batch: int, held: int, lengths: Sequence[int], seconds: float, by: str) -> Row:
    return Row(
        batch=batch,
        kv_blocks=held,
        prefill_tokens=sum(lengths),
        prompts=len(lengths),
        prefill_pairs=sum(tokens * tokens for tokens in lengths) / 2,
        seconds=seconds,
        by=by,
    )


def _whole(steps: int, seconds: float) -> bool:
    return steps >= WINDOW_STEPS or (steps > 0 and seconds >= WINDOW_S)


def _decodes(report: Report, batch: int) -> bool:
    # Running fewer than gave a token: some ended with the step, and took their blocks along.
    return not report.prompt_tokens and report.generated_tokens == report.running == batch


def _prompts_in(report: Report, lengths: Sequence[int], batch: int) -> Sequence[int] | None:
    """The prompts of a step; None where there are none, or it is open which."""
    count = (report.generated_tokens or 0) - batch
    known = report.running in (batch, batch + count) and report.decode_sequences in (None, batch)
    if not 0 < count <= len(lengths) or not known:
        return None
    if count < len(lengths) and len(set(lengths)) > 1:
        return None
    return lengths[:count] if report.prompt_tokens == sum(lengths[:count]) else None


def _apart(reports: Sequence[Report], place: int, neighbours: int, decode_s: float) -> float | None:
    """Seconds of one step, from it and the steps beside it that only decode, whose time is known; at least theirs."""
    first = last = place
    while first > 0 and place - first < neighbours and _plain(reports[first - 1]):
        first -= 1
    while last + 1 < len(reports) and last - place < neighbours and _plain(reports[last + 1]):
        last += 1
    each = [report.seconds for report in reports[first : last + 1]]
    spent_s = sum(seconds for seconds in each if seconds is not None)
    return None if None in each else max(decode_s, spent_s - (len(each) - 1) * decode_s)


def _plain(report: Report) -> bool:
    return bool(report.seconds) and not report.prompt_tokens


def mean_gap(answer: Answer, from_s: float, to_s: float) -> float | None:
    """Seconds per token of one answer, between its own arrivals nearest to both ends."""
    first, last = answer.nearest(from_s), answer.nearest(to_s)
    if first is None or last is None or answer.tokens[last] == answer.tokens[first]:
        return None
    return (answer.times_s[last] - answer.times_s[first]) / (answer.tokens[last] - answer.tokens[first])


def _vote(answer: Answer, prompts: Sequence[Answer], pace: Pace) -> tuple[tuple[int, ...], tuple[float, ...]] | None:
    """Which prompts came with the same token of this answer, numbered in order; and the seconds of each such step."""
    places = [place for prompt in prompts if (place := answer.nearest(prompt.times_s[0])) is not None]
    order = sorted(set(places))
    if not order or len(places) < len(prompts) or order[0] == 0:
        return None
    found, near, decode_s = [], pace.neighbours, pace.decode_s or 0.0
    for number, place in enumerate(order):
        # Up to the neighbours in the row, so that no other prompt's step is counted in.
        first = max(place - 1 - near, 0, order[number - 1] if number else 0)
        after = order[number + 1] - 1 if number + 1 < len(order) else len(answer.times_s) - 1
        last = max(place, min(place + near, after))
        steps = answer.tokens[last] - answer.tokens[first]
        spent_s = answer.times_s[last] - answer.times_s[first]
        found.append(max(decode_s, spent_s - (steps - 1) * decode_s))
    return tuple(order.index(place) for place in places), tuple(found)
