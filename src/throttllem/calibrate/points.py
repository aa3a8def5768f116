"""Measured iterations as arguments of the law (decode batch, KV tokens, prompt tokens and pairs), from a profile.

Knows the profile's format and the model's context, and nothing of GPUs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from throttllem.physics.model import Model
from throttllem.profiling.profile import ProfileError, place


class Point(NamedTuple):
    """One measured iteration; `watts` are of all GPUs. `row` counts the profile's rows from 0."""

    row: int
    tp: int
    batch: int
    clock_mhz: int
    decode_batch: int
    kv_tokens: int
    prefill_tokens: int
    prefill_pairs: float
    seconds: float
    watts: float

    @property
    def arguments(self) -> tuple[int, int, int, int, float]:
        """The arguments of `EnginePhysics.iteration`."""
        return self.clock_mhz, self.decode_batch, self.kv_tokens, self.prefill_tokens, self.prefill_pairs


def points_of(profile: pl.DataFrame, model: Model, file: Path) -> list[Point]:
    """Every row of a checked profile.

    Raises ProfileError (file, first row, how many) for rows with impossible requests, blocks, prompts or pairs.
    """
    points, impossible = [], []
    for row, cells in enumerate(profile.iter_rows(named=True)):
        prompts = cells.get("prompts")
        if prompts is None:
            prompts = -(-cells["prefill_tokens"] // model.max_context_tokens)
        if wrong := _wrong_prompts(cells, prompts, model) or _wrong_blocks(cells) or _wrong_pairs(cells, model):
            impossible.append((row, wrong))
        else:
            points.append(_point(row, cells, prompts))
    reject_rows(impossible, profile.height, file, "correct these columns (docs/profile-format.md)")
    return points


def reject_rows(impossible: Sequence[tuple[int, str]], rows: int, file: Path, remedy: str) -> None:
    """Raise ProfileError if any row is impossible: the first with its reason, how many there are, and the remedy."""
    if impossible:
        row, why = impossible[0]
        raise ProfileError(
            f"{file}, {place(file, row)}: {why} ({len(impossible)} of {rows} rows are impossible): {remedy}"
        )


def _wrong_prompts(cells: Mapping[str, Any], prompts: int, model: Model) -> str | None:
    tokens, batch = cells["prefill_tokens"], cells["batch"]
    if prompts > batch:
        return (
            f"{_short(tokens)} prefill_tokens are {_short(prompts)} prompts or more ({model.name} holds "
            f"{model.max_context_tokens} tokens each), and batch is {_short(batch)}"
            if cells.get("prompts") is None
            else f"{_short(prompts)} prompts, and batch is {_short(batch)}, which counts them too"
        )
    if (prompts == 0) != (tokens == 0) or tokens < prompts:
        return f"{_short(prompts)} prompts and {_short(tokens)} prefill_tokens contradict each other"
    return None


def _wrong_blocks(cells: Mapping[str, Any]) -> str | None:
    """Each request holds at least one block, and each prompt the blocks of its tokens."""
    tokens, batch, blocks = cells["prefill_tokens"], cells["batch"], cells["kv_blocks"]
    if blocks < batch:
        return f"{_short(blocks)} kv_blocks for a batch of {_short(batch)}, and each request holds one at least"
    # Without the column `prompts`, all requests may be prompts.
    prompts = cells.get("prompts", batch)
    needed = batch - prompts + max(prompts, -(-tokens // cells["block_tokens"]))
    if blocks < needed:
        return (
            f"{_short(blocks)} kv_blocks, and {_short(tokens)} prefill_tokens in blocks of "
            f"{_short(cells['block_tokens'])}, with the other requests, hold {_short(needed)} at least"
        )
    return None


def _wrong_pairs(cells: Mapping[str, Any], model: Model) -> str | None:
    """Pairs of whole prompts lie between those of equal ones and those of a single one; chunks see earlier tokens too.

    1 %, and a pair for each token, allow for rounding and for whether a token attends to itself.
    """
    pairs, tokens, batch = cells.get("prefill_pairs"), cells["prefill_tokens"], cells["batch"]
    if pairs is None:
        return None
    prompts = cells.get("prompts", batch)
    held = min(prompts * model.max_context_tokens, cells["kv_blocks"] * cells["block_tokens"] - (batch - prompts))
    least = tokens**2 / 2 / max(prompts, 1)
    most = tokens**2 / 2 + tokens * max(0, held - tokens)
    if 0.99 * least - tokens <= pairs <= 1.01 * most + tokens:
        return None
    return (
        f"{_short(pairs)} prefill_pairs, and {_short(tokens)} prefill_tokens of {_short(prompts)} prompts, with the "
        f"tokens that may precede them, have {_short(least)} to {_short(most)}"
    )


def _point(row: int, cells: Mapping[str, Any], prompts: int) -> Point:
    tokens, block = cells["prefill_tokens"], cells["block_tokens"]
    decode_batch = cells["batch"] - prompts
    # About half of each request's last block is filled, as in profiling/measure.py.
    blocks = cells["kv_blocks"] - (prompts and prompts * -(-tokens // (prompts * block)))
    kv_tokens = max(decode_batch, blocks * block - decode_batch * (block - 1) // 2) if decode_batch else 0
    pairs = cells.get("prefill_pairs")
    if pairs is None:
        pairs = tokens**2 / 2 / max(prompts, 1)
    return Point(
        row, cells["tp"], cells["batch"], cells["clock_mhz"], decode_batch, kv_tokens, tokens, float(pairs),
        cells["seconds"], cells["watts"],
    )  # fmt: skip


def _short(number: float) -> str:
    """All digits of a plausible figure, few of an absurd one."""
    return f"{number:.6g}" if abs(number) >= 1e7 or number % 1 else f"{number:.0f}"


def sample(points: Sequence[Point], most: int, seed: int = 0) -> list[Point]:
    """At most `most` points, spread evenly over engine sizes, clocks, batch sizes, and with or without prompts.

    Every stratum gives one point before any gives a second. Same seed, same points, in the profile's order.
    """
    if len(points) <= most:
        return list(points)
    rng = np.random.default_rng(seed)
    clocks = bands([point.clock_mhz for point in points], most=8)
    batches = bands([point.batch for point in points], most=6)
    taken: dict[tuple[int, int, int, bool], int] = {}
    ranked: list[tuple[int, int, int]] = []
    for index in rng.permutation(len(points)).tolist():
        point = points[index]
        stratum = (point.tp, clocks[point.clock_mhz], batches[point.batch], point.prefill_tokens > 0)
        taken[stratum] = taken.get(stratum, 0) + 1
        ranked.append((taken[stratum], len(ranked), index))
    return [points[index] for index in sorted(index for *_, index in sorted(ranked)[:most])]


def bands(values: Sequence[int], most: int, fewest: int = 1) -> dict[int, int]:
    """The band 0, 1 ... of every distinct value; bands hold neighbouring values, so that none is too small to hold out.

    At most `most` bands, each of `fewest` measurements or more. At most `most` values, each measured often enough, are
    a band each.
    """
    counts = Counter(values)
    wanted = [chunk.tolist() for chunk in np.array_split(sorted(counts), min(most, len(counts)))]
    joined: list[list[int]] = []
    open_band: list[int] = []
    for chunk in wanted:
        open_band += chunk
        if sum(counts[value] for value in open_band) >= fewest:
            joined.append(open_band)
            open_band = []
    if open_band:
        joined = [*joined[:-1], [*joined[-1], *open_band]] if joined else [open_band]
    return {value: band for band, members in enumerate(joined) for value in members}
