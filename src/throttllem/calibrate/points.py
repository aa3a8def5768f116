"""Measured iterations as the law takes them: decode rows, KV tokens, prompt tokens and pairs, from a profile's columns.

Knows the profile's format and the model's context, and nothing of GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from throttllem.calibrate.bands import bands
from throttllem.learn.profile import ProfileError, place
from throttllem.physics.catalogue import Model


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
    """Every row of a checked profile. Raises ProfileError, with the row, for prompts that its batch cannot hold."""
    return list(_points(profile, model, file))


def _points(profile: pl.DataFrame, model: Model, file: Path) -> Iterator[Point]:
    for row, cells in enumerate(profile.iter_rows(named=True)):
        tokens, block = cells["prefill_tokens"], cells["block_tokens"]
        prompts = cells.get("prompts")
        if prompts is None:
            prompts = -(-tokens // model.max_context_tokens)
        where = f"{file}, {place(file, row)}"
        if prompts > cells["batch"]:
            raise ProfileError(
                f"{where}: {tokens} prefill_tokens are {prompts} prompts or more ({model.name} holds "
                f"{model.max_context_tokens} tokens each), and batch is {cells['batch']}"
            )
        if (prompts == 0) != (tokens == 0) or tokens < prompts:
            raise ProfileError(f"{where}: {prompts} prompts and {tokens} prefill_tokens contradict each other")
        decode_batch = cells["batch"] - prompts
        # Of each request's last block about half is filled, as learn/measure.py has it.
        blocks = cells["kv_blocks"] - (prompts and prompts * -(-tokens // (prompts * block)))
        kv_tokens = max(decode_batch, blocks * block - decode_batch * (block - 1) // 2) if decode_batch else 0
        pairs = cells.get("prefill_pairs")
        if pairs is None:
            pairs = tokens**2 / 2 / max(prompts, 1)
        yield Point(
            row, cells["tp"], cells["batch"], cells["clock_mhz"], decode_batch, kv_tokens, tokens, float(pairs),
            cells["seconds"], cells["watts"],
        )  # fmt: skip


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
