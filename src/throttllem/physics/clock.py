"""The effect of the clock on the parts of the time and of the power, relative to the top clock.

Knows nothing of models, engines or iterations.
"""

# With f the clock (docs/physics.md, "The clock"):
#
# - arithmetic takes a fixed number of cycles, so it follows 1 / f, all but a few per cent;
# - memory has another clock: above a knee it is the bottleneck, and f does not matter; below, the cores cannot
#   issue requests fast enough, and it follows 1 / f. `memory_sharpness` is the exponent of the smooth maximum;
# - of fixed kernel and all-reduce latencies a share (instructions) follows 1 / f, the rest (memory, links) does not;
# - the host is another chip;
# - switching power follows f V(f)^2: the voltage is at its minimum up to a knee and rises from there.

from __future__ import annotations

from typing import NamedTuple

from throttllem.physics.laws import PowerLaw, TimeLaw


class ClockScale(NamedTuple):
    """Factors on the times at the top clock, and on the switching power there; all 1 at the top clock."""

    compute: float
    memory: float
    latency: float
    switching: float


def clock_scale(time: TimeLaw, power: PowerLaw, clock_mhz: float, top_mhz: float) -> ClockScale:
    """The factors at `clock_mhz`."""
    slower = top_mhz / clock_mhz
    ceiling = min(power.ceiling_mhz or top_mhz, top_mhz)
    computes = max(1.0, min(time.compute_knee_mhz or top_mhz, top_mhz) / clock_mhz)
    return ClockScale(
        compute=1 + time.compute_clock_share * (computes - 1),
        memory=_memory(time, clock_mhz) / _memory(time, top_mhz),
        latency=1 + time.latency_clock_share * (slower - 1),
        switching=_switching(power, min(clock_mhz, ceiling), ceiling),
    )


def _memory(time: TimeLaw, clock_mhz: float) -> float:
    """1 far above the knee, knee / f far below it."""
    sharpness = time.memory_sharpness
    return float((1 + (time.memory_knee_mhz / clock_mhz) ** sharpness) ** (1 / sharpness))


def _switching(power: PowerLaw, clock_mhz: float, top_mhz: float) -> float:
    """f V^2, 1 at `top_mhz`: V^2 is 1 below the knee, 1 + voltage_rise at the top."""
    above = max(0.0, clock_mhz - power.knee_mhz) / (top_mhz - power.knee_mhz)
    squared = 1 + power.voltage_rise * above**power.voltage_exponent
    return float(squared / (1 + power.voltage_rise) * clock_mhz / top_mhz)
