"""Measured iterations: from the engine's step reports where there are any, else from the arrival of tokens.

Knows nothing of clocks and watts, nor of how a load is made.
"""

# An iteration is recorded only if everything in it is known: how many sequences decoded, and which prompts it processed
# whole. Its time comes from one of three sources.
#
# 1. The engine timed its steps itself (exact). Each step is an iteration.
# 2. Steps were timed outside the engine, when their report arrived. A report is late now and then, and the next one
#    early by as much, so an iteration is the mean over a window of decode steps: WINDOW_STEPS, or WINDOW_S if that is
#    less. A step that processed prompts is timed by what it adds to the decode steps around it, whose time is known:
#    the time of 2 n + 1 neighbouring steps, less 2 n decode steps.
# 3. Without step reports, tokens take the place of steps: in a batch that only decodes, every sequence receives one
#    token per iteration. The same windows and the same difference are taken on each stream, then the median over the
#    batch. A prompt was processed in the iteration whose token, in the first stream, arrived nearest to the prompt's
#    first token.

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from throttllem.engines.base import Report
from throttllem.profiling.live.load import Stream
from throttllem.profiling.live.plan import WINDOW_STEPS

STEPS, STREAMS = "steps", "streams"
WINDOW_S = 0.05
"""A report is late by a few milliseconds: small against a window of this length."""
IMPLAUSIBLE = 4
"""A window faster than the usual one by this factor was reported all at once, and measures nothing."""
NEIGHBOURS_S = 0.025
MOST_NEIGHBOURS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """`batch` requests, of which `prompts` are new with `prefill_tokens` in all. `by`: STEPS or STREAMS. An engine that
    speculates gave each sequence `tokens_per_step` in it, on the mean.
    """

    batch: int
    kv_blocks: int
    prefill_tokens: int
    prompts: int
    prefill_pairs: float
    seconds: float
    by: str
    tokens_per_step: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """A batch that decodes: its size, whether its steps are timed by the engine (`exact`), and the seconds of one step
    (None: not known yet).
    """

    batch: int
    exact: bool
    decode_s: float | None = None

    @property
    def neighbours(self) -> int:
        """Steps on either side of one with prompts that are measured together with it."""
        if self.exact or not self.decode_s:
            return 0
        return max(1, min(MOST_NEIGHBOURS, math.ceil(NEIGHBOURS_S / self.decode_s)))

    def without_neighbours(self, seconds: float, steps: int) -> float:
        """Seconds of one step, from the seconds of `steps` of which all others only decode; at least a decode step."""
        decode_s = self.decode_s or 0.0
        return max(decode_s, seconds - (steps - 1) * decode_s)


# ---- from step reports -------------------------------------------------------------------------------------------


def decode_steps(reports: Sequence[Report], decoding: Decoding) -> list[Iteration]:
    """Iterations with exactly `decoding.batch` sequences and no prompt."""
    found, steps, seconds, tokens = [], 0, 0.0, 0
    for report in reports:
        if not report.seconds or not report.kv_blocks or not _only_decodes(report, decoding.batch):
            steps, seconds, tokens = 0, 0.0, 0
            continue
        steps, seconds, tokens = steps + 1, seconds + report.seconds, tokens + (report.generated_tokens or 0)
        if decoding.exact or _is_window(steps, seconds):
            rate = tokens / (steps * decoding.batch)
            found.append(_iteration(decoding.batch, report.kv_blocks, (), seconds / steps, STEPS, rate))
            steps, seconds, tokens = 0, 0.0, 0
    usual_s = statistics.median(each.seconds for each in found) if found else 0.0
    return [each for each in found if each.seconds > usual_s / IMPLAUSIBLE]


def prefill_steps(
    reports: Sequence[Report], lengths: Sequence[int], block_tokens: int, decoding: Decoding
) -> list[Iteration]:
    """Iterations with `decoding.batch` sequences that decode, and whole prompts among those of these `lengths`."""
    found, decode_blocks = [], None
    for place, report in enumerate(reports):
        prompts = _prompts_in(report, lengths, decoding.batch)
        if not report.prompt_tokens and _only_decodes(report, decoding.batch):
            decode_blocks = report.kv_blocks
        if not prompts or (decoding.batch and decode_blocks is None):
            continue
        # The report may come after the prompts' own blocks are freed again.
        held = (decode_blocks or 0) + _blocks(prompts, block_tokens)
        near_s = list(_decode_neighbours(reports, place, decoding.neighbours))
        if report.seconds:
            seconds = decoding.without_neighbours(report.seconds + sum(near_s), 1 + len(near_s))
            found.append(_iteration(decoding.batch + len(prompts), held, prompts, seconds, STEPS))
    return found


def _only_decodes(report: Report, batch: int) -> bool:
    # Fewer running than sequences: some ended with the step, and their blocks are freed.
    return not report.prompt_tokens and _sequences(report) == report.running == batch


def _sequences(report: Report) -> int:
    """Sequences that the step gave tokens: one each, and those accepted of drafts."""
    return (report.generated_tokens or 0) - (report.accepted_tokens or 0)


def _prompts_in(report: Report, lengths: Sequence[int], batch: int) -> Sequence[int] | None:
    """The prompts of a step; None if there are none, or which ones is not known."""
    count = _sequences(report) - batch
    known = report.running in (batch, batch + count) and report.decode_sequences in (None, batch)
    if not 0 < count <= len(lengths) or not known:
        return None
    if count < len(lengths) and len(set(lengths)) > 1:
        return None
    return lengths[:count] if report.prompt_tokens == sum(lengths[:count]) else None


def _decode_neighbours(reports: Sequence[Report], place: int, most: int) -> Iterator[float]:
    """Seconds of up to `most` steps on either side, up to the next one with prompts."""
    for side in (reports[place - 1 :: -1] if place else (), reports[place + 1 :]):
        for report in side[:most]:
            if not report.seconds or report.prompt_tokens:
                break
            yield report.seconds


# ---- from streams ------------------------------------------------------------------------------------------------


def decode_windows(streams: Sequence[Stream], block_tokens: int) -> list[Iteration]:
    """Decode iterations while all `streams` ran."""
    begin_s = max(stream.times_s[0] for stream in streams)
    end_s = min(stream.times_s[-1] for stream in streams)
    first, found, since = streams[0], [], None
    for place, when_s in enumerate(first.times_s):
        if not begin_s <= when_s <= end_s:
            continue
        since = place if since is None else since
        from_s = first.times_s[since]
        if not _is_window(first.tokens[place] - first.tokens[since], when_s - from_s):
            continue
        if step_s := decode_seconds(streams, from_s, when_s):
            held = kv_blocks(streams, (from_s + when_s) / 2, block_tokens)
            found.append(_iteration(len(streams), held, (), step_s, STREAMS))
        since = place
    return found


def prefill_delays(
    streams: Sequence[Stream], prompts: Sequence[Stream], block_tokens: int, decoding: Decoding
) -> Iterator[Iteration]:
    """Iterations that processed `prompts`, from the delay of the tokens of decoding `streams`."""
    first = streams[0]
    together: dict[int, list[Stream]] = {}
    for prompt in prompts:
        together.setdefault(first.nearest(prompt.times_s[0]), []).append(prompt)
    places = [0, *sorted(together), len(first.times_s)]
    for before, place, after in zip(places, places[1:], places[2:], strict=False):
        if place == 0:
            continue
        # Up to the neighbours, but not into another iteration with prompts.
        from_s = first.times_s[max(place - 1 - decoding.neighbours, before)]
        to_s = first.times_s[max(place, min(place + decoding.neighbours, after - 1))]
        spans = [span for stream in streams if (span := stream.between(from_s, to_s))[1]]
        if not spans:
            continue
        seconds = statistics.median(decoding.without_neighbours(*span) for span in spans)
        lengths = [prompt.prompt_tokens for prompt in together[place]]
        held = kv_blocks(streams, together[place][0].times_s[0], block_tokens) + _blocks(lengths, block_tokens)
        yield _iteration(len(streams) + len(lengths), held, lengths, seconds, STREAMS)


def lone_prompt(streams: Sequence[Stream], overhead_s: float, block_tokens: int) -> Iteration | None:
    """The iteration of a prompt alone in the engine: the median time to the first token over several such prompts, less
    the overhead of a request, and at least a decode step. None if no stream has tokens.
    """
    firsts = [stream.times_s[0] - stream.sent_s for stream in streams if stream.times_s]
    gaps = [gap for stream in streams if (gap := stream.gap_s) is not None]
    if not firsts or not gaps:
        return None
    seconds = max(statistics.median(firsts) - overhead_s, statistics.median(gaps))
    tokens = [streams[0].prompt_tokens]
    return _iteration(1, _blocks(tokens, block_tokens), tokens, seconds, STREAMS)


def decode_seconds(streams: Iterable[Stream], from_s: float, to_s: float) -> float | None:
    """Seconds per token between two times, the median over the streams; None if none has a token."""
    spans = [span for stream in streams if (span := stream.between(from_s, to_s))[1]]
    return statistics.median(seconds / tokens for seconds, tokens in spans) if spans else None


def kv_blocks(streams: Iterable[Stream], when_s: float, block_tokens: int) -> int:
    """Blocks that the sequences held then."""
    return _blocks([each.prompt_tokens + max(0, each.length_at(when_s) - 1) for each in streams], block_tokens)


# ---- both --------------------------------------------------------------------------------------------------------


def _blocks(lengths: Iterable[int], block_tokens: int) -> int:
    return sum(-(-tokens // block_tokens) for tokens in lengths)


def _is_window(steps: int, seconds: float) -> bool:
    return steps >= WINDOW_STEPS or (steps > 0 and seconds >= WINDOW_S)


def _iteration(
    batch: int, held: int, lengths: Sequence[int], seconds: float, by: str, tokens_per_step: float = 1.0
) -> Iteration:
    return Iteration(
        batch=batch,
        kv_blocks=held,
        prefill_tokens=sum(lengths),
        prompts=len(lengths),
        prefill_pairs=sum(tokens * tokens for tokens in lengths) / 2,
        seconds=seconds,
        by=by,
        tokens_per_step=tokens_per_step,
    )
