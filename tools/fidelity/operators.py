"""Iterations composed of measured operators against the physics, at the top clock: A100, H100, H200, B200 and L40S.

Held out are operators, not iterations: the constants are fitted to single operators and never see a whole iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from throttllem.calibrate.errors import Errors
from throttllem.calibrate.fit import with_constants
from throttllem.physics.catalogue import Catalogue, Gpu
from throttllem.physics.engine import EnginePhysics, ModelDoesNotFit
from throttllem.physics.load import load
from throttllem.physics.model import Model
from tools.fidelity.operator_laws import ALLREDUCE, DECODE, GEMM, HEAD_DIM, OPERATORS, PREFILL, VALUE_BYTES, Operator
from tools.fidelity.operator_plots import plots
from tools.fidelity.operator_tables import BATCHES, CONTEXTS, TPS, Iteration, OperatorTables, compose
from tools.fidelity.section import ErrorRow, Section, Target

MODELS = ("llama-2-13b", "llama-3-8b", "llama-3-70b")
Seen = Callable[[Operator, tuple[int, ...]], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """A part whose operators were measured. The A100 is the 80 GB one: more and faster memory than the catalogue's."""

    title: str
    folder: str
    gpu: str
    bandwidth_bytes_per_s: float
    memory_bytes: float = 85.5e9
    limit: float = 0.10
    """Of the median error, with nothing held out and with each group held out in turn."""
    cache_bytes: float = 0.0
    """Decode attention over less KV is left out of the fit: the tables read the same KV again and again, out of it."""

    def seen(self, operator: Operator, key: tuple[int, ...]) -> bool:
        """Whether a fit may see that operator."""
        return operator is not DECODE or _kv_bytes(key) >= self.cache_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axis:
    """What is left out in turn: the place of it in the key of each operator, and in an iteration (None: no part)."""

    name: str
    places: Mapping[str, int]
    of: Callable[[Iteration], int | None]
    few: tuple[int, ...] = ()

    def kept(self, keep: Callable[[int], bool]) -> Seen:
        """Operators that a fit sees."""
        return lambda operator, key: operator.name not in self.places or keep(key[self.places[operator.name]])


MEASURED = (
    _Measured(title="A100", folder="a100_sxm", gpu="a100-40gb-sxm", bandwidth_bytes_per_s=2.039e12),
    _Measured(title="H100", folder="h100_sxm", gpu="h100-80gb-sxm", bandwidth_bytes_per_s=3.35e12),
    _Measured(title="H200", folder="h200_sxm", gpu="h200-141gb-sxm", bandwidth_bytes_per_s=4.8e12, limit=0.12),
    _Measured(title="B200", folder="b200_sxm", gpu="b200-180gb-sxm", bandwidth_bytes_per_s=8.0e12, limit=0.12),
    _Measured(title="L40S", folder="l40s", gpu="l40s-48gb", bandwidth_bytes_per_s=864e9, limit=0.12, cache_bytes=96e6),
)
DRAWN = ("A100", "H100")
AXES = (
    _Axis(
        name="batch size",
        places={GEMM.name: 0, DECODE.name: 2},
        of=lambda iteration: iteration.batch if iteration.decode else None,
        few=(1, 16, 256),
    ),
    _Axis(
        name="TP degree",
        places={ALLREDUCE.name: 0},
        of=lambda iteration: iteration.tp if iteration.tp > 1 else None,
    ),
    _Axis(
        name="KV or prompt length",
        places={GEMM.name: 0, DECODE.name: 3, PREFILL.name: 2},
        of=lambda iteration: iteration.tokens,
        few=(64, 1024, 8192),
    ),
)


def section(data: Path, catalogue: Catalogue) -> Section:
    """Errors by operator, engine, batch and length; with each batch, TP degree and length held out; plots."""
    models = [catalogue.model(name) for name in MODELS]
    rows: list[ErrorRow] = []
    targets: list[Target] = []
    constants: dict[str, dict[str, float]] = {}
    compared: dict[str, tuple[list[Iteration], NDArray[np.float64]]] = {}
    for part in MEASURED:
        gpu = bare(catalogue.gpu(part.gpu), part.bandwidth_bytes_per_s, part.memory_bytes)
        tables = OperatorTables.read(data / "operators" / part.folder)
        iterations = compose(tables, models, partial(_fits, gpu))
        seconds = physics_s(gpu, iterations)
        if part.title in DRAWN:
            compared[part.title] = iterations, seconds
        rows += _shipped_rows(part.title, gpu, tables, iterations, seconds)
        rows += _held_out_rows(part, gpu, tables, iterations)
        targets += [
            _target(row, part.limit)
            for row in rows
            if row.what == f"{part.title}: iterations" and "but" not in row.held_out
        ]
        fitted = refit(gpu, tables, part.seen)
        paths = [f"time.{name}" for operator in OPERATORS for name in operator.constants]
        constants[part.gpu] = {path: getattr(fitted.time, path.removeprefix("time.")) for path in paths}
    return Section(
        title="Operators: iterations composed of measured latencies",
        text=_TEXT,
        rows=tuple(rows),
        targets=tuple(targets),
        plots=plots(compared),
        constants=constants,
    )


def bare(gpu: Gpu, bandwidth_bytes_per_s: float, memory_bytes: float) -> Gpu:
    """That GPU with the memory that was measured, and without host, small kernels and power limit."""
    nothing = dict.fromkeys(("time.host_s", "time.host_request_s", "time.layer_kernel_s"), 0.0)
    return with_constants(
        gpu,
        nothing | {"bandwidth_bytes_per_s": bandwidth_bytes_per_s, "memory_bytes": memory_bytes, "power.limit_w": 1e6},
    )


def physics_s(gpu: Gpu, iterations: Sequence[Iteration]) -> NDArray[np.float64]:
    """Our seconds at the top clock. The traffic of the small kernels, which are in no table, is taken out."""
    engines: dict[tuple[str, int], tuple[EnginePhysics, float]] = {}
    seconds = []
    for at in iterations:
        key = at.model.name, at.tp
        if key not in engines:
            engines[key] = EnginePhysics(gpu, at.model, at.tp), load(gpu, at.model, at.tp).token_elementwise_s
        engine, small_s = engines[key]
        work = (at.batch, at.batch * at.tokens, 0, 0.0) if at.decode else (0, 0, at.tokens, at.tokens**2 / 2)
        seconds.append(engine.iteration(gpu.clock_max_mhz, *work)[0] - small_s * at.rows)
    return np.array(seconds)


def refit(gpu: Gpu, tables: OperatorTables, seen: Seen) -> Gpu:
    """The GPU with every operator's constants fitted, from generic priors, to the operators that are seen."""
    values: dict[str, float] = {}
    for operator in OPERATORS:
        points = {key: seconds for key, seconds in operator.points(tables).items() if seen(operator, key)}
        values |= {found.constant.path: found.value for found in operator.fit(gpu, points)}
    return with_constants(gpu, values)


def _fits(gpu: Gpu, model: Model, tp: int) -> bool:
    try:
        EnginePhysics(gpu, model, tp)
    except ModelDoesNotFit:
        return False
    return True


def _relative(iterations: Sequence[Iteration], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    relative: NDArray[np.float64] = seconds / np.array([iteration.measured_s for iteration in iterations]) - 1
    return relative


def _shipped_rows(
    title: str, gpu: Gpu, tables: OperatorTables, iterations: Sequence[Iteration], seconds: NDArray[np.float64]
) -> Iterator[ErrorRow]:
    """The shipped constants on everything: whole, by kind, engine, batch and length; then the single operators."""
    relative = _relative(iterations, seconds)
    groups: dict[str, list[float]] = {}
    for at, error in zip(iterations, relative.tolist(), strict=True):
        kind = "decode" if at.decode else "prefill"
        for what in ("iterations", f"{kind} iterations", f"{at.model.name}, TP {at.tp}"):
            groups.setdefault(what, []).append(error)
        if at.decode:
            groups.setdefault(f"decode, batch {at.batch}", []).append(error)
        groups.setdefault(f"{kind}, {at.tokens} tokens", []).append(error)
    order = ["iterations", "decode iterations", "prefill iterations"]
    order += [f"{model}, TP {tp}" for model, tp in product(MODELS, TPS)]
    order += [f"decode, batch {batch}" for batch in BATCHES]
    order += [f"{kind}, {tokens} tokens" for kind, tokens in product(("decode", "prefill"), CONTEXTS)]
    for what in (name for name in order if name in groups):
        yield ErrorRow(what=f"{title}: {what}", held_out="nothing", errors=Errors.of(groups[what]))
    for operator in OPERATORS:
        errors = Errors.of(operator.errors(gpu, operator.points(tables)))
        yield ErrorRow(what=f"{title}: {operator.name}, each alone", held_out="nothing", errors=errors)


def _kv_bytes(key: tuple[int, ...]) -> float:
    """What a decode attention reads."""
    _, kv_heads, batch, tokens = key
    return 2 * HEAD_DIM * VALUE_BYTES * kv_heads * batch * tokens


def _held_out_rows(
    part: _Measured, gpu: Gpu, tables: OperatorTables, iterations: Sequence[Iteration]
) -> Iterator[ErrorRow]:
    """Each value of each axis left out of the fit in turn; then all but three of them."""
    title = part.title
    for axis in AXES:
        values = sorted({value for value in map(axis.of, iterations) if value is not None})
        each = [_left_out(part, gpu, tables, iterations, axis, [value]) for value in values]
        yield ErrorRow(
            what=f"{title}: iterations", held_out=f"each {axis.name}", errors=Errors.of(np.concatenate(each))
        )
        if axis.few:
            others = [value for value in values if value not in axis.few]
            yield ErrorRow(
                what=f"{title}: iterations",
                held_out=f"all but three {axis.name}s",
                errors=Errors.of(_left_out(part, gpu, tables, iterations, axis, others)),
            )


def _left_out(
    part: _Measured,
    gpu: Gpu,
    tables: OperatorTables,
    iterations: Sequence[Iteration],
    axis: _Axis,
    values: Sequence[int],
) -> NDArray[np.float64]:
    """Relative errors of the iterations at these values, by a fit that saw no operator there."""
    kept = axis.kept(lambda value: value not in values)
    fitted = refit(gpu, tables, lambda operator, key: part.seen(operator, key) and kept(operator, key))
    there = [iteration for iteration in iterations if axis.of(iteration) in values]
    return _relative(there, physics_s(fitted, there))


def _target(row: ErrorRow, limit: float) -> Target:
    return Target(
        what=f"{row.what}, median error with {row.held_out} held out",
        limit=f"{limit:.0%}",
        found=f"{row.errors.median:.1%}",
        met=row.errors.median <= limit,
    )


_TEXT = """\
Measured latencies of matrix products, attention and all-reduces (ai-dynamo/aiconfigurator: vLLM, A100-SXM4-80GB,
H100-SXM, H200, B200 and L40S, default clocks) are added up to whole iterations of Llama-2-13B, Llama-3-8B and
Llama-3-70B at TP 1, 2, 4, 8 where 80 GB hold them (also for GPUs of another size): decode of 1 to 256 requests of 64 to
8,192 tokens, and prompts of 64 to 8,192 tokens. The physics is asked for the same at the top clock, without host, small
kernels and power limit, and with the memory bandwidth of the part that was measured. The constants are fitted to single
operators, never to these sums.

Held out are the operators of a batch size (matrix products of as many rows, decode attention of as many requests), of a
TP degree (all-reduces) and of a length (decode and prefill attention, matrix products). Llama-2-13B has 40 heads, which
no decode table has: attention works head by head, so they are eight heads at five times the batch, between measured
batches. With a batch size held out its neighbours, which stand for 13B, are still seen.

What the law leaves: matrix products come in tiles and waves of thread blocks, so that a product of 512 rows on an A100
costs up to a fifth more than the smooth law says, and one of 64 or 128 rows less. A KV cache below the 40 MB (A100) or
50 MB (H100) of the second-level cache is read faster in the tables, which read the same one again and again, than an
engine reads it. Eight H100s are up to a quarter faster than the law from 8 MB on, and two up to a third slower: NCCL
changes its algorithm there (eight may reduce in the switch), which is left out. Grouped heads with few, short contexts
are not split on the A100, and need 6 us a layer less than the law says: 16 % of a batch of one of Llama-3-8B at TP 8.

On the A100 heads that are not grouped are walked by one thread block each, however long the context: batch 1 of a
Llama-2-13B is bound by that, not by bandwidth, and more requests of the same length cost nothing there. Without that
term the worst error is 61 %, not 20 %.

The L40S has 96 MB of second-level cache, so that decode attention over less KV than that is left out of its fit: an
engine reads other layers in between. Its TP is over PCIe, without NVLink.
"""
