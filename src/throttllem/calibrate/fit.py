"""The most probable constants of a GPU, given measurements and priors.

Knows nothing of files, nor of how residuals are computed.
"""

# Every constant is positive, so the fit moves its logarithm: a spread of 0.3 is "within about 30 %". The prior is one
# more residual per constant, (logarithm - its middle) / spread, so the least squares are the maximum a posteriori. A
# constant that the measurements do not determine stays at its prior and is reported as undetermined; few points never
# make the problem singular.

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from throttllem.physics.catalogue import Gpu

Residuals = Callable[[Gpu], NDArray[np.float64]]
"""Errors of a GPU's law against the measurements, each divided by the measurement's own standard deviation."""

DETERMINED = 0.5
"""The measurements determine a constant if they reduce its uncertainty below this fraction of its prior's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """One constant to fit: `path` within the GPU's entry ("time.host_s"), the prior's middle, its spread in logarithm.

    `low` and `high` bound it.
    """

    path: str
    start: float
    spread: float
    low: float = 0.0
    high: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A fitted constant: `error` is the standard deviation of its logarithm after the fit."""

    constant: Constant
    value: float
    error: float

    @property
    def determined(self) -> bool:
        """Whether the measurements, rather than the prior, determine it."""
        return self.error < DETERMINED * self.constant.spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The GPU with the fitted constants in it, and each of them."""

    gpu: Gpu
    constants: tuple[Fitted, ...]


def fit(gpu: Gpu, constants: Sequence[Constant], residuals: Residuals, *, robust: bool = False) -> Fit:
    """Least squares over the residuals and the priors together (maximum a posteriori).

    `robust`: a large residual pulls with constant force only (Charbonnier's loss). Raises ValueError if a
    residual is not finite or the fit does not converge.
    """
    starts = np.log([constant.start for constant in constants])
    spreads = np.array([constant.spread for constant in constants])
    low = np.array([math.log(constant.low) if constant.low > 0 else -math.inf for constant in constants])
    high = np.array([math.log(constant.high) for constant in constants])

    def all_residuals(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        found = residuals(_moved(gpu, constants, logs))
        if not np.isfinite(found).all():
            raise ValueError(f"{gpu.name}: the law gives no finite time or power at a measured point")
        if robust:
            found = np.sign(found) * np.sqrt(2 * (np.sqrt(1 + found**2) - 1))
        return np.concatenate([found, (logs - starts) / spreads])

    inside = np.clip(starts, np.nextafter(low, np.inf), np.nextafter(high, -np.inf))
    # "exact" decomposes the Jacobian with threads, which take 200 times as long where other work shares the cores;
    # "lsmr" needs two constants or more, and by default stops far from a step's end where constants are confounded.
    how: dict[str, Any] = {"tr_solver": "exact"}
    if len(constants) > 1:
        how = {"tr_solver": "lsmr", "tr_options": {"atol": 1e-12, "btol": 1e-12, "maxiter": 100 * len(constants)}}
    best = least_squares(all_residuals, inside, bounds=(low, high), x_scale=spreads, **how)
    if not best.success:
        raise ValueError(f"{gpu.name}: the fit did not converge in {best.nfev} steps: {best.message}")
    errors = np.sqrt(np.diag(np.linalg.inv(best.jac.T @ best.jac)))
    fitted = (
        Fitted(constant=constant, value=float(math.exp(log)), error=float(error))
        for constant, log, error in zip(constants, best.x, errors, strict=True)
    )
    return Fit(gpu=_moved(gpu, constants, best.x), constants=tuple(fitted))


def with_constants(gpu: Gpu, values: Mapping[str, float]) -> Gpu:
    """The GPU with constants replaced by path ("power.core_w", "startup_s"); not validated, as a fit has bounds."""
    own: dict[str, object] = {}
    laws: dict[str, dict[str, float]] = {}
    for path, value in values.items():
        law, dot, name = path.partition(".")
        if dot:
            laws.setdefault(law, {})[name] = value
        else:
            own[path] = value
    own |= {law: getattr(gpu, law).model_copy(update=update) for law, update in laws.items()}
    return gpu.model_copy(update=own)


def _moved(gpu: Gpu, constants: Sequence[Constant], logs: NDArray[np.float64]) -> Gpu:
    return with_constants(gpu, {c.path: float(value) for c, value in zip(constants, np.exp(logs), strict=True)})
