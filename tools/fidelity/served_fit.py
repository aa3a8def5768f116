"""The host's times, those of a layer of experts, and watts, fitted to served models on H100 and B200.

The H100's watts come from these rows and from an engine under load at three lower clocks (load_fit.py) at once. The
B200's are the H100's shape, scaled to its limit, moved by its own rows. Knows nothing of reports.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from throttllem.calibrate.fit import Constant, Fitted, fit, with_constants
from throttllem.calibrate.prior import around
from throttllem.physics.catalogue import Gpu
from throttllem.physics.model import Model, Weights
from tools.fidelity.load_fit import POWER, expected, load_ratios
from tools.fidelity.load_runs import LoadPoint, Served
from tools.fidelity.served_rows import GPUS, Row, ratios

H100, B200 = GPUS["H100"], GPUS["B200"]
HOST = (
    Constant(path="time.host_s", start=1e-3, spread=0.5),
    Constant(path="time.host_request_s", start=15e-6, spread=1.0),
)
SHARED = ("time.host_s", "time.host_request_s", "time.fp8_expert_kernel_s")
"""Of both GPUs: the host is another chip, and FP8 experts were served by one kernel family."""
SHAPE = ("power.knee_mhz", "power.voltage_rise", "power.voltage_exponent", "power.ceiling_mhz")
WATTS = ("memory_w", "core_w", "compute_w", "attention_w", "unpack_w")
MOST_BATCH = 512
"""Larger batches are judged, and not fitted: scheduling, and requests that wait for KV blocks, fill the time there."""
_TIME_SCATTER, _POWER_SCATTER, _LOAD_SCATTER = 0.1, 0.08, 0.04


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """What the H100's watts are fitted to beside the rows: loads, and what a simulation says they held."""

    model: Model
    points: Sequence[LoadPoint]
    served: Sequence[Served]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedFit:
    """Both GPUs with their constants, and the fitted ones by GPU and path."""

    h100: Gpu
    b200: Gpu
    constants: dict[str, dict[str, float]]

    @property
    def gpus(self) -> tuple[Gpu, Gpu]:
        """Both."""
        return self.h100, self.b200


def fit_served(h100: Gpu, b200: Gpu, rows: Sequence[Row], loads: Loads | None) -> ServedFit:
    """From generic priors and these rows alone: what the catalogue has in their place is not looked at.

    Without `loads` the H100 keeps its watts.
    """
    seen = [row for row in rows if not row.stalled and row.batch <= MOST_BATCH]
    timed, own = _fit_time(h100, b200, seen)
    constants = {H100: _values(timed), B200: {path: _values(timed)[path] for path in SHARED} | _values(own)}
    h100, b200 = with_constants(h100, constants[H100]), with_constants(b200, constants[B200])
    if loads is not None:
        powered = fit_power(h100, [row for row in seen if row.gpu == H100], loads)
        h100 = with_constants(h100, _values(powered))
    scaled = _scaled(h100, b200)
    theirs = _fit_b200_power(scaled, [row for row in seen if row.gpu == B200])
    shape = {path: float(getattr(scaled.power, path.removeprefix("power."))) for path in SHAPE}
    constants[B200] |= shape | _values(theirs)
    return ServedFit(h100=h100, b200=with_constants(b200, constants[B200]), constants=constants)


def fit_power(gpu: Gpu, rows: Sequence[Row], loads: Loads) -> tuple[Fitted, ...]:
    """The H100's watts from served rows at the top clock and loads at lower ones."""
    constants = expected(gpu, POWER)
    blank = with_constants(gpu, {constant.path: constant.start for constant in constants})

    def residuals(moved: Gpu) -> NDArray[np.float64]:
        load = np.log(load_ratios(moved, loads.model, loads.points, loads.served)) / _LOAD_SCATTER
        return np.concatenate([load, np.log(ratios([moved], rows)[:, 1]) / _POWER_SCATTER])

    return fit(blank, constants, residuals, robust=True).constants


def _fit_time(h100: Gpu, b200: Gpu, rows: Sequence[Row]) -> tuple[tuple[Fitted, ...], tuple[Fitted, ...]]:
    """What both GPUs share and the H100's own, to its rows and to FP8 experts on either; then the B200's own."""
    constants = [*HOST, *around(h100, ("time.expert_kernel_s", "time.fp8_expert_kernel_s"))]
    blank = with_constants(h100, {constant.path: constant.start for constant in constants})
    first = [row for row in rows if row.gpu == H100 or row.model.expert_weights is Weights.FP8]
    if not any(row.gpu == H100 for row in rows):
        first = list(rows)

    def residuals(moved: Gpu) -> NDArray[np.float64]:
        shared = {path: float(getattr(moved.time, path.removeprefix("time."))) for path in SHARED}
        return _time_residuals([moved, with_constants(b200, shared)], first)

    timed = fit(blank, constants, residuals, robust=True).constants
    theirs = with_constants(b200, {path: value for path, value in _values(timed).items() if path in SHARED})
    left = [row for row in rows if row.gpu == B200 and row.model.expert_weights is not Weights.FP8]
    own = around(b200, ("time.expert_kernel_s",))
    return timed, fit(theirs, own, lambda moved: _time_residuals([moved], left), robust=True).constants


def _time_residuals(gpus: Sequence[Gpu], rows: Sequence[Row]) -> NDArray[np.float64]:
    return np.asarray(np.log(ratios(gpus, rows)[:, 0]) / _TIME_SCATTER)


def _scaled(h100: Gpu, b200: Gpu) -> Gpu:
    """The B200 with the H100's watts, by their limits and top clocks."""
    limits, clocks = b200.power.limit_w / h100.power.limit_w, b200.clock_max_mhz / h100.clock_max_mhz
    values = {f"power.{name}": getattr(h100.power, name) * limits for name in WATTS}
    values |= {path: getattr(h100.power, path.removeprefix("power.")) for path in SHAPE}
    values["power.knee_mhz"] *= clocks
    values["power.ceiling_mhz"] = (h100.power.ceiling_mhz or h100.clock_max_mhz) * clocks
    return with_constants(b200, values)


def _fit_b200_power(scaled: Gpu, rows: Sequence[Row]) -> tuple[Fitted, ...]:
    constants = [
        replace(constant, spread=0.5) for constant in around(scaled, (f"power.{name}" for name in WATTS), scaled)
    ]
    return fit(
        scaled, constants, lambda moved: np.log(ratios([moved], rows)[:, 1]) / _POWER_SCATTER, robust=True
    ).constants


def _values(constants: Iterable[Fitted]) -> dict[str, float]:
    return {fitted.constant.path: fitted.value for fitted in constants}
