"""FP8 products, summed over the layers of models, and layers of experts, as measured, against the physics.

FP8 constants are fitted to single products, never to these sums. What a table's own launch adds to a layer of experts
is fitted beside the shipped constants: engines launch otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from throttllem.calibrate.errors import Errors
from throttllem.calibrate.fit import with_constants
from throttllem.physics.catalogue import Catalogue, Gpu
from throttllem.physics.model import Model, Weights
from tools.fidelity.operator_laws import GEMM, Operator
from tools.fidelity.operator_tables import TPS, OperatorTables, Table, layer_shapes
from tools.fidelity.section import ErrorRow, Section, Target

Array = NDArray[np.float64]
LIMIT = 0.12
DENSE = ("llama-2-13b", "llama-3-8b", "llama-3-70b", "qwen3-8b", "qwen3-32b")
TOKENS = tuple(2**power for power in range(14))
MOST_GPUS = 8
EXPERT_KEYS = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
NATIVE_FP4 = "b200-180gb-sxm"
"""Its tensor cores take MXFP4 as it is; the others unpack it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A GPU of the catalogue and the folders of its tables."""

    title: str
    gpu: str
    products: str
    experts: str


PARTS = (
    _Part(title="H100", gpu="h100-80gb-sxm", products="h100_sxm", experts="h100_sxm_fp8_moe"),
    _Part(title="H200", gpu="h200-141gb-sxm", products="h200_sxm", experts="h200_sxm"),
    _Part(title="B200", gpu="b200-180gb-sxm", products="b200_sxm", experts="b200_sxm"),
    _Part(title="L40S", gpu="l40s-48gb", products="l40s", experts="l40s"),
)


def fp8_s(gpu: Gpu, rows: Array, width: Array, depth: Array) -> Array:
    """One product of FP8 weights with activations that are quantised to FP8."""
    law, peak = gpu.time, gpu.peak_fp8_flop_per_s
    assert peak is not None
    moved = width * depth + rows * (depth + 2 * width)
    memory_s = moved / (gpu.bandwidth_bytes_per_s * law.fp8_bandwidth_fraction)
    compute_s = 2 * rows * width * depth / (peak * law.fp8_peak_fraction)
    found: Array = (memory_s**law.fp8_norm + compute_s**law.fp8_norm) ** (1 / law.fp8_norm) + law.fp8_kernel_s
    return found


def experts_s(weights: Weights) -> Callable[..., Array]:
    """The law of one layer's experts with weights of that format."""

    def law_s(
        gpu: Gpu, tokens: Array, hidden: Array, wide: Array, active: Array, count: Array, tp: Array, ep: Array
    ) -> Array:
        law, bandwidth = gpu.time, gpu.bandwidth_bytes_per_s * gpu.time.expert_bandwidth_fraction
        peak, operand, kernel_s = gpu.peak_flop_per_s * law.expert_peak_fraction, 2, law.expert_kernel_s
        if weights is Weights.FP8:
            assert gpu.peak_fp8_flop_per_s is not None
            peak, operand = gpu.peak_fp8_flop_per_s * law.expert_fp8_peak_fraction, 1
            kernel_s = law.fp8_expert_kernel_s
        elif weights is Weights.MXFP4:
            bandwidth = gpu.bandwidth_bytes_per_s * law.int4_bandwidth_fraction
            peak = gpu.peak_flop_per_s * law.int4_peak_fraction
        one, chosen = 3 * hidden * wide / tp, tokens * active / ep
        reached = count / ep * (1 - (1 - active / count) ** tokens)
        io_bytes = (hidden + wide / tp) * operand + (hidden + 2 * wide / tp) * 2
        moved = reached * one * weights.bytes_per_parameter + chosen * io_bytes
        found: Array = moved / bandwidth + 2 * chosen * one / peak + kernel_s
        return found

    return law_s


FP8 = Operator(
    name="products of FP8",
    law=fp8_s,
    constants=("fp8_bandwidth_fraction", "fp8_peak_fraction", "fp8_norm", "fp8_kernel_s"),
    table=lambda tables: tables.gemm,
    wanted=GEMM.wanted,
)
EXPERTS = {
    Weights.BF16: ("expert_bandwidth_fraction", "expert_peak_fraction"),
    Weights.FP8: ("expert_fp8_peak_fraction",),
    Weights.MXFP4: ("int4_bandwidth_fraction", "int4_peak_fraction"),
}
"""The shipped constants of each format."""
_OWN = {Weights.FP8: "fp8_expert_kernel_s"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compared:
    """One operator of one GPU: the points that are fitted, and the constants that the catalogue has from the fit.

    `own` are those of the table alone. `sums`: what is judged, by number of rows; None: the points themselves.
    """

    title: str
    operator: Operator
    points: Table
    own: tuple[str, ...] = ()
    sums: Sequence[tuple[int, Table]] | None = None

    def constants(self, gpu: Gpu) -> dict[str, float]:
        """From everything."""
        return _values(
            self._fitted(gpu, self.points), [name for name in self.operator.constants if name not in self.own]
        )

    def errors(self, gpu: Gpu) -> Array:
        """Of the shipped constants; what the table's launch adds is fitted."""
        return self._judged(with_constants(gpu, _values(self._fitted(gpu, self.points), self.own)), None)

    def held_out(self, gpu: Gpu) -> Array:
        """Each number of rows left out of the fit in turn."""
        every = {key[0] for key in self.points} if self.sums is None else {rows for rows, _ in self.sums}
        found = []
        for rows in sorted(every):
            seen = {key: seconds for key, seconds in self.points.items() if key[0] != rows}
            found.append(self._judged(self._fitted(gpu, seen), rows))
        return np.concatenate(found)

    def _fitted(self, gpu: Gpu, points: Table) -> Gpu:
        """The GPU with the constants that these points and generic priors give."""
        found = self.operator.fit(gpu, points)
        return with_constants(gpu, {each.constant.path: each.value for each in found})

    def _judged(self, gpu: Gpu, rows: int | None) -> Array:
        """Relative errors at that number of rows, or at all."""
        if self.sums is None:
            chosen = {key: s for key, s in self.points.items() if rows is None or key[0] == rows}
            return self.operator.errors(gpu, chosen)
        found = []
        for at, layer in self.sums:
            if rows is None or at == rows:
                measured = np.array(list(layer.values()))
                found.append((1 + self.operator.errors(gpu, layer)) @ measured / measured.sum() - 1)
        return np.array(found)


def _values(gpu: Gpu, names: Sequence[str]) -> dict[str, float]:
    return {f"time.{name}": float(getattr(gpu.time, name)) for name in names}


def section(data: Path, catalogue: Catalogue) -> Section:
    """Each operator of each GPU: as shipped, and with each number of rows left out."""
    rows: list[ErrorRow] = []
    targets: list[Target] = []
    constants: dict[str, dict[str, float]] = {}
    for part in PARTS:
        gpu, held = catalogue.gpu(part.gpu), []
        for compared in _compared(part, data, catalogue):
            held.append(compared.held_out(gpu))
            rows += [
                ErrorRow(what=compared.title, held_out="nothing", errors=Errors.of(compared.errors(gpu))),
                ErrorRow(what=compared.title, held_out="each number of rows", errors=Errors.of(held[-1])),
            ]
            constants.setdefault(part.gpu, {}).update(compared.constants(gpu))
        median = Errors.of(np.concatenate(held)).median
        targets.append(
            Target(
                what=f"{part.title}: layers of FP8 products and of experts, each number of rows left out: median",
                limit=f"{LIMIT:.0%}",
                found=f"{median:.1%}",
                met=median <= LIMIT,
            )
        )
    return Section(
        title="Operators of FP8, 4-bit weights and experts",
        text=_TEXT,
        rows=tuple(rows),
        targets=tuple(targets),
        constants=constants,
    )


def _compared(part: _Part, data: Path, catalogue: Catalogue) -> Iterator[_Compared]:
    folder = data / "operators"
    products = OperatorTables.products(folder / part.products, "fp8")
    fp8 = {key: seconds for key, seconds in products.items() if FP8.wanted(key)}
    models = [catalogue.model(name) for name in DENSE]
    sums = list(_layers(products, models))
    yield _Compared(title=f"{part.title}: layers of {FP8.name}", operator=FP8, points=fp8, sums=sums)
    for weights, shipped in EXPERTS.items():
        points = _experts(folder / part.experts, _dtype(weights, part.gpu), catalogue)
        own = _OWN.get(weights, "expert_kernel_s")
        operator = Operator(
            name=f"experts of {weights.upper()}",
            law=experts_s(weights),
            constants=(*shipped, own),
            table=lambda tables: tables.gemm,
            wanted=lambda key: True,
        )
        yield _Compared(title=f"{part.title}: {operator.name}", operator=operator, points=points, own=(own,))


def _layers(products: Table, models: Sequence[Model]) -> Iterator[tuple[int, Table]]:
    """The four products of a layer, for every number of rows and TP, where all were measured (to the nearest width)."""
    widths = sorted({width for _, width, _ in products})
    every = sorted({rows for rows, _, _ in products} & set(TOKENS))
    for model, tp, rows in product(models, TPS, every):
        shapes = ((width, depth) for width, depth in layer_shapes(model, tp))
        keys = [(rows, _nearest(width, widths), _nearest(depth, widths)) for width, depth in shapes]
        if all(key in products for key in keys):
            yield rows, {key: products[key] for key in keys}


def _nearest(width: int, widths: Sequence[int]) -> int:
    return min(widths, key=lambda known: abs(known - width))


def _dtype(weights: Weights, gpu: str) -> str:
    """The tables' name of a format, as engines run it on that GPU."""
    if weights is Weights.MXFP4:
        return "w4a8_mxfp4_mxfp8" if gpu == NATIVE_FP4 else "w4a16_mxfp4"
    return {Weights.BF16: "bfloat16", Weights.FP8: "fp8_block"}[weights]


def _experts(folder: Path, dtype: str, catalogue: Catalogue) -> Table:
    """The fastest kernel at each point, for the widths of models of the catalogue on at most MOST_GPUS GPUs.

    Tokens choose experts unevenly (the tables' power laws), as they do in engines. FP4 of the B200 was measured for
    models of its own, all of which are taken.
    """
    frame = pl.scan_parquet(folder / "moe_perf.parquet").filter(
        (pl.col("moe_dtype") == dtype)
        & pl.col("num_tokens").is_in(TOKENS)
        & pl.col("distribution").str.starts_with("power_law")
        & (pl.col("moe_tp_size") * pl.col("moe_ep_size") <= MOST_GPUS)
    )
    rows = frame.group_by(EXPERT_KEYS).agg(pl.col("latency").min() / 1e3).collect().iter_rows()
    found = {tuple(row[:-1]): row[-1] for row in rows}
    shapes = {
        (model.hidden, model.experts.intermediate, model.experts.active, model.experts.count)
        for model in catalogue.models.values()
        if model.experts
    }
    known = {key: seconds for key, seconds in found.items() if key[1:5] in shapes}
    return known or found


_TEXT = """\
Latencies of products with FP8 weights (one scale a matrix, CUTLASS), summed over the four of a layer of five dense
models at TP 1 to 8, and of one layer of experts (bfloat16, FP8 in blocks, MXFP4), from vLLM 0.24 (aiconfigurator-core
0.12.0), for the widths of the models that ship. Experts are those
that a batch reaches when tokens choose evenly; the tables' choices are uneven, which is part of what is left. FP8
products in blocks are in the tables as launched from Python, 60 to 300 us each, which an engine's CUDA graph does not
take: they are left out. So is what a layer of experts takes beside its products: it is fitted to each table alone, and
the shipped one to served models (next).

What the law leaves: kernels are tuned shape by shape, so that neighbouring widths differ by 20 to 50 %; a B200 takes
another kernel for one and two rows of FP8 that is twice as slow; few experts of few columns (TP 8) leave
multiprocessors without work.
"""
