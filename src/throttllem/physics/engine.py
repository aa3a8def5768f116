"""One engine: a model on `tp` GPUs of one kind. Seconds and watts of an iteration, without noise.

The ground truth of the simulation. Knows nothing of requests, batching rules or policies. `docs/physics.md` derives
the law; `iteration` is called once per simulated iteration, so all that can be is worked out beforehand.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

from throttllem.physics.catalogue import Gpu, Model
from throttllem.physics.clock import ClockScale, clock_scale
from throttllem.physics.load import kv_bytes_per_token, load

_GIB = 2.0**30
_LARGEST_TP = 8
"""GPUs of one NVLink node (DGX A100, DGX H100)."""


class ModelDoesNotFit(ValueError):  # noqa: N818 - the name says what happened
    """Weights and activations leave no room for a KV cache, or the heads cannot be shared out."""


class _Watts(NamedTuple):
    """Watts of one GPU, with the fractions that turn seconds of work into seconds at the hardware's own peak."""

    base: float
    memory: float
    core: float
    compute: float
    gemm_bandwidth: float
    decode_bandwidth: float


class EnginePhysics:
    """The law of one engine. Raises ModelDoesNotFit where the model does not fit `tp` GPUs."""

    def __init__(self, gpu: Gpu, model: Model, tp: int) -> None:
        self.gpu, self.model, self.tp = gpu, model, tp
        _check_fit(gpu, model, tp)
        self._load = load(gpu, model, tp)
        self._watts = _watts(gpu)
        self._norm, self._inverse_norm = gpu.time.gemm_norm, 1 / gpu.time.gemm_norm
        self._host_s, self._host_request_s = gpu.time.host_s, gpu.time.host_request_s
        self._limit_w = gpu.power.limit_w * tp
        self._clocks = gpu.clocks_mhz
        self._ladder = tuple(self._scale(clock) for clock in self._clocks)
        self._switching = tuple(scale.switching for scale in self._ladder)
        self._scales: dict[float, ClockScale] = dict(zip(self._clocks, self._ladder, strict=True))

    def kv_capacity_tokens(self) -> int:
        """Tokens of KV cache that weights and activations leave room for, on the fullest GPU."""
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

        `kv_tokens` are read by the decode rows; `prefill_tokens` new prompt tokens see `prefill_pairs` query-key
        pairs (half the square of a whole prompt). Above the power limit the clock gives way, as the GPU's does.
        Raises ValueError for a clock outside the GPU's range.
        """
        scale = self._scales.get(clock_mhz) or self._new_scale(clock_mhz)
        time_s, power_w = self._uncapped(scale, decode_batch, kv_tokens, prefill_tokens, prefill_pairs)
        if power_w <= self._limit_w:
            return time_s, power_w
        return self._capped(clock_mhz, decode_batch, kv_tokens, prefill_tokens, prefill_pairs)

    def _uncapped(
        self, scale: ClockScale, decode_batch: int, kv_tokens: int, prefill_tokens: int, prefill_pairs: float
    ) -> tuple[float, float]:
        compute, memory, switching = scale
        (
            weights_s, row_gemm_memory_s, row_gemm_compute_s, head_row_compute_s, row_elementwise_s, kv_token_s, pair_s,
            prefill_token_s, kernel_s, decode_kernel_s, prefill_kernel_s, allreduce_s, row_allreduce_s,
        ) = self._load  # fmt: skip
        base_w, memory_w, core_w, compute_w, gemm_bandwidth, decode_bandwidth = self._watts
        rows = decode_batch + prefill_tokens
        sampled = decode_batch
        if decode_batch:
            kernel_s += decode_kernel_s
        if prefill_tokens:
            kernel_s += prefill_kernel_s
            sampled += 1
        gemm_memory_s = weights_s + row_gemm_memory_s * rows
        gemm_compute_s = row_gemm_compute_s * rows + head_row_compute_s * sampled
        norm = self._norm
        gemm_s = ((gemm_memory_s * memory) ** norm + (gemm_compute_s * compute) ** norm) ** self._inverse_norm
        rows_s = row_elementwise_s * rows + prefill_token_s * prefill_tokens
        kv_s = kv_token_s * kv_tokens
        pairs_s = pair_s * prefill_pairs
        busy_s = gemm_s + (rows_s + kv_s) * memory + pairs_s * compute
        waiting_s = kernel_s + allreduce_s + row_allreduce_s * rows + self._host_s + self._host_request_s * decode_batch
        time_s = busy_s + waiting_s
        traffic_w = memory_w * ((gemm_memory_s + rows_s) * gemm_bandwidth + kv_s * decode_bandwidth)
        switching_w = core_w * busy_s + compute_w * (gemm_compute_s + pairs_s) * compute
        return time_s, (base_w + (traffic_w + switching * switching_w) / time_s) * self.tp

    def _capped(
        self, clock_mhz: float, decode_batch: int, kv_tokens: int, prefill_tokens: int, prefill_pairs: float
    ) -> tuple[float, float]:
        """Seconds and watts at the clock where the power equals the limit.

        Power is nearly a straight line over the switching factor: false position finds the two neighbouring clocks
        around the limit, whatever clock was asked for, and a straight line between them the rest.
        """
        batch = (decode_batch, kv_tokens, prefill_tokens, prefill_pairs)
        limit_w, ladder, switching = self._limit_w, self._ladder, self._switching
        low, high = 0, bisect_left(self._clocks, clock_mhz)
        below, above = self._uncapped(ladder[low], *batch), self._uncapped(ladder[high], *batch)
        if below[1] > limit_w:
            return below
        while high - low > 1:
            share = (limit_w - below[1]) / (above[1] - below[1])
            guess = bisect_left(switching, switching[low] + share * (switching[high] - switching[low]))
            middle = min(max(guess, low + 1), high - 1)
            at = self._uncapped(ladder[middle], *batch)
            if at[1] <= limit_w:
                low, below = middle, at
            else:
                high, above = middle, at
        share = (limit_w - below[1]) / (above[1] - below[1])
        return below[0] + share * (above[0] - below[0]), limit_w

    def _new_scale(self, clock_mhz: float) -> ClockScale:
        low, high = self.gpu.clock_min_mhz, self.gpu.clock_max_mhz
        if not low <= clock_mhz <= high:
            raise ValueError(f"clock {clock_mhz} MHz: {self.gpu.name} runs at {low} to {high} MHz")
        scale = self._scales[clock_mhz] = self._scale(clock_mhz)
        return scale

    def _scale(self, clock_mhz: float) -> ClockScale:
        return clock_scale(self.gpu.time, self.gpu.power, clock_mhz, self.gpu.clock_max_mhz)


def _watts(gpu: Gpu) -> _Watts:
    power, time = gpu.power, gpu.time
    return _Watts(
        base=power.idle_w + power.static_w,
        memory=power.memory_w,
        core=power.core_w,
        compute=power.compute_w,
        gemm_bandwidth=time.gemm_bandwidth_fraction,
        decode_bandwidth=time.decode_bandwidth_fraction,
    )


def _free_bytes(gpu: Gpu, model: Model, tp: int) -> float:
    """What weights and activations leave of one GPU's share of the memory."""
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
