"""The clock and power constants of the H100, fitted to what an engine does under load, and to served models.

A p99 comes out of a simulation only, and a simulation is too slow for a fit. So the fit moves the analytic shadow of
the simulator, times what the last simulation said the shadow is off by, and both take turns. Knows nothing of reports.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from throttllem.calibrate.fit import Constant, Fit, Fitted, fit, with_constants
from throttllem.calibrate.prior import CLOCK_POWER, CLOCK_TIME, around
from throttllem.physics.catalogue import Catalogue, Gpu
from throttllem.physics.engine import EnginePhysics
from throttllem.physics.model import Model
from tools.fidelity.load_runs import GPU, MODEL, LoadPoint, Served, mean_power_w, settle, simulate
from tools.fidelity.served_rows import Row, ratios

POWER = (
    *(path for path in CLOCK_POWER if path != "power.static_w"),
    "power.attention_w",
    "power.unpack_w",
    "power.ceiling_mhz",
)
"""The static part is the context's, which `power.idle_w` has as it was measured."""
CEILING = Constant(path="power.ceiling_mhz", start=1800.0, spread=0.05, low=1500.0, high=1979.0)
"""Watts of a GPU that is locked at 1,830 MHz are hardly fewer than those of one at its default, 1,980."""
COMPUTE_KNEE = Constant(path="time.compute_knee_mhz", start=1600.0, spread=0.12, low=1500.0, high=1980.0)
"""Below 1,500 MHz the chip's 132 x 4,096 operations a cycle would not make the measured products."""
KNOWN = {"power.knee_mhz": (1000.0, 0.3), "power.voltage_exponent": (1.15, 0.2)}
"""Middles and spreads in place of the general priors. The A100's voltage floor ends about 1,000 MHz; a voltage that
rises in a straight line has a square of exponent 1 to 1.3."""
ROUNDS = 3
REQUESTS, SEED = 600, 100
"""Of the runs inside a fit; judgement uses other seeds."""
_SCATTER = {"power": 0.04, "tpot": 0.06, "ttft": 0.10, "served": 0.08}
"""Of one measured point: a p99 of some hundred requests is the worst few, and TTFT's depends on who met whom."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFit:
    """The GPU with the constants that were fitted, and each of them."""

    gpu: Gpu
    constants: tuple[Fitted, ...]

    @property
    def values(self) -> dict[str, float]:
        """The fitted constants by path."""
        return {fitted.constant.path: fitted.value for fitted in self.constants}


def with_gpu(catalogue: Catalogue, gpu: Gpu) -> Catalogue:
    """The catalogue with that GPU in the place of the one of its name."""
    return catalogue.model_copy(update={"gpus": catalogue.gpus | {gpu.name: gpu}})


def fit_load(
    catalogue: Catalogue, points: Sequence[LoadPoint], rows: Sequence[Row] = (), requests: int = REQUESTS
) -> LoadFit:
    """The constants from the priors, these points and served rows alone; the catalogue's own are not looked at.

    The host's times are the catalogue's: the loads have small batches, and served models (served_fit.py) say more.
    """
    known, model = catalogue.gpu(GPU), catalogue.model(MODEL)
    time, power = [*expected(known, CLOCK_TIME), COMPUTE_KNEE], expected(known, POWER)
    gpu = with_constants(known, {constant.path: constant.start for constant in (*time, *power)})
    for _ in range(ROUNDS):
        served = [simulate(with_gpu(catalogue, gpu), point, requests=requests, seeds=(SEED,)) for point in points]
        timed = _fit_time(gpu, model, time, points, served)
        powered = _fit_power(timed.gpu, model, power, points, served, rows)
        gpu = powered.gpu
    return LoadFit(gpu=gpu, constants=timed.constants + powered.constants)


def expected(gpu: Gpu, paths: Iterable[str]) -> list[Constant]:
    """The priors of `paths`, some of them moved to what is known otherwise."""
    paths = list(paths)
    ceiling = [CEILING] if CEILING.path in paths else []
    return ceiling + [
        replace(constant, start=KNOWN[constant.path][0], spread=KNOWN[constant.path][1])
        if constant.path in KNOWN
        else constant
        for constant in around(gpu, [path for path in paths if path != CEILING.path])
    ]


def _fit_time(
    gpu: Gpu, model: Model, constants: Sequence[Constant], points: Sequence[LoadPoint], served: Sequence[Served]
) -> Fit:
    measured = np.array([[point.tpot_p99_s, point.ttft_p99_s] for point in points])
    simulated = np.array([[each.tpot_p99_s, each.ttft_p99_s] for each in served])
    off = simulated / _settled(gpu, model, points) / measured
    scatter = (_SCATTER["tpot"], _SCATTER["ttft"])
    return fit(
        gpu, constants, lambda moved: (np.log(off * _settled(moved, model, points)) / scatter).ravel(), robust=True
    )


def _settled(gpu: Gpu, model: Model, points: Sequence[LoadPoint]) -> NDArray[np.float64]:
    engines = _engines(gpu, model, points)
    return np.array([settle(engines[point.tp], point) for point in points])


def _fit_power(
    gpu: Gpu,
    model: Model,
    constants: Sequence[Constant],
    points: Sequence[LoadPoint],
    served: Sequence[Served],
    rows: Sequence[Row],
) -> Fit:
    def residuals(moved: Gpu) -> NDArray[np.float64]:
        load = np.log(load_ratios(moved, model, points, served)) / _SCATTER["power"]
        return np.concatenate([load, np.log(ratios([moved], rows)[:, 1]) / _SCATTER["served"]])

    return fit(gpu, constants, residuals, robust=True)


def load_ratios(gpu: Gpu, model: Model, points: Sequence[LoadPoint], served: Sequence[Served]) -> NDArray[np.float64]:
    """Watts of the law over those measured, point by point; `served` says what the points' iterations held."""
    engines = _engines(gpu, model, points)
    found = (mean_power_w(engines[p.tp], p, each) / p.power_w for p, each in zip(points, served, strict=True))
    return np.array(list(found))


def _engines(gpu: Gpu, model: Model, points: Sequence[LoadPoint]) -> dict[int, EnginePhysics]:
    return {tp: EnginePhysics(gpu, model, tp) for tp in {point.tp for point in points}}
