"""Tabulates the law of an engine: seconds and watts at every clock over the whole grid of batch, KV blocks and prompts.

Knows nothing of how the law was found, nor of files.
"""

# A cell spans some batch sizes, KV fills and prompt lengths. Its figures are the law's in its middle, and its edges are
# so close that the law changes by some per cent within it. As everywhere in a table, batch counts prompts. The tokens
# are one prompt (more where they exceed the model's context), and half of each sequence's last block is filled.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from throttllem.core.forecast.performance_table import Calibrated, Hull, PerformanceTable
from throttllem.core.types import EngineSpec
from throttllem.profiling.measure import Iterates, blocks

BATCH_BINS, KV_BINS, PREFILL_BINS = 14, 20, 32
"""Most bins of each axis; iterations without prompts have one more."""
PROGRESS_EVERY = 500
CHECKED, PROMPTS_SHARE = 200, 0.3
"""Points at which a table is compared with its law, and the part of them with prompts."""

Progress = Callable[[int, int], None]
"""Called with (cells done, cells in all)."""


def tabulate(
    engine: Iterates, spec: EngineSpec, calibrated: Calibrated, on_progress: Progress = lambda *_: None
) -> PerformanceTable:
    """The table of one engine size at all clocks of `spec`, over its whole batch, KV cache and prefill budget."""
    batches = _edges(1, spec.max_batch, spec.max_batch / 16, BATCH_BINS)
    fills = _edges(1, spec.kv_blocks, spec.kv_blocks / 16, KV_BINS)
    prompts = [0, *_edges(1, spec.prefill_budget_tokens, spec.prefill_budget_tokens / 32, PREFILL_BINS)]
    cells = [
        (batch, kv_blocks, prefill)
        for prefill in _middles(prompts)
        for batch in _middles(batches)
        for kv_blocks in _middles(fills)
    ]
    law = np.empty((len(cells), len(spec.clocks_mhz), 2))
    for number, cell in enumerate(cells):
        law[number] = _law(engine, spec, *cell)
        if number % PROGRESS_EVERY == 0:
            on_progress(number, len(cells))
    on_progress(len(cells), len(cells))
    return PerformanceTable(
        clocks_mhz=spec.clocks_mhz,
        batch_bin=_bins(batches, spec.max_batch),
        kv_bin=_bins(fills, spec.kv_blocks),
        prefill_bin=_bins(prompts, spec.prefill_budget_tokens),
        seconds=law[:, :, 0].astype(np.float32),
        watts=law[:, :, 1].astype(np.float32),
        hull=Hull(
            max_batch=spec.max_batch,
            max_kv_blocks=spec.kv_blocks,
            max_prefill_tokens=spec.prefill_budget_tokens,
        ),
        calibrated=calibrated,
    )


def cell_errors(table: PerformanceTable, engine: Iterates, spec: EngineSpec) -> npt.NDArray[np.float64]:
    """Relative errors that a table of this law has by its cells alone, at random points: seconds and watts, (n, 2)."""
    rng, found = np.random.default_rng(0), []
    for _ in range(CHECKED):
        batch = round(spec.max_batch ** rng.random())
        kv_blocks = round(batch * (spec.kv_blocks / batch) ** rng.random())
        prefill = round(spec.prefill_budget_tokens ** rng.random()) if rng.random() < PROMPTS_SHARE else 0
        law, cell = _law(engine, spec, batch, kv_blocks, prefill), table.cell(batch, kv_blocks, prefill)
        found.append(np.stack([table.seconds[cell], table.watts[cell]], axis=1) / law - 1)
    return np.concatenate(found)


def _law(
    engine: Iterates, spec: EngineSpec, batch: int, kv_blocks: int, prefill_tokens: int
) -> npt.NDArray[np.float64]:
    """Seconds and watts at every clock, shape (clocks, 2)."""
    prompts = min(batch, math.ceil(prefill_tokens / spec.max_context_tokens))
    decode = batch - prompts
    held = max(kv_blocks - blocks(prefill_tokens, spec), decode) * spec.block_tokens
    tokens = max(decode, held - decode * (spec.block_tokens - 1) // 2) if decode else 0
    pairs = prefill_tokens**2 / 2 / max(prompts, 1)
    return np.array([engine.iteration(mhz, decode, tokens, prefill_tokens, pairs) for mhz in spec.clocks_mhz])


def _edges(low: int, high: int, shift: float, most: int) -> list[int]:
    """The last value of each bin, up to `high`, even in log(value + shift)."""
    return sorted({round(value) for value in np.geomspace(low + shift, high + shift, most) - shift} | {high})


def _middles(edges: Sequence[int]) -> list[int]:
    """The middle of each bin."""
    lows = [edges[0], *(edge + 1 for edge in edges[:-1])]
    return [(low + edge) // 2 for low, edge in zip(lows, edges, strict=True)]


def _bins(edges: Sequence[int], last: int) -> npt.NDArray[np.int32]:
    return np.searchsorted(np.array(edges), np.arange(last + 1)).astype(np.int32)
