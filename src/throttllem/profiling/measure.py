"""Profiles a simulated engine: chooses iterations that cover its range, times them, adds a measurement's scatter.

Batch sizes are on a fixed grid, clocks are dealt evenly, KV use and prompt tokens are drawn for each row: 30,000 rows
train the trees as well as the full product of some 10 million would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import polars as pl

from throttllem.core.types import EngineSpec
from throttllem.profiling.profile import COLUMNS, OPTIONAL

Progress = Callable[[int, int], None]
"""Called with (rows done, rows in all)."""

BATCH_RATIO = 1.15
MIN_PREFILL_TOKENS = 16
PROGRESS_EVERY = 1000


class Iterates(Protocol):
    """An engine that gives the seconds and watts of one iteration."""

    def iteration(
        self, clock_mhz: float, decode_batch: int, kv_tokens: int, prefill_tokens: int, prefill_pairs: float
    ) -> tuple[float, float]:
        """Seconds, and watts of all GPUs. `prefill_pairs`: sum over the prompts of tokens^2 / 2."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilePlan:
    """How much to measure. The default scatter is that of published measurements of A100 and H100."""

    rows: int = 30_000
    prefill_share: float = 0.45
    """Fraction of the rows that hold prompt tokens."""
    noise_time: float = 0.02
    """Standard deviation of the logarithm of seconds."""
    noise_power: float = 0.03
    """Standard deviation of the logarithm of watts."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"profile rows = {self.rows}: must be at least 1")
        if not 0 <= self.prefill_share <= 1:
            raise ValueError(f"profile prefill_share = {self.prefill_share}: must be between 0 and 1")
        if not (0 <= self.noise_time < 1 and 0 <= self.noise_power < 1):
            raise ValueError(
                f"profile noise_time = {self.noise_time}, noise_power = {self.noise_power}: must be in [0, 1)"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One iteration to measure: decoding sequences with the blocks they hold, and whole prompts."""

    clock_mhz: int
    decode_batch: int
    decode_blocks: int
    prompts: tuple[int, ...] = ()


def profile_engine(
    engine: Iterates, spec: EngineSpec, plan: ProfilePlan | None = None, on_progress: Progress | None = None
) -> pl.DataFrame:
    """Measure one engine size; a frame in the profile format, `plan.rows` rows and a few corners. Same seed, same rows.

    Profiles of several sizes are concatenated with `pl.concat`.
    """
    plan = plan or ProfilePlan()
    rng = np.random.default_rng([plan.seed, spec.tp])
    points = [*_corners(spec), *_sample(spec, plan, rng)]
    rows = []
    for done, point in enumerate(points):
        rows.append(measured_row(engine, spec, point))
        if on_progress and done % PROGRESS_EVERY == 0:
            on_progress(done, len(points))
    if on_progress:
        on_progress(len(points), len(points))
    schema = {column.name: column.dtype for column in (*COLUMNS, *OPTIONAL)}
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    return frame.with_columns(
        seconds=frame["seconds"] * np.exp(rng.normal(0.0, plan.noise_time, len(rows))),
        watts=frame["watts"] * np.exp(rng.normal(0.0, plan.noise_power, len(rows))),
    )


def batch_sizes(max_batch: int) -> list[int]:
    """1, 2, 3 ... then about 15 % apart, up to `max_batch`."""
    sizes = [1]
    while sizes[-1] < max_batch:
        sizes.append(min(max_batch, max(sizes[-1] + 1, round(sizes[-1] * BATCH_RATIO))))
    return sizes


def measured_row(engine: Iterates, spec: EngineSpec, point: Point) -> tuple[object, ...]:
    """The row of one iteration, without scatter: the columns of a profile, then the optional ones."""
    # About half of each sequence's last block is filled.
    waste = point.decode_batch * (spec.block_tokens - 1) // 2
    pairs = sum(tokens * tokens for tokens in point.prompts) / 2
    seconds, watts = engine.iteration(
        point.clock_mhz,
        point.decode_batch,
        point.decode_blocks * spec.block_tokens - waste,
        sum(point.prompts),
        pairs,
    )
    batch = point.decode_batch + len(point.prompts)
    kv_blocks = point.decode_blocks + sum(blocks(tokens, spec) for tokens in point.prompts)
    asked = (batch, kv_blocks, point.clock_mhz, sum(point.prompts))
    return (spec.gpu, spec.model, spec.tp, spec.block_tokens, *asked, seconds, watts, len(point.prompts), pairs)


def _corners(spec: EngineSpec) -> Iterator[Point]:
    """The ends of the hull at the end clocks: one sequence, a full batch in a full cache, the largest prefill."""
    most = min(spec.max_batch, spec.kv_blocks)
    full = _most_blocks(most, spec)
    prompts = _largest_prompts(spec)
    for clock in (spec.clocks_mhz[0], spec.clocks_mhz[-1]):
        yield Point(clock_mhz=clock, decode_batch=1, decode_blocks=1)
        yield Point(clock_mhz=clock, decode_batch=most, decode_blocks=full)
        yield Point(clock_mhz=clock, decode_batch=0, decode_blocks=0, prompts=prompts)


def _largest_prompts(spec: EngineSpec) -> tuple[int, ...]:
    """Whole prompts that fill the prefill budget, or the KV cache where that is smaller."""
    left, room = spec.prefill_budget_tokens, spec.kv_blocks
    prompts: list[int] = []
    while left > 0 and room > 0 and len(prompts) < spec.max_batch:
        prompts.append(min(left, room * spec.block_tokens, spec.max_context_tokens))
        left -= prompts[-1]
        room -= blocks(prompts[-1], spec)
    return tuple(prompts)


def _sample(spec: EngineSpec, plan: ProfilePlan, rng: np.random.Generator) -> Iterator[Point]:
    """Batch sizes in turn; each, with and without prompts, is measured evenly at all clocks."""
    sizes = [size for size in batch_sizes(spec.max_batch) if size <= spec.kv_blocks]
    clocks: dict[tuple[int, bool], list[int]] = {}
    for row in range(plan.rows):
        batch = sizes[row % len(sizes)]
        prefill = bool(rng.random() < plan.prefill_share)
        deck = clocks.setdefault((batch, prefill), [])
        if not deck:
            deck.extend(int(clock) for clock in rng.permutation(spec.clocks_mhz))
        prompts = _draw_prompts(batch, spec, rng) if prefill else ()
        decode = batch - len(prompts)
        room = spec.kv_blocks - sum(blocks(tokens, spec) for tokens in prompts)
        held = _shifted_log(decode, min(room, _most_blocks(decode, spec)), spec.kv_blocks / 4, rng) if decode else 0
        yield Point(clock_mhz=deck.pop(), decode_batch=decode, decode_blocks=held, prompts=prompts)


def _draw_prompts(batch: int, spec: EngineSpec, rng: np.random.Generator) -> tuple[int, ...]:
    """Prompts among `batch` requests that leave a block for each decoding sequence; () if there is room for none.

    Few prompts are likelier than many (they arrive one at a time), and their lengths scatter like those of requests.
    """
    most = min(spec.prefill_budget_tokens - batch, (spec.kv_blocks - batch) * spec.block_tokens)
    if most < MIN_PREFILL_TOKENS:
        return ()
    tokens = _shifted_log(MIN_PREFILL_TOKENS, most, spec.prefill_budget_tokens / 32, rng)
    fewest = math.ceil(tokens / spec.max_context_tokens)
    count = min(batch, max(1, tokens // MIN_PREFILL_TOKENS), fewest + int(rng.geometric(0.6)) - 1)
    shares = rng.lognormal(0.0, 0.8, count)
    cuts = np.round(np.cumsum(shares) / shares.sum() * tokens).astype(int)
    lengths = np.clip(np.diff(cuts, prepend=0), 1, spec.max_context_tokens)
    # The last block of a prompt is partly filled.
    while sum(blocks(int(length), spec) for length in lengths) > spec.kv_blocks - batch + len(lengths):
        lengths = np.maximum(lengths // 2, 1)
    return tuple(int(length) for length in lengths)


def _shifted_log(low: int, high: int, shift: float, rng: np.random.Generator) -> int:
    """A whole number from `low` to `high`, uniform in log(value + shift).

    Time is a constant plus a slope times the value, so equal steps of the draw are about equal relative steps of time.
    """
    if high <= low:
        return low
    spread = math.log((high + shift) / (low + shift))
    return min(high, max(low, round((low + shift) * math.exp(spread * float(rng.random())) - shift)))


def _most_blocks(batch: int, spec: EngineSpec) -> int:
    return min(spec.kv_blocks, batch * blocks(spec.max_context_tokens, spec))


def blocks(tokens: int, spec: EngineSpec) -> int:
    """KV blocks of this many tokens of one request."""
    return -(-tokens // spec.block_tokens)
