"""The ground truth of the simulation: seconds and watts of an iteration of one engine, without noise.

An engine is a model on `tp` GPUs of one kind. Knows nothing of requests, batching rules or policies.
"""

# `iteration` runs once per simulated iteration, so all products that do not depend on it are computed once per clock
# (`Coefficients`); the law over them is compiled (`iterations.py`).

from __future__ import annotations

import numpy as np

from throttllem.physics.catalogue import Gpu
from throttllem.physics.clock import ClockScale, clock_scale
from throttllem.physics.iterations import COEFFICIENTS, Coefficients, Law, limited, unlimited
from throttllem.physics.load import grouped_products, kv_bytes_per_token, load, products
from throttllem.physics.model import Model

_GIB = 2.0**30
_LARGEST_TP = 8
"""GPUs of one NVLink node (DGX A100, DGX H100)."""


class ModelDoesNotFit(ValueError):  # noqa: N818 - a plain name for users' code
    """Weights and activations leave no room for a KV cache, or the heads cannot be divided among the GPUs."""


class EnginePhysics:
    """The law of one engine. Raises ModelDoesNotFit if the model does not fit `tp` GPUs."""

    def __init__(self, gpu: Gpu, model: Model, tp: int) -> None:
        self.gpu, self.model, self.tp = gpu, model, tp
        _check_fit(gpu, model, tp)
        self._load = load(gpu, model, tp)
        self._limit_w, self._base_w = float(gpu.power.limit_w * tp), (gpu.power.idle_w + gpu.power.static_w) * tp
        self._at = np.zeros(len(gpu.clocks_mhz), COEFFICIENTS)
        self._places = {float(clock): place for place, clock in enumerate(gpu.clocks_mhz)}
        self._filled = [False] * len(gpu.clocks_mhz)
        self._law: Law | None = None

    def kv_capacity_tokens(self) -> int:
        """Tokens of KV cache that weights and activations leave room for, on the GPU with most."""
        return _kv_tokens(self.gpu, self.model, self.tp)

    def idle_w(self) -> float:
        """Watts of all GPUs with the model loaded and nothing running."""
        return self.gpu.power.idle_w * self.tp

    @property
    def startup_s(self) -> float:
        """Seconds from the start of an engine until it can serve: a parameter of the catalogue."""
        return self.gpu.startup_s

    @property
    def startup_w(self) -> float:
        """Watts of all GPUs while the engine starts."""
        return self.gpu.startup_w * self.tp

    def iteration(
        self, clock_mhz: float, decode_batch: int, kv_tokens: int, prefill_tokens: int, prefill_pairs: float
    ) -> tuple[float, float]:
        """Seconds, and watts of all GPUs, of one iteration.

        `kv_tokens` are read by the decoding sequences; `prefill_tokens` new prompt tokens have `prefill_pairs`
        query-key pairs (half the square of a whole prompt). Raises ValueError for a clock outside the GPU's range.
        """
        row = self.row(clock_mhz)
        load = float(decode_batch), float(kv_tokens), float(prefill_tokens), float(prefill_pairs)
        found = unlimited(self._at, row, *load)
        return found if found[1] <= self._limit_w else limited(self.law(), row, *load)

    def law(self) -> Law:
        """The law at every clock, for compiled loops; `row` finds a clock in it."""
        if self._law is None:
            for clock in self.gpu.clocks_mhz:
                self.row(clock)
            self._law = Law(self._at, len(self.gpu.clocks_mhz), self._limit_w)
        return self._law

    def row(self, clock_mhz: float) -> int:
        """Where the law has the coefficients of a clock; one that is not of the GPU's makes another law.

        Raises ValueError for a clock outside the GPU's range.
        """
        row = self._places.get(clock_mhz)
        if row is not None and self._filled[row]:
            return row
        low, high = self.gpu.clock_min_mhz, self.gpu.clock_max_mhz
        if not low <= clock_mhz <= high:
            raise ValueError(f"clock {clock_mhz} MHz: {self.gpu.name} runs at {low} to {high} MHz")
        if row is None:
            row = self._places[clock_mhz] = len(self._filled)
            self._filled.append(False)
            self._at, self._law = np.append(self._at, np.zeros(1, COEFFICIENTS)), None
        self._at[row] = self._coefficients(clock_mhz, self._scale(clock_mhz))
        self._filled[row] = True
        return row

    def _scale(self, clock_mhz: float) -> ClockScale:
        return clock_scale(self.gpu.time, self.gpu.power, clock_mhz, self.gpu.clock_max_mhz)

    def _coefficients(self, clock_mhz: float, scale: ClockScale) -> Coefficients:
        compute, memory, latency, switching = scale
        work, law, power, tp = self._load, self.gpu.time, self.gpu.power, self.tp
        layer, grouped = products(self.gpu, self.model), grouped_products(self.gpu, self.model)
        full_w = power.memory_w * tp / memory
        return Coefficients(
            clock_mhz=clock_mhz,
            switching=switching,
            weights=work.weights_s * memory,
            token_gemm_memory=work.token_gemm_memory_s * memory,
            token_gemm_compute=work.token_gemm_compute_s * compute,
            head_token_compute=work.head_token_compute_s * compute,
            experts=work.experts_s * memory,
            expert_missed=work.expert_missed,
            token_expert_memory=work.token_expert_memory_s * memory,
            token_expert_compute=work.token_expert_compute_s * compute,
            experts_kernel=work.experts_kernel_s * latency,
            token_streamed=work.token_elementwise_s * memory,
            kv_token=work.kv_token_s * memory,
            window_kv_token=work.window_kv_token_s * memory,
            window_tokens=work.window_tokens,
            kv_sequence=work.kv_sequence_s * memory,
            walk_token=work.walk_token_s * latency,
            pair=work.pair_s * compute,
            window_pair=work.window_pair_s * compute,
            prefill_token=work.prefill_token_s * memory,
            prefill_walk_token=work.prefill_walk_token_s * compute,
            fixed=(work.layers_kernel_s + work.allreduce_s) * latency + law.host_s,
            decode_fixed=work.decode_kernel_s * latency,
            prefill_fixed=work.prefill_kernel_s * latency,
            one_step_tokens=work.one_step_tokens,
            one_step_token=work.one_step_token_s * latency,
            two_step_token=work.two_step_token_s * latency,
            two_step=work.two_step_s * latency,
            large_tokens=work.large_tokens,
            large=work.large_s * latency,
            norm=layer.norm,
            inverse_norm=1 / layer.norm,
            host_request=law.host_request_s,
            base_w=self._base_w,
            gemm_traffic_w=full_w * layer.bytes_per_s / self.gpu.bandwidth_bytes_per_s,
            expert_traffic_w=full_w * grouped.bytes_per_s / self.gpu.bandwidth_bytes_per_s,
            kv_traffic_w=full_w * law.decode_bandwidth_fraction,
            prompt_traffic_w=full_w * law.prefill_bandwidth_fraction,
            core_w=switching * power.core_w * tp,
            compute_w=switching * power.compute_w * tp,
            attention_w=switching * power.attention_w * tp,
            gemm_unpack_w=switching * power.unpack_w * tp if self.model.weights.unpacked else 0.0,
            expert_unpack_w=switching * power.unpack_w * tp if self.model.expert_weights.unpacked else 0.0,
        )


def _free_bytes(gpu: Gpu, model: Model, tp: int) -> float:
    """Bytes of one GPU's usable memory that weights and activations leave."""
    return gpu.memory_bytes * gpu.memory_fraction - gpu.activation_bytes - model.weight_bytes / tp


def _kv_tokens(gpu: Gpu, model: Model, tp: int) -> int:
    return int(_free_bytes(gpu, model, tp) // kv_bytes_per_token(model, tp))


def _check_fit(gpu: Gpu, model: Model, tp: int) -> None:
    if tp < 1 or model.heads % tp:
        sizes = [size for size in range(1, _LARGEST_TP + 1) if model.heads % size == 0]
        raise ModelDoesNotFit(f"{model.name} has {model.heads} heads, which {tp} GPUs cannot share; tp may be {sizes}")
    if _kv_tokens(gpu, model, tp) >= 1:
        return
    needed = (model.weight_bytes / tp + gpu.activation_bytes) / _GIB
    there = gpu.memory_bytes * gpu.memory_fraction / _GIB
    fits = [size for size in (1, 2, 4, 8) if model.heads % size == 0 and _kv_tokens(gpu, model, size) >= 1]
    remedy = f"the smallest tp that fits is {fits[0]}" if fits else f"no tp up to {_LARGEST_TP} fits"
    raise ModelDoesNotFit(
        f"{model.name} at tp {tp} needs {needed:.1f} GiB per {gpu.name} before any KV cache, and {there:.1f} GiB "
        f"({gpu.memory_fraction:.0%} of the memory) are there: {remedy}"
    )
