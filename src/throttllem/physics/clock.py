"""What the clock does to the parts of the time and of the power; everything here is relative to the top clock.

Time: compute follows 1 / f, all but a few percent; memory is untouched above its knee and follows 1 / f below it,
smoothly; a share of the fixed kernel and all-reduce latencies follows 1 / f; the host does not. Power: the switching
part follows f V(f)^2, V being flat below a knee.
"""

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
    """The factors at `clock_mhz` (docs/physics.md, "The clock")."""
    slower = top_mhz / clock_mhz
    computes = max(1.0, min(time.compute_knee_mhz or top_mhz, top_mhz) / clock_mhz)
    return ClockScale(
        compute=1 + time.compute_clock_share * (computes - 1),
        memory=_memory(time, clock_mhz) / _memory(time, top_mhz),
        latency=1 + time.latency_clock_share * (slower - 1),
        switching=_voltage_squared(power, clock_mhz, top_mhz) / (1 + power.voltage_rise) / slower,
    )


def _memory(time: TimeLaw, clock_mhz: float) -> float:
    """1 far above the knee, knee / f far below it."""
    sharpness = time.memory_sharpness
    return float((1 + (time.memory_knee_mhz / clock_mhz) ** sharpness) ** (1 / sharpness))


def _voltage_squared(power: PowerLaw, clock_mhz: float, top_mhz: float) -> float:
    """1 below the knee, 1 + voltage_rise at the top clock."""
    above = max(0.0, clock_mhz - power.knee_mhz) / (top_mhz - power.knee_mhz)
    return float(1 + power.voltage_rise * above**power.voltage_exponent)
