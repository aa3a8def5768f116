"""The options of the controller. Each part is documented where it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from throttllem.core.admission import AdmissionOptions
from throttllem.core.clocks.policy import ThrottleOptions
from throttllem.core.clocks.sizing import AutoscaleOptions
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.lengths.prediction import LengthPredictor, Oracle
from throttllem.core.types import EngineSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerOptions:
    """All that a controller is configured with. `specs` and `tables` by engine size (tensor parallel degree).

    `slo_aware` False is the baseline: first come first served, no admission control. `inflation` multiplies every
    length prediction (open in the paper). `load_window_s` is the time constant of the load estimate.
    """

    throttle: ThrottleOptions
    slo_aware: bool = True
    admission: AdmissionOptions = field(default_factory=AdmissionOptions)
    autoscale: AutoscaleOptions | None = None
    predictor: LengthPredictor = field(default_factory=Oracle)
    inflation: float = 1.0
    specs: Mapping[int, EngineSpec] = field(default_factory=dict)
    tables: Mapping[int, PerformanceTable] = field(default_factory=dict)
    load_window_s: float = 60.0
