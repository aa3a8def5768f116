"""What to measure of a live engine, coarse first: batches held at several contexts, and prompts sent into them.

Every point fits the engine: batch, context and KV cache, its answers and its bursts of prompts included. Knows nothing
of HTTP or time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from throttllem.core.types import EngineSpec
from throttllem.profiling.measure import MIN_PREFILL_TOKENS, batch_sizes

LONE_ANSWER_TOKENS = 8
BURST_ANSWER_TOKENS = 1
"""A prompt of a burst ends with its first token: the steps around it are those of the batch alone."""
LEVELS = 6
SLACK_TOKENS = 32
WINDOW_STEPS = 16
"""Steps that one row may take the mean of, where their times are not the engine's own."""
POINTS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePlan:
    """How much to measure: so many `points`, or for so many `seconds` (None: no such bound).

    `steps` are decode rows of a point, `bursts` prompts or groups of prompts sent into it.
    """

    points: int | None = POINTS
    seconds: float | None = None
    steps: int = 12
    bursts: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.points is None and self.seconds is None:
            raise ValueError("a live profile needs an end: a number of points, or of seconds")
        if self.points is not None and self.points < 1:
            raise ValueError(f"profile points = {self.points}: must be at least 1")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError(f"profile seconds = {self.seconds}: must be above 0")
        if self.steps < 1 or self.bursts < 0:
            raise ValueError(f"profile steps = {self.steps}, bursts = {self.bursts}: must be at least 1 and 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """`count` prompts of `tokens` each, sent at once."""

    count: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePoint:
    """`batch` answers of up to `output_tokens` over prompts of `context_tokens`, and the bursts sent meanwhile.

    `batch` 0: each burst is one prompt in an engine that has nothing else to do.
    """

    number: int
    batch: int
    context_tokens: int
    output_tokens: int
    bursts: tuple[Burst, ...]


def live_points(spec: EngineSpec, plan: LivePlan) -> Iterator[LivePoint]:
    """All points in order: the corners, then what lies midway, and again. Same spec and plan, same points.

    Raises ValueError for an engine too small to hold the shortest request.
    """
    rng = np.random.default_rng([plan.seed, spec.tp])
    shapes = (shape for level in range(LEVELS + 1) for shape in _level(spec, plan, level, rng))
    found = 0
    for number, shape in enumerate(shapes):
        found += 1
        yield _point(number, shape, spec, plan, rng)
    if not found:
        raise ValueError("the engine is too small to be profiled: its context or KV cache holds no request")


def points_in_all(spec: EngineSpec, plan: LivePlan) -> int:
    """How many points there are until the plan's number is reached."""
    count = sum(1 for _ in live_points(spec, plan))
    return count if plan.points is None else min(count, plan.points)


def blocks(tokens: int, spec: EngineSpec) -> int:
    """KV blocks of so many tokens of one request."""
    return -(-tokens // spec.block_tokens)


@dataclass(frozen=True, slots=True)
class _Shape:
    """A batch and how far its context lies between the least and the most (None: lone prompts, of this level)."""

    batch: int
    fill: float | None
    level: int


def _level(spec: EngineSpec, plan: LivePlan, level: int, rng: np.random.Generator) -> list[_Shape]:
    """What is new at this level, in an order that is spread over it; lone prompts last."""
    known = set() if level == 0 else _grid(spec, plan, level - 1)
    new = [_Shape(batch, fill, level) for batch, fill in sorted(_grid(spec, plan, level) - known)]
    lone = [_Shape(0, None, level)] if level < 3 and _lone_most(spec) >= 1 else []
    order = range(len(new)) if level == 0 else rng.permutation(len(new))
    return [*(new[int(place)] for place in order), *lone]


def _grid(spec: EngineSpec, plan: LivePlan, level: int) -> set[tuple[int, float]]:
    sizes = [size for size in batch_sizes(spec.max_batch) if _effort(size, 0.0, spec, plan)[2] >= 1]
    shares = [step / 2**level for step in range(2**level + 1)]
    return {(sizes[round(share * (len(sizes) - 1))], fill) for share in shares for fill in shares if sizes}


def _point(number: int, shape: _Shape, spec: EngineSpec, plan: LivePlan, rng: np.random.Generator) -> LivePoint:
    if shape.fill is None:
        lengths = _spread(_lone_most(spec), 4 * 2**shape.level, skip=shape.level > 0)
        alone = tuple(Burst(count=1, tokens=tokens) for tokens in lengths)
        return LivePoint(number=number, batch=0, context_tokens=0, output_tokens=LONE_ANSWER_TOKENS, bursts=alone)
    bursts, row_steps, most = _effort(shape.batch, shape.fill, spec, plan)
    context = _between(min(MIN_PREFILL_TOKENS, most), most, 4 * spec.block_tokens, shape.fill)
    answer = _answer_tokens(shape.batch, context, bursts, row_steps, spec, plan)
    room = spec.kv_blocks - shape.batch * blocks(context + answer, spec)
    # The end of the hull where it costs least: the largest prefill that fits beside short contexts.
    ends = [1.0] if shape.fill == 0 and bursts else []
    shares = [*ends, *rng.random(bursts - len(ends))]
    drawn = [_burst(shape.batch, share, room, spec, rng) for share in shares]
    return LivePoint(
        number=number,
        batch=shape.batch,
        context_tokens=context,
        output_tokens=answer,
        bursts=tuple(burst for burst in drawn if burst is not None),
    )


def _burst(batch: int, share: float, room: int, spec: EngineSpec, rng: np.random.Generator) -> Burst | None:
    """Prompts that join `batch` rows whole in one iteration and find their blocks among `room`; None: none can."""
    slots, budget = spec.max_batch - batch, spec.prefill_budget_tokens - batch
    more = int(rng.geometric(0.6)) - 1
    longest = spec.max_context_tokens - BURST_ANSWER_TOKENS
    if slots < 1 or budget < 1 or room < 1 or longest < 1:
        return None
    tokens = _between(min(MIN_PREFILL_TOKENS, budget), budget, spec.prefill_budget_tokens / 32, share)
    count = min(slots, tokens, room, math.ceil(tokens / longest) + more)
    each = min(tokens // count, longest, room // count * spec.block_tokens - BURST_ANSWER_TOKENS)
    return Burst(count=count, tokens=each) if each >= 1 else None


def _lone_most(spec: EngineSpec) -> int:
    held = min(spec.max_context_tokens, spec.kv_blocks * spec.block_tokens) - LONE_ANSWER_TOKENS
    return min(held, spec.prefill_budget_tokens)


def _spread(most: int, count: int, *, skip: bool) -> list[int]:
    """Lengths up to `most`, even in their logarithm; `skip`: those between the ones of the level before."""
    least = min(MIN_PREFILL_TOKENS, most)
    lengths = [_between(least, most, most / 32, step / count) for step in range(count + 1)]
    return list(dict.fromkeys(lengths[1::2] if skip else lengths))


def _effort(batch: int, fill: float, spec: EngineSpec, plan: LivePlan) -> tuple[int, int, int]:
    """Bursts, steps of a row and the longest context: as much as a batch has room for beside a few tokens of context.

    All that is measured needs answers that go on for longer; in the fullest cache their room is better filled.
    """
    tried = ((plan.bursts, WINDOW_STEPS), (plan.bursts // 2, WINDOW_STEPS // 2), (0, WINDOW_STEPS // 2), (0, 2))
    most = 0
    for bursts, row_steps in tried if fill < 1 else tried[2:]:
        most = _most_context(batch, bursts, row_steps, spec, plan)
        if most >= MIN_PREFILL_TOKENS:
            return bursts, row_steps, most
    return 0, 2, most


def _most_context(batch: int, bursts: int, row_steps: int, spec: EngineSpec, plan: LivePlan) -> int:
    """The longest context of `batch` answers that context and KV cache have room for; 0: there is none."""
    each = min(spec.max_context_tokens, spec.kv_blocks // batch * spec.block_tokens)
    low, high = 0, each
    while low < high:
        middle = (low + high + 1) // 2
        if middle + _answer_tokens(batch, middle, bursts, row_steps, spec, plan) <= each:
            low = middle
        else:
            high = middle - 1
    return low


def _answer_tokens(
    batch: int, context_tokens: int, bursts: int, row_steps: int, spec: EngineSpec, plan: LivePlan
) -> int:
    """Enough to outlast the arrival of all prompts, what is measured, and the bursts."""
    arrival = 2 * math.ceil(batch * context_tokens / max(1, spec.prefill_budget_tokens - batch))
    return arrival + batch // 4 + row_steps * plan.steps + 64 * bursts + SLACK_TOKENS


def _between(low: int, high: int, shift: float, share: float) -> int:
    """The value at `share` of the way from `low` to `high`, even in log(value + shift)."""
    if high <= low:
        return low
    value = (low + shift) * math.exp(math.log((high + shift) / (low + shift)) * share) - shift
    return min(high, max(low, round(value)))
