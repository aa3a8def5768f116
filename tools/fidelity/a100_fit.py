"""The A100's clock and power laws, fitted to one engine's clock sweep and to two kernels at once.

The sweep gives one served batch: its prompts go through in chunks, then every request gains a token per iteration.
How long prompts and answers were is not published; the seconds over batch size at the highest clock say it. Knows
nothing of reports.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.optimize import least_squares

from throttllem.calibrate.fit import Constant, Fit, fit, with_constants
from throttllem.calibrate.prior import CLOCK_POWER, CLOCK_TIME, around
from throttllem.physics.catalogue import Gpu
from throttllem.physics.engine import EnginePhysics
from throttllem.physics.model import Model
from tools.fidelity.kernel_law import COMPUTE, MEMORY, KernelRow, describe, freest, predict, unheld

FILE = Path("measured") / "a100_40gb_llama3_8b_clock_batch.csv"
GPU, MODEL = "a100-40gb-pcie", "llama-3-8b"
CHUNK_TOKENS = 2048
"""vLLM 0.11's own choice of max_num_batched_tokens, as its log in the data's repository (qweewqq/EnergyLLM) has it."""
_TIME_SCATTER, _POWER_SCATTER = 0.04, 0.05
"""The sweep's own, by shared/data's README."""
_KERNEL_TIME_SCATTER, _KERNEL_POWER_SCATTER = 0.006, 0.02
"""Seconds of the memory-bound kernel wander up and down by 0.6 % over the clock; watts of both by 1 to 2 %."""
_PRIOR_TOKENS, _PRIOR_SPREAD = 500.0, 1.0
_NEAR_MHZ = 20
COMPUTE_SHARE = Constant(path="time.compute_clock_share", start=0.98, spread=0.02, low=0.5, high=1.0)
"""Nearly all of a compute-bound kernel; not among the general priors, for few profiles could tell it from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One served batch: its seconds and its mean watts."""

    clock_mhz: int
    batch: int
    time_s: float
    power_w: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of every prompt and of every answer."""

    prompt_tokens: float
    output_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A GPU's law of the served batches."""

    gpu: Gpu
    model: Model
    lengths: Lengths

    def of(self, cells: Iterable[Cell]) -> NDArray[np.float64]:
        """Seconds and watts, a row for each cell."""
        return self.at([(cell.clock_mhz, cell.batch) for cell in cells])

    def at(self, points: Iterable[tuple[int, int]]) -> NDArray[np.float64]:
        """Seconds and watts, a row for each clock and batch size."""
        engine = EnginePhysics(self.gpu, self.model, 1)
        return np.array([serve(engine, clock, batch, self.lengths) for clock, batch in points])

    def least_energy_mhz(self, batch: int) -> int:
        """The clock at which a batch of that size costs the fewest joules."""
        clocks = self.gpu.clocks_mhz
        return clocks[int(np.argmin(np.prod(self.at([(clock, batch) for clock in clocks]), axis=1)))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A fit, and the law that it gives."""

    fit: Fit
    law: Served


def figures(cells: Iterable[Cell]) -> NDArray[np.float64]:
    """Measured seconds and watts, a row for each cell."""
    return np.array([(cell.time_s, cell.power_w) for cell in cells])


def read_sweep(data: Path) -> list[Cell]:
    """8 clocks x 5 batch sizes (figures of the published models of qweewqq/EnergyLLM)."""
    rows = pl.read_csv(data / FILE).select("clock_mhz", "batch", "batch_latency_s", "gpu_power_w").iter_rows()
    return [Cell(clock_mhz=clock, batch=batch, time_s=seconds, power_w=watts) for clock, batch, seconds, watts in rows]


def serve(engine: EnginePhysics, clock_mhz: int, batch: int, lengths: Lengths) -> tuple[float, float]:
    """Seconds and mean watts of a whole batch: the prompts in chunks, then all answers side by side."""
    chunks = lengths.prompt_tokens * batch / CHUNK_TOKENS
    chunk_s, chunk_w = engine.iteration(clock_mhz, 0, 0, CHUNK_TOKENS, CHUNK_TOKENS * lengths.prompt_tokens / 2)
    kv_tokens = round(batch * (lengths.prompt_tokens + lengths.output_tokens / 2))
    token_s, token_w = engine.iteration(clock_mhz, batch, kv_tokens, 0, 0.0)
    prefill_s, decode_s = chunks * chunk_s, lengths.output_tokens * token_s
    total_s = prefill_s + decode_s
    return total_s, (prefill_s * chunk_w + decode_s * token_w) / total_s


def lengths_of(gpu: Gpu, model: Model, cells: Sequence[Cell]) -> Lengths:
    """Prompt and answer tokens from the seconds at the highest clock alone: prompts cost more, the larger the batch."""
    engine, top = EnginePhysics(gpu, model, 1), max(cell.clock_mhz for cell in cells)
    at_top = [cell for cell in cells if cell.clock_mhz == top]

    def residuals(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        tokens = Lengths(prompt_tokens=math.exp(logs[0]), output_tokens=math.exp(logs[1]))
        times = [math.log(serve(engine, top, cell.batch, tokens)[0] / cell.time_s) for cell in at_top]
        return np.concatenate([np.array(times) / _TIME_SCATTER, (logs - math.log(_PRIOR_TOKENS)) / _PRIOR_SPREAD])

    prompt, answer = least_squares(residuals, np.full(2, math.log(_PRIOR_TOKENS))).x
    return Lengths(prompt_tokens=math.exp(prompt), output_tokens=math.exp(answer))


def refit(gpu: Gpu, model: Model, cells: Sequence[Cell], kernels: Sequence[KernelRow]) -> Fitted:
    """The clock and power constants from those cells and rows, from generic priors: nothing else is known."""
    constants = [*around(gpu, CLOCK_TIME + CLOCK_POWER), COMPUTE_SHARE]
    blank = with_constants(gpu, {constant.path: constant.start for constant in constants})
    lengths = lengths_of(blank, model, cells)
    best = fit(blank, constants, _residuals(model, cells, kernels, lengths))
    return Fitted(fit=best, law=Served(gpu=best.gpu, model=model, lengths=lengths))


def without_clock(
    cells: Sequence[Cell], kernels: Sequence[KernelRow], clock_mhz: int
) -> tuple[list[Cell], list[KernelRow]]:
    """Both without that clock; 1290 MHz of the sweep and 1305 MHz of the kernels count as one."""
    return keep_clocks(cells, kernels, lambda clock: abs(clock - clock_mhz) > _NEAR_MHZ)


def keep_clocks(
    cells: Sequence[Cell], kernels: Sequence[KernelRow], keep: Callable[[int], bool]
) -> tuple[list[Cell], list[KernelRow]]:
    """Both at the clocks that `keep` wants."""
    return [cell for cell in cells if keep(cell.clock_mhz)], [row for row in kernels if keep(row.clock_mhz)]


def _residuals(
    model: Model, cells: Sequence[Cell], kernels: Sequence[KernelRow], lengths: Lengths
) -> Callable[[Gpu], NDArray[np.float64]]:
    """Seconds up to a factor for each batch size (only ratios between clocks are to be used), watts, and kernels."""
    batches = np.array([cell.batch for cell in cells])
    measured = figures(cells)

    def residuals(gpu: Gpu) -> NDArray[np.float64]:
        times, watts = np.log(Served(gpu=gpu, model=model, lengths=lengths).of(cells) / measured).T
        for batch in set(batches):
            times[batches == batch] -= times[batches == batch].mean()
        return np.concatenate([times / _TIME_SCATTER, watts / _POWER_SCATTER, _kernel_residuals(gpu, kernels)])

    return residuals


def _kernel_residuals(gpu: Gpu, rows: Sequence[KernelRow]) -> NDArray[np.float64]:
    """Shapes over the clock, at the highest limit: a kernel's own watts and seconds are free."""
    found = [np.zeros(0)]
    for name in (MEMORY, COMPUTE):
        known = freest(rows, name)
        if len(unheld(known)) < 2:
            continue
        kernel = describe(gpu, rows, name)
        for row in known:
            time_s, power_w = predict(gpu, kernel, row.clock_mhz, row.limit_w)
            found.append(np.array([(time_s / row.time_s - 1) / _KERNEL_TIME_SCATTER]))
            if row in unheld(known):
                found.append(np.array([(power_w / row.power_w - 1) / _KERNEL_POWER_SCATTER]))
    return np.concatenate(found)
