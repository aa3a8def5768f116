"""Measured operator latencies of one GPU, and whole iterations composed of them. Knows nothing of the physics.

Between measured sizes: matrix widths by a straight line; heads, batches and messages by a straight line of logarithms.
Nothing is extended beyond the tables, but the width of a matrix (the heads of Llama-3 are wider than any measured).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Self

import polars as pl

from throttllem.physics.model import Model

Table = Mapping[tuple[int, ...], float]
TPS = (1, 2, 4, 8)
BATCHES = tuple(2**power for power in range(9))
CONTEXTS = tuple(2**power for power in range(6, 14))
"""KV tokens of a request, and tokens of a prompt."""
SMALLEST_WIDTH = 512
"""Narrower matrices than these are in the tables, but in none of the models."""
_HEAD_DIM = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """`batch` requests that read `tokens` of KV each (`decode`), or one prompt of `tokens`. Seconds, by operator."""

    model: Model
    tp: int
    decode: bool
    batch: int
    tokens: int
    gemm_s: float
    attention_s: float
    allreduce_s: float

    @property
    def rows(self) -> int:
        """Tokens that go through the layers."""
        return self.batch if self.decode else self.tokens

    @property
    def measured_s(self) -> float:
        """The sum of its operators."""
        return self.gemm_s + self.attention_s + self.allreduce_s


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorTables:
    """Seconds. Keys: (rows, width, depth) of a matrix product; (heads, KV heads, batch, tokens) of an attention;
    (GPUs, values) of an all-reduce."""

    gemm: Table
    decode: Table
    prefill: Table
    allreduce: Table
    widths: Sequence[int]
    heads: frozenset[tuple[int, int]]
    """Heads and KV heads of the decode table."""
    alone: Sequence[int]
    """Heads of the prefill table that each have a KV head of their own."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The bfloat16 operators of a folder: heads of 128, all-reduce within a CUDA graph."""
        allreduce = pl.scan_parquet(folder / "custom_allreduce_perf.parquet").filter(pl.col("backend") == "vllm_graph")
        products, prefill = cls.products(folder, "bfloat16"), _attention(folder, "context", "isl")
        decode = {(*key[:3], key[3] + 1): seconds for key, seconds in _attention(folder, "generation", "step").items()}
        return cls(
            gemm=products,
            decode=decode,
            prefill=prefill,
            allreduce=_table(allreduce, "num_gpus", "message_size"),
            widths=sorted({width for _, width, _ in products}),
            heads=frozenset((heads, kv_heads) for heads, kv_heads, _, _ in decode),
            alone=sorted({heads for heads, kv_heads, _, _ in prefill if heads == kv_heads}),
        )

    @staticmethod
    def products(folder: Path, dtype: str) -> Table:
        """Matrix products with operands of that type."""
        gemm = pl.scan_parquet(folder / "gemm_perf.parquet").filter(
            (pl.col("gemm_dtype") == dtype) & (pl.min_horizontal("n", "k") >= SMALLEST_WIDTH)
        )
        return _table(gemm, "m", "n", "k")

    def matrix_s(self, rows: int, width: int, depth: int) -> float:
        """One matrix product. KeyError where its rows were not measured."""
        corners = product(_near(width, self.widths), _near(depth, self.widths))
        return sum(self.gemm[rows, n, k] * n_part * k_part for (n, n_part), (k, k_part) in corners)

    def decode_s(self, heads: int, kv_heads: int, batch: int, context: int) -> float:
        """Attention of one layer. Heads work one by one: five times eight of them are eight at five times the batch."""
        folds = (fold for fold in range(1, kv_heads + 1) if kv_heads % fold == 0)
        fold = next(fold for fold in folds if (heads // fold, kv_heads // fold) in self.heads)
        key = heads // fold, kv_heads // fold
        return _log_line(lambda size: self.decode[(*key, size, context)], batch * fold)

    def prefill_s(self, heads: int, kv_heads: int, prompt: int) -> float:
        """Attention of one layer over one prompt."""
        if heads > kv_heads:
            return self.prefill[heads, kv_heads, 1, prompt]
        return _log_line(lambda size: self.prefill[size, size, 1, prompt], heads, self.alone)

    def allreduce_s(self, gpus: int, values: int) -> float:
        """One all-reduce of so many values; 0 for one GPU."""
        return _log_line(lambda size: self.allreduce[gpus, size], values) if gpus > 1 else 0.0


def compose(tables: OperatorTables, models: Sequence[Model], fits: Callable[[Model, int], bool]) -> list[Iteration]:
    """Every iteration of the comparison that the tables hold; `fits(model, tp)` says which engines there are."""
    engines = [(model, tp) for model, tp in product(models, TPS) if fits(model, tp)]
    return [iteration for model, tp in engines for iteration in _iterations(tables, model, tp)]


def _iterations(tables: OperatorTables, model: Model, tp: int) -> Iterator[Iteration]:
    sizes = [(True, batch, tokens) for batch, tokens in product(BATCHES, CONTEXTS)]
    sizes += [(False, 1, tokens) for tokens in CONTEXTS]
    layers: dict[int, tuple[float, float]] = {}
    heads, kv_heads = model.heads // tp, max(1, model.kv_heads // tp)
    for decode, batch, tokens in sizes:
        rows = batch if decode else tokens
        if rows not in layers:
            layers[rows] = _layer(tables, model, tp, rows)
        gemm_s, allreduce_s = layers[rows]
        try:
            if decode:
                attention_s = tables.decode_s(heads, kv_heads, batch, tokens)
            else:
                attention_s = tables.prefill_s(heads, kv_heads, tokens)
        except KeyError:  # batch x tokens beyond the memory of the GPU that was measured
            continue
        yield Iteration(
            model=model,
            tp=tp,
            decode=decode,
            batch=batch,
            tokens=tokens,
            gemm_s=model.layers * gemm_s + tables.matrix_s(batch, model.vocabulary // tp, model.hidden),
            attention_s=model.layers * attention_s,
            allreduce_s=model.layers * allreduce_s,
        )


def _layer(tables: OperatorTables, model: Model, tp: int, rows: int) -> tuple[float, float]:
    """Seconds of a layer's matrix products, and of its two all-reduces."""
    gemm_s = sum(tables.matrix_s(rows, width, depth) for width, depth in layer_shapes(model, tp))
    return gemm_s, 2 * tables.allreduce_s(tp, rows * model.hidden)


def layer_shapes(model: Model, tp: int) -> tuple[tuple[int, int], ...]:
    """Width and depth of the four matrices of a layer on one GPU."""
    query, kv = model.heads // tp * _HEAD_DIM, max(1, model.kv_heads // tp) * _HEAD_DIM
    wide = model.intermediate // tp
    return (query + 2 * kv, model.hidden), (model.hidden, query), (2 * wide, model.hidden), (model.hidden, wide)


def _table(frame: pl.LazyFrame, *keys: str) -> Table:
    rows = frame.group_by(keys).agg(pl.col("latency").median() / 1e3).collect().iter_rows()
    return {tuple(row[:-1]): row[-1] for row in rows}


def _attention(folder: Path, kind: str, length: str) -> Table:
    frame = pl.scan_parquet(folder / f"{kind}_attention_perf.parquet")
    frame = frame.filter((pl.col("head_dim") == _HEAD_DIM) & (pl.col("kv_cache_dtype") == "bfloat16"))
    if "window_size" in frame.collect_schema().names():
        frame = frame.filter(pl.col("window_size") == 0)
    return _table(frame, "num_heads", "num_key_value_heads", "batch_size", length)


def _near(width: int, widths: Sequence[int]) -> list[tuple[int, float]]:
    """The neighbours of a width, and the part of each in a straight line between them."""
    at = min(max(1, bisect_left(widths, width)), len(widths) - 1)
    low, high = widths[at - 1], widths[at]
    share = (width - low) / (high - low)
    return [(size, part) for size, part in ((low, 1 - share), (high, share)) if part]


def _log_line(measured: Callable[[int], float], size: int, known: Sequence[int] | None = None) -> float:
    """Between the neighbours in `known` (None: the powers of two), a straight line of logarithms."""
    known = known or [1 << power for power in range(size.bit_length() + 1)]
    if size in known:
        return measured(size)
    at = bisect_left(known, size)
    low, high = known[at - 1], known[at]
    share = math.log(size / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(measured(low)) + share * math.log(measured(high)))
