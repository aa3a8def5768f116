"""What is known of a GPU before any measurement: the likely value of each constant, and its spread.

The middles are round figures between those of A100 and H100, relative to the data sheet where they scale with it, so
that a held-out fit does not learn the held-out measurements from them. Knows nothing of how a fit is done.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from throttllem.calibrate.fit import Constant
from throttllem.physics.catalogue import Gpu

CLOCK_TIME = ("time.memory_knee_mhz", "time.memory_sharpness", "time.latency_clock_share")
POWER = ("static_w", "memory_w", "core_w", "compute_w", "knee_mhz", "voltage_rise", "voltage_exponent")
CLOCK_POWER = tuple(f"power.{name}" for name in POWER)


def priors(gpu: Gpu) -> dict[str, Constant]:
    """Every constant that can be fitted, by path."""
    top, limit = gpu.clock_max_mhz, gpu.power.limit_w
    every = (
        Constant(path="time.gemm_bandwidth_fraction", start=0.8, spread=0.15, low=0.05, high=1.0),
        Constant(path="time.gemm_peak_fraction", start=0.8, spread=0.2, low=0.05, high=1.0),
        Constant(path="time.gemm_norm", start=2.0, spread=0.4, low=1.0, high=10.0),
        Constant(path="time.gemm_kernel_s", start=5e-6, spread=0.5),
        Constant(path="time.fp8_bandwidth_fraction", start=0.8, spread=0.15, low=0.05, high=1.0),
        Constant(path="time.fp8_peak_fraction", start=0.55, spread=0.3, low=0.05, high=1.0),
        Constant(path="time.fp8_norm", start=1.5, spread=0.4, low=1.0, high=10.0),
        Constant(path="time.fp8_kernel_s", start=6e-6, spread=0.5),
        Constant(path="time.int4_bandwidth_fraction", start=0.7, spread=0.3, low=0.05, high=1.0),
        Constant(path="time.int4_peak_fraction", start=0.35, spread=0.5, low=0.02, high=1.0),
        Constant(path="time.expert_bandwidth_fraction", start=0.9, spread=0.2, low=0.05, high=1.0),
        Constant(path="time.expert_peak_fraction", start=0.5, spread=0.4, low=0.02, high=1.0),
        Constant(path="time.expert_fp8_peak_fraction", start=0.3, spread=0.5, low=0.02, high=1.0),
        Constant(path="time.expert_kernel_s", start=30e-6, spread=0.7),
        Constant(path="time.fp8_expert_kernel_s", start=100e-6, spread=0.7),
        Constant(path="time.decode_bandwidth_fraction", start=0.75, spread=0.2, low=0.05, high=1.0),
        Constant(path="time.decode_kernel_s", start=15e-6, spread=0.5),
        Constant(path="time.decode_row_s", start=15e-9, spread=0.7),
        Constant(path="time.decode_split_s", start=5e-6, spread=1.0),
        Constant(path="time.decode_walk_token_s", start=20e-9, spread=1.0),
        Constant(path="time.prefill_peak_fraction", start=0.6, spread=0.3, low=0.05, high=1.0),
        Constant(path="time.prefill_bandwidth_fraction", start=0.4, spread=0.5, low=0.02, high=1.0),
        Constant(path="time.prefill_kernel_s", start=12e-6, spread=0.5),
        Constant(path="time.prefill_walk_token_s", start=10e-9, spread=1.0),
        Constant(path="time.layer_kernel_s", start=5e-6, spread=0.5),
        Constant(path="time.allreduce_s", start=4e-6, spread=0.7),
        Constant(path="time.allreduce_gpu_s", start=0.3e-6, spread=0.7),
        Constant(path="time.allreduce_step_s", start=5e-6, spread=0.7),
        Constant(path="time.allreduce_large_s", start=20e-6, spread=1.0),
        Constant(path="time.allreduce_bytes_per_s", start=150e9, spread=1.0),
        Constant(path="time.host_s", start=1.5e-3, spread=0.7),
        Constant(path="time.host_request_s", start=10e-6, spread=1.0),
        Constant(path="time.memory_knee_mhz", start=0.7 * top, spread=0.3, high=2.0 * top),
        Constant(path="time.memory_sharpness", start=15.0, spread=0.6, low=1.0, high=40.0),
        Constant(path="time.latency_clock_share", start=0.5, spread=0.6, low=0.01, high=1.0),
        Constant(path="power.static_w", start=0.06 * limit, spread=0.7),
        Constant(path="power.memory_w", start=0.13 * limit, spread=0.5),
        Constant(path="power.core_w", start=0.6 * limit, spread=0.5),
        Constant(path="power.compute_w", start=0.8 * limit, spread=0.5),
        Constant(path="power.attention_w", start=0.15 * limit, spread=0.7),
        Constant(path="power.unpack_w", start=0.3 * limit, spread=0.7),
        Constant(path="power.knee_mhz", start=0.6 * top, spread=0.3, high=0.95 * top),
        Constant(path="power.voltage_rise", start=0.9, spread=0.5),
        Constant(path="power.voltage_exponent", start=1.3, spread=0.3, low=0.3, high=5.0),
    )
    return {constant.path: constant for constant in every}


def around(gpu: Gpu, paths: Iterable[str], known: Gpu | None = None) -> list[Constant]:
    """The priors of `paths`; with `known`, their middles are that GPU's own constants.

    A constant of 0 means that the GPU lacks that effect: it is omitted. Every GPU has power.static_w to some degree
    (where it is 0, idle_w includes it): it starts from the general prior.
    """
    chosen = [priors(gpu)[path] for path in paths]
    if known is None:
        return chosen
    moved = [replace(constant, start=_value(known, constant.path) or _start(constant)) for constant in chosen]
    return [constant for constant in moved if constant.start]


def _start(constant: Constant) -> float:
    return constant.start if constant.path == "power.static_w" else 0.0


def _value(gpu: Gpu, path: str) -> float:
    law, _, name = path.partition(".")
    return float(getattr(getattr(gpu, law), name))
