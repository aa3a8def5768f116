"""The ground truth of the simulation: seconds and watts of an iteration of one engine, without noise.

An engine is a model on `tp` GPUs of one kind. Knows nothing of requests, batching rules or policies.
"""

# The law (docs/physics.md derives it).
#
#   seconds = busy + waiting
#   busy    = (memory^p + arithmetic^p)^(1/p) of the matrix products + memory + arithmetic of the experts' products
#             + streamed + KV read + prefill attention
#   waiting = fixed kernel times + all-reduce + host + what is left of the decode attention's walk after the KV read
#   watts   = base + (traffic + core x busy + compute x arithmetic + attention x KV read
#             + unpack x weights of 4 bits) / seconds
#
# Each term is a cost of `load.py` times a factor of the clock (`clock.py`): memory, arithmetic, latency; the host does
# not depend on it. `traffic` is the energy of memory traffic; `core`, `compute`, `attention` and `unpack` are watts,
# times the switching power f V(f)^2. A GPU with a running engine never draws less than `base`.
#
# Power limit. Above the limit the GPU's governor lowers the clock. The iteration then takes the time at the clock where
# the power just meets the limit, whatever higher clock is set.
#
# `iteration` runs once per simulated iteration, so all products that do not depend on it are computed once per clock.

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

from throttllem.physics.catalogue import Gpu
from throttllem.physics.clock import ClockScale, clock_scale
from throttllem.physics.load import grouped_products, kv_bytes_per_token, load, products
from throttllem.physics.model import Model

_GIB = 2.0**30
_LARGEST_TP = 8
"""GPUs of one NVLink node (DGX A100, DGX H100)."""


class ModelDoesNotFit(ValueError):  # noqa: N818 - a plain name for users' code
    """Weights and activations leave no room for a KV cache, or the heads cannot be divided among the GPUs."""


class _Coefficients(NamedTuple):
    """The coefficients of an iteration at one clock: seconds (as in `load.Load`) and watts of all GPUs.

    The factors of the clock are included; watts of traffic and of switching are per second of their time.
    """

    weights: float
    token_gemm_memory: float
    token_gemm_compute: float
    head_token_compute: float
    experts: float
    expert_missed: float
    token_expert_memory: float
    token_expert_compute: float
    experts_kernel: float
    token_streamed: float
    kv_token: float
    window_kv_token: float
    window_tokens: float
    kv_sequence: float
    walk_token: float
    pair: float
    window_pair: float
    prefill_token: float
    prefill_walk_token: float
    fixed: float
    decode_fixed: float
    prefill_fixed: float
    one_step_tokens: float
    one_step_token: float
    two_step_token: float
    two_step: float
    large_tokens: float
    large: float
    norm: float
    inverse_norm: float
    host_request: float
    base_w: float
    gemm_traffic_w: float
    expert_traffic_w: float
    kv_traffic_w: float
    prompt_traffic_w: float
    core_w: float
    compute_w: float
    attention_w: float
    gemm_unpack_w: float
    expert_unpack_w: float


class EnginePhysics:
    """The law of one engine. Raises ModelDoesNotFit if the model does not fit `tp` GPUs."""

    def __init__(self, gpu: Gpu, model: Model, tp: int) -> None:
        self.gpu, self.model, self.tp = gpu, model, tp
        _check_fit(gpu, model, tp)
        self._load = load(gpu, model, tp)
        self._limit_w, self._base_w = gpu.power.limit_w * tp, (gpu.power.idle_w + gpu.power.static_w) * tp
        self._clocks = gpu.clocks_mhz
        self._switching = tuple(self._scale(clock).switching for clock in self._clocks)
        self._coefficients: dict[float, _Coefficients] = {}

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
        at = self._coefficients.get(clock_mhz) or self._clock(clock_mhz)
        found = _iteration(at, decode_batch, kv_tokens, prefill_tokens, prefill_pairs)
        if found[1] <= self._limit_w:
            return found
        return self._capped(clock_mhz, found, (decode_batch, kv_tokens, prefill_tokens, prefill_pairs))

    def _capped(
        self, clock_mhz: float, uncapped: tuple[float, float], batch: tuple[int, int, int, float]
    ) -> tuple[float, float]:
        """Seconds and watts at the clock where the power equals the limit; `uncapped` are those at `clock_mhz`.

        Power is nearly linear in the switching factor: false position finds the two neighbouring clocks around the
        limit, the same for every `clock_mhz`, and linear interpolation the rest.
        """
        limit_w, clocks, switching = self._limit_w, self._clocks, self._switching
        high, above = bisect_left(clocks, clock_mhz), uncapped
        if clocks[high] != clock_mhz:
            above = _iteration(self._clock(clocks[high]), *batch)
        low, below_s, below_w, low_switching = -1, 0.0, self._base_w, 0.0
        while high - low > 1:
            share = (limit_w - below_w) / (above[1] - below_w)
            guess = bisect_left(switching, low_switching + share * (switching[high] - low_switching))
            middle = min(max(guess, low + 1), high - 1)
            at = _iteration(self._clock(clocks[middle]), *batch)
            if at[1] <= limit_w:
                low, (below_s, below_w), low_switching = middle, at, switching[middle]
            else:
                high, above = middle, at
        if low < 0:
            return above
        share = (limit_w - below_w) / (above[1] - below_w)
        return below_s + share * (above[0] - below_s), limit_w

    def _clock(self, clock_mhz: float) -> _Coefficients:
        if at := self._coefficients.get(clock_mhz):
            return at
        low, high = self.gpu.clock_min_mhz, self.gpu.clock_max_mhz
        if not low <= clock_mhz <= high:
            raise ValueError(f"clock {clock_mhz} MHz: {self.gpu.name} runs at {low} to {high} MHz")
        at = self._coefficients[clock_mhz] = self._at(self._scale(clock_mhz))
        return at

    def _scale(self, clock_mhz: float) -> ClockScale:
        return clock_scale(self.gpu.time, self.gpu.power, clock_mhz, self.gpu.clock_max_mhz)

    def _at(self, scale: ClockScale) -> _Coefficients:
        compute, memory, latency, switching = scale
        work, law, power, tp = self._load, self.gpu.time, self.gpu.power, self.tp
        layer, grouped = products(self.gpu, self.model), grouped_products(self.gpu, self.model)
        full_w = power.memory_w * tp / memory
        return _Coefficients(
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


def _iteration(
    at: _Coefficients, decode_batch: int, kv_tokens: int, prefill_tokens: int, prefill_pairs: float
) -> tuple[float, float]:
    """Seconds and watts of one iteration by the law, without the power limit."""
    (
        weights_s, token_gemm_memory_s, token_gemm_compute_s, head_token_compute_s, experts_s, expert_missed,
        token_expert_memory_s, token_expert_compute_s, experts_kernel_s, token_streamed_s, kv_token_s,
        window_kv_token_s, window_tokens, kv_sequence_s, walk_token_s, pair_s, window_pair_s, prefill_token_s,
        prefill_walk_token_s, waiting_s, decode_fixed_s, prefill_fixed_s, one_step_tokens, token_message_s,
        two_step_token_s, two_step_s, large_tokens, large_s, norm, inverse_norm, host_request_s, base_w,
        gemm_traffic_w, expert_traffic_w, kv_traffic_w, prompt_traffic_w, core_w, compute_w, attention_w,
        gemm_unpack_w, expert_unpack_w,
    ) = at  # fmt: skip
    tokens = decode_batch + prefill_tokens
    gemm_memory_s = weights_s + token_gemm_memory_s * tokens
    gemm_compute_s = token_gemm_compute_s * tokens + head_token_compute_s * decode_batch
    streamed_s, read_s = token_streamed_s * tokens, kv_token_s * kv_tokens + kv_sequence_s * decode_batch
    attention_s = tensor_s = prompt_s = 0.0
    if window_tokens:
        read_s += window_kv_token_s * min(kv_tokens, window_tokens * decode_batch)
    if prefill_tokens:
        waiting_s += prefill_fixed_s
        gemm_compute_s += head_token_compute_s
        prompt_s = prefill_token_s * prefill_tokens
        tensor_s = pair_s * prefill_pairs
        if window_tokens:
            tensor_s += window_pair_s * min(prefill_pairs, window_tokens * prefill_tokens)
        attention_s = tensor_s + prompt_s + prefill_walk_token_s * prefill_tokens
    if tokens >= one_step_tokens:
        token_message_s = two_step_token_s
        waiting_s += two_step_s if tokens < large_tokens else large_s
    waiting_s += token_message_s * tokens
    if decode_batch:
        waiting_s += decode_fixed_s + host_request_s * decode_batch
        if walk_token_s:
            walk_s = walk_token_s * kv_tokens / decode_batch - read_s
            if walk_s > 0:
                waiting_s += walk_s
    busy_s = (gemm_memory_s**norm + gemm_compute_s**norm) ** inverse_norm + streamed_s + read_s + attention_s
    unpacked = gemm_unpack_w * gemm_memory_s
    traffic = gemm_traffic_w * (gemm_memory_s + streamed_s) + kv_traffic_w * read_s + prompt_traffic_w * prompt_s
    if experts_s:
        expert_memory_s = experts_s * (1 - expert_missed**tokens) + token_expert_memory_s * tokens
        expert_compute_s = token_expert_compute_s * tokens
        busy_s += expert_memory_s + expert_compute_s + experts_kernel_s
        tensor_s += expert_compute_s
        traffic += expert_traffic_w * expert_memory_s
        unpacked += expert_unpack_w * expert_memory_s
    time_s = busy_s + waiting_s
    switched = core_w * busy_s + compute_w * (gemm_compute_s + tensor_s) + attention_w * read_s + unpacked
    return time_s, base_w + (traffic + switched) / time_s


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
