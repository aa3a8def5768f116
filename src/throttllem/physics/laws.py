"""The constants of the physics, grouped by law: what each is, in which unit, and how far it is to be believed.

Knows nothing of values (`catalogue.toml`) nor of how they are used (`load.py`, `clock.py`, `engine.py`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

Fraction = Field(gt=0, le=1)


class Frozen(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TimeLaw(Frozen):
    """How long the parts of an iteration take on one kind of GPU (`docs/physics.md`, "Time")."""

    gemm_bandwidth_fraction: float = Fraction
    gemm_peak_fraction: float = Fraction
    gemm_norm: float = Field(ge=1)
    """Exponent of the smooth maximum of memory and compute time: 1 adds them, infinity takes the larger."""
    gemm_kernel_s: NonNegativeFloat
    decode_bandwidth_fraction: float = Fraction
    decode_kernel_s: NonNegativeFloat
    prefill_peak_fraction: float = Fraction
    prefill_bandwidth_fraction: float = Fraction
    prefill_kernel_s: NonNegativeFloat
    layer_kernel_s: NonNegativeFloat
    """Norms, rotary embedding, activation function of one layer, besides their memory traffic."""
    allreduce_s: NonNegativeFloat
    allreduce_gpu_s: NonNegativeFloat
    """Added to `allreduce_s` for every GPU of the engine."""
    allreduce_bytes_per_s: PositiveFloat
    """Bus bandwidth of a ring: the message crosses it 2 (tp - 1) / tp times."""
    host_s: NonNegativeFloat
    host_request_s: NonNegativeFloat
    memory_knee_mhz: NonNegativeFloat
    memory_sharpness: float = Field(ge=1)


class PowerLaw(Frozen):
    """Watts of one GPU (`docs/physics.md`, "Power")."""

    limit_w: PositiveFloat
    bare_idle_w: PositiveFloat
    """Without a CUDA context: a GPU that belongs to no engine."""
    idle_w: PositiveFloat
    """With a CUDA context and the model loaded, nothing running."""
    static_w: NonNegativeFloat
    """Added while an engine runs, at any clock."""
    memory_w: NonNegativeFloat
    """At the full bandwidth of the memory."""
    core_w: NonNegativeFloat
    """At the top clock while matrices, rows or KV are worked on (not while it waits)."""
    compute_w: NonNegativeFloat
    """Added at the top clock while the tensor cores are busy."""
    knee_mhz: PositiveFloat
    voltage_rise: NonNegativeFloat
    """Squared voltage at the top clock over that below the knee, less one."""
    voltage_exponent: PositiveFloat


class Basis(Frozen):
    """Where a law comes from, and the range in which that holds; outside it the figure is merely modelled."""

    kind: Literal["measured", "calibrated", "modelled"]
    source: str
    clock_min_mhz: PositiveInt
    clock_max_mhz: PositiveInt
    tp: tuple[PositiveInt, ...]
    batch_max: PositiveInt
    models: tuple[str, ...] = ()
    """Models that it holds for; empty: any."""
