"""The data sheet of a GPU that the catalogue lacks: a few figures in the entry of a similar GPU.

First guesses scale with them: watts with the power limit, knees with the top clock. Knows nothing of measurements.
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import ValidationError

from throttllem.did_you_mean import did_you_mean
from throttllem.physics.catalogue import Gpu

KEYS = (
    "clock_min_mhz",
    "clock_max_mhz",
    "clock_step_mhz",
    "memory_bytes",
    "bandwidth_bytes_per_s",
    "peak_flop_per_s",
    "limit_w",
    "idle_w",
    "bare_idle_w",
)
"""Figures of a data sheet, or of an idle GPU; the last three are the power law's."""
_WITH_LIMIT = ("idle_w", "bare_idle_w", "static_w", "memory_w", "core_w", "compute_w")


def with_datasheet(like: Gpu, settings: Iterable[str]) -> Gpu:
    """`like` with every `key=value` applied. Raises ValueError (what, and what to do) for impossible figures."""
    sheet = dict(_parsed(setting) for setting in settings)
    if not sheet:
        return like
    tree = like.model_dump()
    power, time = tree["power"], tree["time"]
    power_ratio = sheet.get("limit_w", like.power.limit_w) / like.power.limit_w
    clock_ratio = sheet.get("clock_max_mhz", like.clock_max_mhz) / like.clock_max_mhz
    power |= {name: power[name] * power_ratio for name in _WITH_LIMIT} | {"knee_mhz": power["knee_mhz"] * clock_ratio}
    time["memory_knee_mhz"] *= clock_ratio
    if time["compute_knee_mhz"] is not None:
        time["compute_knee_mhz"] *= clock_ratio
    for key, value in sheet.items():
        (power if key.endswith("_w") else tree)[key] = value
    try:
        return Gpu.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"--sheet {where}: {first['msg']}; give all figures that depend on each other") from error


def _parsed(setting: str) -> tuple[str, float]:
    key, equals, text = (part.strip() for part in setting.partition("="))
    if not equals or key not in KEYS:
        raise ValueError(f"--sheet {setting!r}: write key=value; {did_you_mean(key, KEYS, most=2)}")
    try:
        return key, float(text)
    except ValueError as error:
        raise ValueError(f"--sheet {setting!r}: {text!r} is not a number") from error
