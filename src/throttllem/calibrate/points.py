"""Measured iterations as the law takes them: decode rows, KV tokens, prompt tokens and pairs, from a profile's columns.

Knows the profile's format and the model's context, and nothing of GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from throttllem.calibrate.bands import bands
from throttllem.physics.catalogue import Model
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
    def asked(self) -> tuple[int, int, int, int, float]:
        """The arguments of `EnginePhysics.iteration`."""
        return self.clock_mhz, self.decode_batch, self.kv_tokens, self.prefill_tokens, self.prefill_pairs


def points_of(profile: pl.DataFrame, model: Model, file: Path) -> list[Point]:
    """Every row of a checked profile.

    Raises ProfileError (file, first row, how many) for rows whose requests, blocks, prompts or pairs cannot be.
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
    refuse_rows(impossible, profile.height, file, "correct these columns (docs/profile-format.md)")
    return points


def refuse_rows(impossible: Sequence[tuple[int, str]], rows: int, file: Path, remedy: str) -> None:
    """Raises ProfileError if there is any row that cannot be: the first with its reason, how many, and the remedy."""
    if impossible:
        row, why = impossible[0]
        raise ProfileError(f"{file}, {place(file, row)}: {why} ({len(impossible)} of {rows} rows cannot be): {remedy}")


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
    """Each request holds a block of its own, and each prompt those of the tokens that it brings."""
    tokens, batch, blocks = cells["prefill_tokens"], cells["batch"], cells["kv_blocks"]
    if blocks < batch:
        return f"{_short(blocks)} kv_blocks for a batch of {_short(batch)}, and each request holds one at least"
    # Where nothing says how many prompts there are, all requests may be.
    prompts = cells.get("prompts", batch)
    needed = batch - prompts + max(prompts, -(-tokens // cells["block_tokens"]))
    if blocks < needed:
        return (
            f"{_short(blocks)} kv_blocks, and {_short(tokens)} prefill_tokens in blocks of "
            f"{_short(cells['block_tokens'])}, with what else runs, hold {_short(needed)} at least"
        )
    return None


def _wrong_pairs(cells: Mapping[str, Any], model: Model) -> str | None:
    """Pairs of whole prompts lie between those of equal ones and those of a single one; chunks see older tokens too.

    1 %, and a pair for each token, are left for rounding and for whether a token sees itself.
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
        f"tokens that may stand before them, have {_short(least)} to {_short(most)}"
    )


def _point(row: int, cells: Mapping[str, Any], prompts: int) -> Point:
    tokens, block = cells["prefill_tokens"], cells["block_tokens"]
    decode_batch = cells["batch"] - prompts
    # Of each request's last block about half is filled, as profiling/measure.py has it.
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
    """Figures that a row can hold in full, absurd ones in few digits."""
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
