"""Two kernels on an A100-80GB PCIe under clocks and power limits: their rows, and what the law makes of them.

A kernel is a base and a slope in watts and its seconds at the top clock; all else is the GPU's law.
Knows nothing of fits nor of reports.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from throttllem.physics.catalogue import Gpu
from throttllem.physics.clock import clock_scale

FILE = Path("measured") / "a100_kernels_clock_power_limit.csv"
MEMORY, COMPUTE = "babelstream", "pi-solver"
"""The memory-bound kernel and the compute-bound one, as the file names them."""
_FREE = 0.95
"""A kernel that draws less than this part of its limit is not held by it: held ones draw 97 to 99 % of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRow:
    """One run, at the clock that was asked for."""

    kernel: str
    clock_mhz: int
    limit_w: float
    time_s: float
    power_w: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What the law must be told of a kernel: watts are base + slope x switching, without a limit."""

    name: str
    base_w: float
    slope_w: float
    top_s: float


def read_kernels(data: Path) -> list[KernelRow]:
    """Both kernels, 5 clocks x 7 limits (giordano/gpu-power-frequency-benchmarks)."""
    columns = ("kernel", "clock_mhz", "power_limit_w", "time_s", "mean_power_w")
    return [
        KernelRow(kernel=kernel, clock_mhz=clock, limit_w=limit, time_s=time_s, power_w=watts)
        for kernel, clock, limit, time_s, watts in pl.read_csv(data / FILE).select(columns).iter_rows()
    ]


def freest(rows: Sequence[KernelRow], name: str) -> list[KernelRow]:
    """That kernel's rows at the highest limit there is, by clock; none of none."""
    own = [row for row in rows if row.kernel == name]
    highest = max((row.limit_w for row in own), default=0.0)
    return sorted((row for row in own if row.limit_w == highest), key=lambda row: row.clock_mhz)


def unheld(rows: Iterable[KernelRow]) -> list[KernelRow]:
    """Rows that their power limit does not hold."""
    return [row for row in rows if row.power_w < _FREE * row.limit_w]


def describe(gpu: Gpu, rows: Sequence[KernelRow], name: str) -> Kernel:
    """The kernel from its rows at the highest limit: watts where it is not held, seconds from all of them."""
    known = freest(rows, name)
    base_w, slope_w = watts_line(gpu, unheld(known))
    unit = Kernel(name=name, base_w=base_w, slope_w=slope_w, top_s=1.0)
    tops = [row.time_s / predict(gpu, unit, row.clock_mhz, row.limit_w)[0] for row in known]
    return Kernel(name=name, base_w=base_w, slope_w=slope_w, top_s=float(np.exp(np.mean(np.log(tops)))))


def watts_line(gpu: Gpu, rows: Sequence[KernelRow]) -> tuple[float, float]:
    """Base and slope in watts that fit best, by relative error."""
    watts = np.array([row.power_w for row in rows])
    switching = _switching(gpu, [row.clock_mhz for row in rows])
    columns = np.stack([1 / watts, switching / watts], axis=1)
    (base_w, slope_w), *_ = np.linalg.lstsq(columns, np.ones(len(rows)), rcond=None)
    return float(base_w), float(slope_w)


def predict(gpu: Gpu, kernel: Kernel, clock_mhz: float, limit_w: float) -> tuple[float, float]:
    """Seconds and watts: above the limit the clock gives way until the power is at it."""
    power_w = float(_watts(gpu, kernel, [clock_mhz])[0])
    if power_w > limit_w:
        clock_mhz, power_w = _clock_at(gpu, kernel, limit_w), limit_w
    return kernel.top_s * _slow_down(gpu, kernel.name, clock_mhz), power_w


def _clock_at(gpu: Gpu, kernel: Kernel, limit_w: float) -> float:
    """The clock at which the kernel draws just that; the lowest one where it always draws more."""
    return float(np.interp(limit_w, _watts(gpu, kernel, gpu.clocks_mhz), gpu.clocks_mhz))


def _watts(gpu: Gpu, kernel: Kernel, clocks: Iterable[float]) -> NDArray[np.float64]:
    return kernel.base_w + kernel.slope_w * _switching(gpu, clocks)


def _slow_down(gpu: Gpu, name: str, clock_mhz: float) -> float:
    scale = clock_scale(gpu.time, gpu.power, clock_mhz, gpu.clock_max_mhz)
    return scale.memory if name == MEMORY else scale.compute


def _switching(gpu: Gpu, clocks: Iterable[float]) -> NDArray[np.float64]:
    return np.array([clock_scale(gpu.time, gpu.power, clock, gpu.clock_max_mhz).switching for clock in clocks])
