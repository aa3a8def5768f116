"""The time law one operator at a time, in numpy, and its fit to the measured operators.

`physics.load` sums the same law over a model's operators. Knows nothing of models nor of iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from throttllem.calibrate.fit import Fitted, fit
from throttllem.calibrate.prior import around
from throttllem.physics.catalogue import Gpu
from throttllem.physics.load import LARGE_ALLREDUCE_BYTES
from tools.fidelity.operator_tables import BATCHES, CONTEXTS, OperatorTables, Table

Array = NDArray[np.float64]
VALUE_BYTES, HEAD_DIM = 2, 128
_SPREAD = 0.1
"""Of a measured operator about any compact law, in logarithm: tiles, waves of thread blocks, cache."""
_ROWS = BATCHES + CONTEXTS[3:]
_LARGEST_GROUP = 8
"""Query heads of a KV head in Llama-3 and everything like it."""


def gemm_s(gpu: Gpu, rows: Array, width: Array, depth: Array) -> Array:
    """One matrix product: the smooth maximum of memory and arithmetic."""
    law = gpu.time
    values = width * depth + rows * (width + depth)
    memory_s = values * VALUE_BYTES / (gpu.bandwidth_bytes_per_s * law.gemm_bandwidth_fraction)
    compute_s = 2 * rows * width * depth / (gpu.peak_flop_per_s * law.gemm_peak_fraction)
    found: Array = (memory_s**law.gemm_norm + compute_s**law.gemm_norm) ** (1 / law.gemm_norm) + law.gemm_kernel_s
    return found


def decode_s(gpu: Gpu, heads: Array, kv_heads: Array, batch: Array, context: Array) -> Array:
    """Decode attention of one layer."""
    law, grouped = gpu.time, heads > kv_heads
    kv_bytes = 2 * batch * context * kv_heads * HEAD_DIM * VALUE_BYTES
    read_s = kv_bytes / (gpu.bandwidth_bytes_per_s * law.decode_bandwidth_fraction)
    read_s = read_s + batch * kv_heads * law.decode_row_s
    walk_s = np.where(grouped, 0.0, context * law.decode_walk_token_s)
    found: Array = law.decode_kernel_s + np.where(grouped, law.decode_split_s, 0.0) + np.maximum(read_s, walk_s)
    return found


def prefill_s(gpu: Gpu, heads: Array, kv_heads: Array, prompt: Array) -> Array:
    """Attention of one layer over one whole prompt."""
    law = gpu.time
    arithmetic_s = 2 * heads * HEAD_DIM * prompt**2 / (gpu.peak_flop_per_s * law.prefill_peak_fraction)
    io_bytes = 2 * (heads + kv_heads) * HEAD_DIM * VALUE_BYTES * prompt
    io_s = io_bytes / (gpu.bandwidth_bytes_per_s * law.prefill_bandwidth_fraction)
    found: Array = law.prefill_kernel_s + prompt * law.prefill_walk_token_s + arithmetic_s + io_s
    return found


def allreduce_s(gpu: Gpu, gpus: Array, values: Array) -> Array:
    """One all-reduce, in one step or in two."""
    law, message_bytes = gpu.time, values * VALUE_BYTES
    message_s = message_bytes / law.allreduce_bytes_per_s
    two_steps_s = np.where(gpus > 2, law.allreduce_step_s, 0.0) + 2 * (gpus - 1) / gpus * message_s
    large_s = np.where(message_bytes >= LARGE_ALLREDUCE_BYTES, law.allreduce_large_s, 0.0)
    steps_s: Array = np.minimum((gpus - 1) * message_s, two_steps_s)
    return law.allreduce_s + gpus * law.allreduce_gpu_s + steps_s + large_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One kind of operator: its law, the constants in it, and which of the measured ones a fit may see."""

    name: str
    law: Callable[..., Array]
    constants: tuple[str, ...]
    table: Callable[[OperatorTables], Table]
    wanted: Callable[[tuple[int, ...]], bool]

    def points(self, tables: OperatorTables) -> Table:
        """The measured operators that are like those of a model."""
        return {key: seconds for key, seconds in self.table(tables).items() if self.wanted(key)}

    def errors(self, gpu: Gpu, points: Table) -> Array:
        """Relative errors of the law, point by point."""
        found: Array = self.law(gpu, *_columns(points)) / np.array(list(points.values())) - 1
        return found

    def fit(self, gpu: Gpu, points: Table) -> tuple[Fitted, ...]:
        """The constants that the points and generic priors give; a constant of 0 is no part of this GPU's law."""
        columns, logs = _columns(points), np.log(list(points.values()))
        paths = [f"time.{name}" for name in self.constants if getattr(gpu.time, name)]
        return fit(
            gpu, around(gpu, paths), lambda moved: (np.log(self.law(moved, *columns)) - logs) / _SPREAD, robust=True
        ).constants


GEMM = Operator(
    name="matrix products",
    law=gemm_s,
    constants=("gemm_bandwidth_fraction", "gemm_peak_fraction", "gemm_norm", "gemm_kernel_s"),
    table=lambda tables: tables.gemm,
    wanted=lambda key: key[0] in _ROWS and max(key[1:]) >= 2048,
)
DECODE = Operator(
    name="decode attention",
    law=decode_s,
    constants=(
        "decode_bandwidth_fraction",
        "decode_kernel_s",
        "decode_row_s",
        "decode_split_s",
        "decode_walk_token_s",
    ),
    table=lambda tables: tables.decode,
    wanted=lambda key: key[0] <= _LARGEST_GROUP * key[1] and key[2] <= 1024 and key[3] in CONTEXTS,
)
PREFILL = Operator(
    name="prefill attention",
    law=prefill_s,
    constants=("prefill_peak_fraction", "prefill_bandwidth_fraction", "prefill_kernel_s", "prefill_walk_token_s"),
    table=lambda tables: {(h, kv, n): s for (h, kv, batch, n), s in tables.prefill.items() if batch == 1},
    wanted=lambda key: 4 <= key[0] <= _LARGEST_GROUP * key[1] and CONTEXTS[0] <= key[2] <= CONTEXTS[-1],
)
ALLREDUCE = Operator(
    name="all-reduce",
    law=allreduce_s,
    constants=("allreduce_s", "allreduce_gpu_s", "allreduce_step_s", "allreduce_large_s", "allreduce_bytes_per_s"),
    table=lambda tables: tables.allreduce,
    wanted=lambda key: 2**12 <= key[1] <= 2**26,
)
OPERATORS = (GEMM, DECODE, PREFILL, ALLREDUCE)


def _columns(points: Table) -> list[Array]:
    return [np.array(column, dtype=float) for column in zip(*points, strict=True)]
