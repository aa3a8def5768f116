"""The constants of the physics, by law: the meaning and unit of each, and the basis of their values.

Knows nothing of the values (`catalogue.toml`) nor of their use (`load.py`, `clock.py`, `engine.py`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Fraction = Field(gt=0, le=1)

_PLAUSIBLE = {
    "memory_bytes": (1e9, 1e13, "bytes"),
    "activation_bytes": (0.0, 1e13, "bytes"),
    "bandwidth_bytes_per_s": (5e9, 1e15, "bytes/s"),
    "bytes_per_s": (1e8, 1e15, "bytes/s"),
    "flop_per_s": (1e11, 1e18, "FLOP/s"),
    "multiprocessors": (1.0, 1e4, "multiprocessors"),
    "_mhz": (0.0, 1e4, "MHz"),
    "startup_s": (0.0, 1e5, "seconds"),
    "_s": (0.0, 1.0, "seconds"),
    "limit_w": (5.0, 2e4, "W"),
    "_w": (0.0, 2e4, "W"),
    "": (-1e18, 1e18, "its unit"),
}
"""By the end of a constant's name, the first that fits: from, to and unit. No GPU lies outside, by a margin; a figure
in another unit (GB/s, mW, us) does."""


def implausible(name: str, value: float) -> str | None:
    """What a constant must be; None: `value` may be that."""
    low, high, unit = next(bounds for end, bounds in _PLAUSIBLE.items() if name.endswith(end))
    return None if low <= value <= high else f"must be in {unit}, {low:g} to {high:g}"


class Frozen(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TimeLaw(Frozen):
    """Times of the parts of an iteration on one kind of GPU (`docs/physics.md`, "Time")."""

    gemm_bandwidth_fraction: float = Fraction
    gemm_peak_fraction: float = Fraction
    gemm_norm: float = Field(ge=1)
    """Exponent of the smooth maximum of memory and compute time: 1 adds them, infinity takes the larger."""
    gemm_kernel_s: NonNegativeFloat
    fp8_bandwidth_fraction: float = Field(default=0.8, gt=0, le=1)
    """Of the bandwidth, by products of FP8 or 8-bit weights; the defaults of these three lie between H100 and L40S."""
    fp8_peak_fraction: float = Field(default=0.55, gt=0, le=1)
    """Of the FP8 peak."""
    fp8_norm: float = Field(default=1.5, ge=1)
    fp8_kernel_s: NonNegativeFloat = 6e-6
    """With the quantisation of the activations."""
    int4_bandwidth_fraction: float = Field(default=0.7, gt=0, le=1)
    """Of the bandwidth, by weights of 4 bits, which the kernel unpacks."""
    int4_peak_fraction: float = Field(default=0.35, gt=0, le=1)
    """Of the bfloat16 peak, by grouped products of experts with weights of 4 bits."""
    expert_bandwidth_fraction: float = Field(default=0.95, gt=0, le=1)
    """Of the bandwidth, by grouped products of experts."""
    expert_peak_fraction: float = Field(default=0.5, gt=0, le=1)
    expert_fp8_peak_fraction: float = Field(default=0.3, gt=0, le=1)
    expert_kernel_s: NonNegativeFloat = 30e-6
    """Of one layer's experts: router, sorting the tokens by expert, two grouped products, sum."""
    fp8_expert_kernel_s: NonNegativeFloat = 140e-6
    """The same of FP8 experts: tokens are quantised, and laid out in tiles of 128 rows that are mostly empty, too."""
    decode_bandwidth_fraction: float = Fraction
    decode_kernel_s: NonNegativeFloat
    decode_row_s: NonNegativeFloat
    """Per running request and KV head of one GPU: its query, its output and the last tile of its keys, half full."""
    decode_split_s: NonNegativeFloat
    """Added per layer of grouped heads: their kernel splits a long context over thread blocks and merges the parts."""
    decode_walk_token_s: NonNegativeFloat
    """Ungrouped heads: one thread block reads a head's whole context, in this time per token; 0 if it is split."""
    prefill_peak_fraction: float = Fraction
    prefill_bandwidth_fraction: float = Fraction
    prefill_kernel_s: NonNegativeFloat
    prefill_walk_token_s: NonNegativeFloat
    """Per layer and prompt token: the kernel waits for the last tile of queries, which attends to the whole prompt."""
    layer_kernel_s: NonNegativeFloat
    """Norms, rotary embedding, activation function of one layer, besides their memory traffic."""
    allreduce_s: NonNegativeFloat
    allreduce_gpu_s: NonNegativeFloat
    """Added to `allreduce_s` for every GPU of the engine."""
    allreduce_step_s: NonNegativeFloat
    """Added by the second step (reduce, then gather) that larger messages between more than two GPUs take."""
    allreduce_large_s: NonNegativeFloat
    """Added from `load.LARGE_ALLREDUCE_BYTES` on, where a library call replaces the engine's own kernel."""
    allreduce_bytes_per_s: PositiveFloat
    """Into one GPU: tp - 1 messages in one step, 2 (tp - 1) / tp of a message in two."""
    host_s: NonNegativeFloat
    host_request_s: NonNegativeFloat
    memory_knee_mhz: NonNegativeFloat
    memory_sharpness: float = Field(ge=1)
    compute_knee_mhz: PositiveFloat | None = None
    """Compute-bound work is no faster above it: the power limit bounded the measured operators. None: the top."""
    compute_clock_share: float = Field(default=1.0, ge=0, le=1)
    """Part of compute-bound time that follows the clock."""
    latency_clock_share: float = Field(ge=0, le=1)
    """Part of the fixed kernel and all-reduce latencies that follows the clock; the rest is memory's and the link's."""


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
    """At the top clock while the GPU is busy (not while it waits)."""
    compute_w: NonNegativeFloat
    """Added at the top clock while the tensor cores are busy."""
    attention_w: NonNegativeFloat = 0.0
    """Added at the top clock while decode attention reads the KV cache: it computes for every byte that it reads."""
    unpack_w: NonNegativeFloat = 0.0
    """Added at the top clock while weights of 4 bits are read and unpacked."""
    ceiling_mhz: PositiveFloat | None = None
    """Watts rise no further above it: a chip under load does not hold its highest clocks. None: the top."""
    knee_mhz: PositiveFloat
    voltage_rise: NonNegativeFloat
    """Squared voltage at the top clock over that below the knee, less one."""
    voltage_exponent: PositiveFloat


class MeasuredPoints(Frozen):
    """Measured points: every combination of these values; an empty list means any value."""

    source: str
    models: tuple[str, ...]
    tp: tuple[PositiveInt, ...]
    clocks_mhz: tuple[PositiveInt, ...]
    batches: tuple[PositiveInt, ...]
    contexts_tokens: tuple[PositiveInt, ...] = ()


class BelowTop(Frozen):
    """The range in which the effect of the clock was fitted; it does not apply at the top clock."""

    tp: tuple[PositiveInt, ...]
    context_max_tokens: PositiveInt
    models: tuple[str, ...] = ()
    """Models for which it was fitted; empty: any of the law's."""
    median_error: NonNegativeFloat
    """Relative, at held-out clocks."""


class FittedParts(Frozen):
    """Parts of models (`Model.parts`) that were fitted beside dense layers."""

    names: tuple[str, ...]
    median_error: NonNegativeFloat
    """Relative, of models with such parts, held out of the fit."""


class Basis(Frozen):
    """The origin of a law, and the range in which it holds; outside it, figures are modelled."""

    kind: Literal["measured", "calibrated", "modelled"]
    source: str
    clock_min_mhz: PositiveInt
    clock_max_mhz: PositiveInt
    tp: tuple[PositiveInt, ...]
    batch_max: PositiveInt
    models: tuple[str, ...] = ()
    """Models for which it holds; empty: any whose `parts` are fitted."""
    parts: FittedParts | None = None
    """None: dense layers alone."""
    context_max_tokens: PositiveInt | None = None
    """Tokens of a running request up to which it was fitted; None: any."""
    prefill_max_tokens: NonNegativeInt | None = None
    """New prompt tokens of an iteration up to which it was fitted; None: any."""
    below_top: BelowTop | None = None
    """None: fitted at every clock of the range alike."""
    median_error: NonNegativeFloat | None = None
    """Relative, held out of the fit (`make fidelity`, `calibrate`); None: not known.

    With a `below_top`, this one is of the top clock.
    """
    measured: tuple[MeasuredPoints, ...] = ()
