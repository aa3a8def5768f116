"""The points of a live profile: batches held at several contexts, and the prompts sent into them.

Every point fits the engine: batch, context and KV cache, its outputs and its prompts included. Knows nothing of HTTP
or time.
"""

# The order of points. A batch size and a context (a fill between the shortest and the longest that fits) span a square.
# Level 0 is its corners, level 1 halves both axes, and so on: a run that ends early has covered everything coarsely.
# After the new points of each of the first levels comes one of prompts alone, at lengths halfway between the earlier
# ones. Within a level the order is random, so that time (a GPU that warms up) and load do not correlate.
#
# A quick profile has a few shapes instead, for a law that is fitted to them (calibrate/quick.py): batch sizes in equal
# ratios, short and long contexts, each with prompts beside it. The most important come first, as its time is bounded. A
# prompt costs most of that time, so the tokens of a point are bounded too; the law extends to fuller caches.
#
# Room. A point needs outputs that last for everything that is measured. Where a batch has no room for that beside a few
# tokens of context, it is measured less: fewer bursts, shorter windows, in the end decode steps alone.

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from throttllem.core.types import EngineSpec
from throttllem.profiling.measure import MIN_PREFILL_TOKENS, batch_sizes, blocks

LONE_OUTPUT_TOKENS = 8
BURST_OUTPUT_TOKENS = 1
"""A prompt of a burst ends with its first token: the steps around it are those of the batch alone."""
LEVELS = 6
LONE_LEVELS = 3
SLACK_TOKENS = 32
WINDOW_STEPS = 16
"""Most steps of one window, where steps are not timed by the engine itself."""
POINTS = 60
QUICK_S = 540.0
"""A point is begun up to this time, so that a quick profile ends within ten minutes."""
QUICK_STEPS, QUICK_BURSTS = 32, 4
QUICK_SIZES = 4
QUICK_TOKENS = 32_768
"""Prompt tokens of all requests of a long point: seconds of prefill, and enough to see the KV cache being read."""
QUICK_FULL_TOKENS = 4 * QUICK_TOKENS
"""The same of the fullest point, which comes last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePlan:
    """How much to measure: at most this many `points`, within `seconds` (None: no such bound; one must be given).

    `steps` are the decode iterations of a point, `bursts` the prompts or groups of prompts sent into it. `quick`: few
    points, on which a law is calibrated.
    """

    points: int | None = POINTS
    seconds: float | None = None
    steps: int = 12
    bursts: int = 6
    seed: int = 0
    quick: bool = False

    def __post_init__(self) -> None:
        if self.points is None and self.seconds is None:
            raise ValueError("a live profile needs an end: a number of points, or of seconds")
        if self.points is not None and self.points < 1:
            raise ValueError(f"profile points = {self.points}: must be at least 1")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError(f"profile seconds = {self.seconds}: must be above 0")
        if self.steps < 1 or self.bursts < 0:
            raise ValueError(f"profile steps = {self.steps}, bursts = {self.bursts}: must be at least 1 and 0")


def quick_plan(seconds: float | None = None, seed: int = 0) -> LivePlan:
    """A quick profile: ten minutes, or begin no point after `seconds`."""
    bound_s = QUICK_S if seconds is None else seconds
    return LivePlan(points=None, seconds=bound_s, steps=QUICK_STEPS, bursts=QUICK_BURSTS, seed=seed, quick=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """`count` prompts of `tokens` each, sent at once."""

    count: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePoint:
    """`batch` outputs of up to `output_tokens` over prompts of `context_tokens`, and the bursts sent meanwhile.

    `batch` 0: each burst is one prompt in an otherwise idle engine.
    """

    number: int
    batch: int
    context_tokens: int
    output_tokens: int
    bursts: tuple[Burst, ...]


@dataclass(frozen=True, slots=True)
class _Effort:
    """What a batch has room for: bursts, steps of a window, and the longest context (0: none)."""

    bursts: int
    window_steps: int
    most_context: int


def live_points(spec: EngineSpec, plan: LivePlan) -> list[LivePoint]:
    """The points in order. Same spec and plan, same points.

    Raises ValueError for an engine too small to hold the shortest request.
    """
    every = _quick_points(spec, plan) if plan.quick else _all_points(spec, plan)
    points = list(islice(every, plan.points))
    if not points:
        raise ValueError("the engine is too small to be profiled: its context or KV cache holds no request")
    return points


def longer(point: LivePoint, spec: EngineSpec) -> LivePoint | None:
    """The same with outputs of twice the tokens, or as many as its prompts and bursts leave room for; None: no more.

    An engine may give a first request its whole output before it has begun the last one of a batch.
    """
    if not point.batch:
        return None
    bursts = max((burst.count * blocks(burst.tokens + BURST_OUTPUT_TOKENS, spec) for burst in point.bursts), default=0)
    held = (spec.kv_blocks - bursts) // point.batch * spec.block_tokens
    most = min(held, spec.max_context_tokens) - point.context_tokens
    output = min(2 * point.output_tokens, most)
    return replace(point, output_tokens=output) if output > point.output_tokens else None


def _all_points(spec: EngineSpec, plan: LivePlan) -> Iterator[LivePoint]:
    rng = np.random.default_rng([plan.seed, spec.tp])
    number, known = 0, set[tuple[int, float]]()
    for level in range(LEVELS + 1):
        grid = _grid(spec, plan, level)
        shapes = sorted(grid - known)
        known = grid
        order = range(len(shapes)) if level == 0 else rng.permutation(len(shapes))
        for place in order:
            batch, fill = shapes[int(place)]
            effort = _effort(batch, fill, spec, plan)
            shortest = min(MIN_PREFILL_TOKENS, effort.most_context)
            context = _between(shortest, effort.most_context, 4 * spec.block_tokens, fill)
            yield _batch_point(number, batch, effort, context, spec, plan, rng)
            number += 1
        if level < LONE_LEVELS and _longest_lone(spec) >= 1:
            yield _lone_point(number, _spread(_longest_lone(spec), 4 * 2**level, skip=level > 0))
            number += 1


def _quick_points(spec: EngineSpec, plan: LivePlan) -> Iterator[LivePoint]:
    rng = np.random.default_rng([plan.seed, spec.tp])
    fitting = [size for size in batch_sizes(spec.max_batch) if _effort(size, 0.0, spec, plan).most_context >= 1]
    shares = [step / (QUICK_SIZES - 1) for step in range(QUICK_SIZES)]
    sizes = sorted({round(fitting[-1] ** share) for share in shares if fitting})
    short, middle, ends = MIN_PREFILL_TOKENS, sizes[1:-1], [*sizes[:1], *sizes[1:][-1:]]
    shapes = [
        *((size, short) for size in ends),
        *((size, QUICK_TOKENS // size) for size in (*reversed(middle), *ends)),
        *((size, short) for size in reversed(middle)),
        *((size, QUICK_FULL_TOKENS // size) for size in ends[1:]),
    ]
    known = set[tuple[int, int]]()
    for number, (size, context) in enumerate(shapes):
        point = _batch_point(number, size, _effort(size, 0.0, spec, plan), context, spec, plan, rng)
        if (point.batch, point.context_tokens) not in known:
            known.add((point.batch, point.context_tokens))
            yield point


def _lone_point(number: int, lengths: Sequence[int]) -> LivePoint:
    bursts = tuple(Burst(count=1, tokens=tokens) for tokens in lengths)
    return LivePoint(number=number, batch=0, context_tokens=0, output_tokens=LONE_OUTPUT_TOKENS, bursts=bursts)


def _grid(spec: EngineSpec, plan: LivePlan, level: int) -> set[tuple[int, float]]:
    """Batch size and fill of every point up to this level."""
    sizes = [size for size in batch_sizes(spec.max_batch) if _effort(size, 0.0, spec, plan).most_context >= 1]
    shares = [step / 2**level for step in range(2**level + 1)]
    return {(sizes[round(share * (len(sizes) - 1))], fill) for share in shares for fill in shares if sizes}


def _batch_point(
    number: int,
    batch: int,
    effort: _Effort,
    context_tokens: int,
    spec: EngineSpec,
    plan: LivePlan,
    rng: np.random.Generator,
) -> LivePoint:
    """Of contexts of that many tokens, or as many as there is room for."""
    context = min(context_tokens, effort.most_context)
    output = _output_tokens(batch, context, effort.bursts, effort.window_steps, spec, plan)
    room = spec.kv_blocks - batch * blocks(context + output, spec)
    # The largest prefill is measured where it costs least: beside short contexts.
    ends = [1.0] if context <= MIN_PREFILL_TOKENS and effort.bursts else []
    shares = [*ends, *rng.random(effort.bursts - len(ends))]
    drawn = [_burst(batch, share, room, spec, rng) for share in shares]
    return LivePoint(
        number=number,
        batch=batch,
        context_tokens=context,
        output_tokens=output,
        bursts=tuple(burst for burst in drawn if burst is not None),
    )


def _burst(batch: int, share: float, room: int, spec: EngineSpec, rng: np.random.Generator) -> Burst | None:
    """Prompts that join `batch` sequences whole in one iteration and fit `room` blocks; None if none can."""
    slots, budget = spec.max_batch - batch, spec.prefill_budget_tokens - batch
    more = int(rng.geometric(0.6)) - 1
    longest = spec.max_context_tokens - BURST_OUTPUT_TOKENS
    if slots < 1 or budget < 1 or room < 1 or longest < 1:
        return None
    tokens = _between(min(MIN_PREFILL_TOKENS, budget), budget, spec.prefill_budget_tokens / 32, share)
    count = min(slots, tokens, room, math.ceil(tokens / longest) + more)
    each = min(tokens // count, longest, room // count * spec.block_tokens - BURST_OUTPUT_TOKENS)
    return Burst(count=count, tokens=each) if each >= 1 else None


def _longest_lone(spec: EngineSpec) -> int:
    held = min(spec.max_context_tokens, spec.kv_blocks * spec.block_tokens) - LONE_OUTPUT_TOKENS
    return min(held, spec.prefill_budget_tokens)


def _spread(most: int, count: int, *, skip: bool) -> list[int]:
    """Lengths up to `most`, even in their logarithm; `skip`: those between the ones of the level before."""
    least = min(MIN_PREFILL_TOKENS, most)
    lengths = [_between(least, most, most / 32, step / count) for step in range(count + 1)]
    return list(dict.fromkeys(lengths[1::2] if skip else lengths))


def _effort(batch: int, fill: float, spec: EngineSpec, plan: LivePlan) -> _Effort:
    """As much as a batch has room for. The fullest cache is for context, so there is only the least effort."""
    efforts = ((plan.bursts, WINDOW_STEPS), (plan.bursts // 2, WINDOW_STEPS // 2), (0, WINDOW_STEPS // 2), (0, 2))
    most = 0
    for bursts, window_steps in efforts if fill < 1 else efforts[2:]:
        most = _most_context(batch, bursts, window_steps, spec, plan)
        if most >= MIN_PREFILL_TOKENS:
            return _Effort(bursts, window_steps, most)
    return _Effort(0, 2, most)


def _most_context(batch: int, bursts: int, window_steps: int, spec: EngineSpec, plan: LivePlan) -> int:
    """The longest context of `batch` outputs that context and KV cache have room for; 0: there is none."""
    each = min(spec.max_context_tokens, spec.kv_blocks // batch * spec.block_tokens)
    low, high = 0, each
    while low < high:
        middle = (low + high + 1) // 2
        if middle + _output_tokens(batch, middle, bursts, window_steps, spec, plan) <= each:
            low = middle
        else:
            high = middle - 1
    return low


def _output_tokens(
    batch: int, context_tokens: int, bursts: int, window_steps: int, spec: EngineSpec, plan: LivePlan
) -> int:
    """Enough to outlast the arrival of all prompts, the decode windows, and the bursts."""
    arrival = 2 * math.ceil(batch * context_tokens / max(1, spec.prefill_budget_tokens - batch))
    return arrival + batch // 4 + window_steps * plan.steps + 64 * bursts + SLACK_TOKENS


def _between(low: int, high: int, shift: float, share: float) -> int:
    """The value at `share` of the way from `low` to `high`, even in log(value + shift)."""
    if high <= low:
        return low
    value = (low + shift) * math.exp(math.log((high + shift) / (low + shift)) * share) - shift
    return min(high, max(low, round(value)))
