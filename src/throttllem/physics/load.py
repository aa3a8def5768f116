"""The costs of an iteration on one GPU: seconds at the top clock per token, sequence, query-key pair and iteration.

Knows nothing of clocks, watts or iterations.
"""

# Costs are linear in what an iteration holds, so the sums over a model's operators are taken once, here, and an
# iteration is a dozen multiplications (docs/physics.md, "Time at the top clock"). A token goes through all layers: a
# decoding sequence has one, a prompt all of its tokens.
#
# Matrix products are bound by memory or by arithmetic, and overlap the two imperfectly: their time is a power mean of
# both. All products of a layer see the same tokens, so the power mean of the sums equals the sum of the power means,
# and only the sums are needed here.
#
# Experts. Of `count` experts, n tokens that choose `active` each reach count x (1 - (1 - active / count)^n) on the
# mean; their weights are read, and nothing of the others. Sharding whole experts over GPUs (EP) or columns of all of
# them (TP) reads as much per GPU on the mean. Grouped products overlap memory and arithmetic badly: their times add up.
#
# Decode attention reads the KV cache. On an A100, the kernel of ungrouped heads has one thread block read a head's
# whole context, which sets a floor per token of the mean context (`walk_token_s`); that of grouped heads splits it.
# Layers with a window read that much at most. Latent attention reads one vector for all heads, which every GPU holds
# whole, and computes with it for each head of that GPU: the slower of the two counts.
#
# An all-reduce takes one step (every GPU reads the messages of all others) or two (reduce, then gather: fewer bytes,
# one latency more); vLLM takes the cheaper by size. NCCL takes over from LARGE_ALLREDUCE_BYTES on.

from __future__ import annotations

from typing import NamedTuple

from throttllem.physics.catalogue import Gpu
from throttllem.physics.laws import TimeLaw
from throttllem.physics.model import Model, Weights

GEMMS_PER_LAYER = 4
"""qkv, output, gate with up, down."""
_LATENT_GEMMS = 3
"""More of them with latent attention: queries expanded, and keys and values absorbed into queries and output."""
ALLREDUCES_PER_LAYER = 2
"""After attention and after the feed-forward part (Megatron-LM, arXiv 1909.08053)."""
LARGE_ALLREDUCE_BYTES = 2.0**23
"""From this message size on, vLLM uses NCCL (custom_all_reduce.py, max_size)."""
_TOKEN_ELEMENTWISE = 8
"""Hidden-sized reads and writes of a token by two norms with residuals: in, residual in, residual out, out, twice."""


class Load(NamedTuple):
    """Seconds at the top clock on one GPU, per unit of the name."""

    weights_s: float
    token_gemm_memory_s: float
    token_gemm_compute_s: float
    head_token_compute_s: float
    """Tokens whose successor is sampled go through the head too."""
    experts_s: float
    """To read all experts; an iteration of n tokens reads 1 - `expert_missed`^n of them."""
    expert_missed: float
    token_expert_memory_s: float
    token_expert_compute_s: float
    experts_kernel_s: float
    """Routing, sorting and quantising of the tokens: the GPU is busy."""
    token_elementwise_s: float
    kv_token_s: float
    """In layers without a window."""
    window_kv_token_s: float
    """In layers with one: of min(context, `window_tokens`)."""
    window_tokens: float
    kv_sequence_s: float
    walk_token_s: float
    """Decode attention lasts at least this per token of the mean context."""
    pair_s: float
    window_pair_s: float
    prefill_token_s: float
    prefill_walk_token_s: float
    layers_kernel_s: float
    decode_kernel_s: float
    prefill_kernel_s: float
    allreduce_s: float
    one_step_tokens: float
    """Below this many tokens an all-reduce takes one step, at `one_step_token_s` each; from there on two."""
    one_step_token_s: float
    two_step_token_s: float
    two_step_s: float
    large_tokens: float
    large_s: float
    """Added to `allreduce_s` from `large_tokens` on, in place of `two_step_s`."""


class Products(NamedTuple):
    """What a weight format makes of matrix products: bytes and operations a second that they reach, and their norm."""

    bytes_per_s: float
    flop_per_s: float
    operand_bytes: float
    """Of a value that they read of the activations."""
    norm: float
    kernel_s: float


class _Experts(NamedTuple):
    """The expert part of a Load."""

    experts_s: float = 0.0
    expert_missed: float = 1.0
    token_expert_memory_s: float = 0.0
    token_expert_compute_s: float = 0.0
    experts_kernel_s: float = 0.0


class _AllReduce(NamedTuple):
    """The all-reduce part of a Load."""

    allreduce_s: float = 0.0
    one_step_tokens: float = 0.0
    one_step_token_s: float = 0.0
    two_step_token_s: float = 0.0
    two_step_s: float = 0.0
    large_tokens: float = 0.0
    large_s: float = 0.0


def load(gpu: Gpu, model: Model, tp: int) -> Load:
    """Costs of `model` sharded over `tp` GPUs."""
    law, value = gpu.time, model.activation_bytes
    layer = products(gpu, model)
    head_bytes_per_s = gpu.bandwidth_bytes_per_s * law.gemm_bandwidth_fraction
    head = model.vocabulary * model.hidden / tp
    parameters = layer_parameters(model, tp)
    windowed = model.window.layers if model.window else 0
    whole = model.layers - windowed
    kv_token_s = _kv_token_s(gpu, model, tp)
    pair_s = _pair_flop(model) / tp / (gpu.peak_flop_per_s * law.prefill_peak_fraction)
    grouped = model.heads > model.kv_heads
    attention_io = 2 * (model.heads + _kv_heads(model, tp) * tp) / tp * model.head_dim * value
    return Load(
        weights_s=parameters * model.weights.bytes_per_parameter / layer.bytes_per_s + head * value / head_bytes_per_s,
        token_gemm_memory_s=_gemm_io(model, tp, layer.operand_bytes) / layer.bytes_per_s,
        token_gemm_compute_s=2 * parameters / layer.flop_per_s,
        head_token_compute_s=2 * head / (gpu.peak_flop_per_s * law.gemm_peak_fraction),
        **_experts(gpu, model, tp)._asdict(),
        token_elementwise_s=_elementwise(model, tp) * value / head_bytes_per_s,
        kv_token_s=whole * kv_token_s,
        window_kv_token_s=windowed * kv_token_s,
        window_tokens=model.window.tokens if model.window else 0,
        kv_sequence_s=model.layers * _kv_heads(model, tp) * law.decode_row_s,
        walk_token_s=0.0 if grouped or model.latent else whole * law.decode_walk_token_s,
        pair_s=whole * pair_s,
        window_pair_s=windowed * pair_s,
        prefill_token_s=model.layers * attention_io / (gpu.bandwidth_bytes_per_s * law.prefill_bandwidth_fraction),
        prefill_walk_token_s=model.layers * law.prefill_walk_token_s,
        layers_kernel_s=_kernels_s(law, model, layer.kernel_s),
        decode_kernel_s=model.layers * (law.decode_kernel_s + (law.decode_split_s if grouped else 0.0)),
        prefill_kernel_s=model.layers * law.prefill_kernel_s,
        **_allreduce(law, model, tp)._asdict(),
    )


def products(gpu: Gpu, model: Model) -> Products:
    """What the products of the model's layers reach on that GPU, those of experts apart.

    8-bit weights without their tensor cores, and 4-bit weights, are unpacked: fewer bytes, arithmetic in bfloat16.
    """
    law, bandwidth = gpu.time, gpu.bandwidth_bytes_per_s
    if model.weights is Weights.FP8 and gpu.peak_fp8_flop_per_s:
        bytes_per_s, flop_per_s = (
            bandwidth * law.fp8_bandwidth_fraction,
            gpu.peak_fp8_flop_per_s * law.fp8_peak_fraction,
        )
        return Products(bytes_per_s, flop_per_s, 1.0, law.fp8_norm, law.fp8_kernel_s)
    match model.weights:
        case Weights.BF16:
            fraction = law.gemm_bandwidth_fraction
        case Weights.FP8 | Weights.INT8:
            fraction = law.fp8_bandwidth_fraction
        case Weights.INT4 | Weights.MXFP4 | Weights.NVFP4:
            fraction = law.int4_bandwidth_fraction
    flop_per_s = gpu.peak_flop_per_s * law.gemm_peak_fraction
    return Products(bandwidth * fraction, flop_per_s, model.activation_bytes, law.gemm_norm, law.gemm_kernel_s)


def grouped_products(gpu: Gpu, model: Model) -> Products:
    """The same of the grouped products of its experts; `kernel_s` is of a whole layer of them."""
    law, bandwidth, peak = gpu.time, gpu.bandwidth_bytes_per_s, gpu.peak_flop_per_s
    bytes_per_s, flop_per_s = bandwidth * law.expert_bandwidth_fraction, peak * law.expert_peak_fraction
    operand_bytes, kernel_s = model.activation_bytes, law.expert_kernel_s
    match model.expert_weights:
        case Weights.FP8 if gpu.peak_fp8_flop_per_s:
            flop_per_s, operand_bytes = gpu.peak_fp8_flop_per_s * law.expert_fp8_peak_fraction, 1.0
            kernel_s = law.fp8_expert_kernel_s
        case Weights.INT4 | Weights.MXFP4 | Weights.NVFP4:
            bytes_per_s, flop_per_s = bandwidth * law.int4_bandwidth_fraction, peak * law.int4_peak_fraction
        case _:
            pass
    return Products(bytes_per_s, flop_per_s, operand_bytes, 1.0, kernel_s)


def layer_parameters(model: Model, tp: int) -> float:
    """Parameters that one GPU holds of all matrices that every token passes: attention, dense and shared layers.

    Compressed queries, keys and values are made on every GPU, so those matrices are not sharded.
    """
    attention = model.attention_parameters / tp
    if model.latent:
        copied = model.hidden * (model.latent.kv_rank + model.latent.rotary + (model.latent.query_rank or 0))
        attention += copied * (tp - 1) / tp
    feed_forward = model.dense_layers * model.dense_parameters + model.expert_layers * model.shared_parameters
    return model.layers * attention + feed_forward / tp


def _experts(gpu: Gpu, model: Model, tp: int) -> _Experts:
    """The experts of all layers; nothing for a model without."""
    if (experts := model.experts) is None:
        return _Experts()
    law, weights, layers = grouped_products(gpu, model), model.expert_weights, model.expert_layers
    one, wide = model.expert_parameters / tp, experts.intermediate / tp
    io_bytes = (model.hidden + wide) * law.operand_bytes + (model.hidden + 2 * wide) * model.activation_bytes
    return _Experts(
        experts_s=layers * experts.count * one * weights.bytes_per_parameter / law.bytes_per_s,
        expert_missed=1 - experts.active / experts.count,
        token_expert_memory_s=layers * experts.active * io_bytes / law.bytes_per_s,
        token_expert_compute_s=layers * experts.active * 2 * one / law.flop_per_s,
        experts_kernel_s=layers * law.kernel_s,
    )


def _kernels_s(law: TimeLaw, model: Model, kernel_s: float) -> float:
    """Fixed times of the matrix products and of the small kernels of all layers, and of the head."""
    feed_forward = model.layers if _every_layer_is_dense(model) else model.dense_layers
    count = model.layers * (GEMMS_PER_LAYER // 2 + (_LATENT_GEMMS if model.latent else 0))
    count += feed_forward * GEMMS_PER_LAYER // 2
    return count * kernel_s + law.gemm_kernel_s + model.layers * law.layer_kernel_s


def _every_layer_is_dense(model: Model) -> bool:
    """Whether all layers have feed-forward products besides those of routed experts."""
    return model.experts is None or model.experts.shared_intermediate > 0


def _kv_token_s(gpu: Gpu, model: Model, tp: int) -> float:
    """Of one layer: to read a cached token, or to compute with it where that takes longer."""
    law = gpu.time
    read_s = kv_bytes_per_token(model, tp) / model.layers / (gpu.bandwidth_bytes_per_s * law.decode_bandwidth_fraction)
    if (latent := model.latent) is None:
        return read_s
    flop = 2 * model.heads / tp * (2 * latent.kv_rank + latent.rotary)
    return max(read_s, flop / (gpu.peak_flop_per_s * law.prefill_peak_fraction))


def _pair_flop(model: Model) -> float:
    """Operations of a query-key pair in one layer."""
    value = model.latent.value if model.latent else model.head_dim
    return 2 * model.heads * (model.head_dim + value)


def _allreduce(law: TimeLaw, model: Model, tp: int) -> _AllReduce:
    """All all-reduces of one iteration. Two GPUs read as much in one step as in two."""
    if tp == 1:
        return _AllReduce()
    count, token_bytes = ALLREDUCES_PER_LAYER * model.layers, model.hidden * model.activation_bytes
    message_s = count * token_bytes / law.allreduce_bytes_per_s
    one_step_token_s, two_step_token_s = (tp - 1) * message_s, 2 * (tp - 1) / tp * message_s
    step_s = count * law.allreduce_step_s if tp > 2 else 0.0
    return _AllReduce(
        allreduce_s=count * (law.allreduce_s + tp * law.allreduce_gpu_s),
        one_step_tokens=step_s / (one_step_token_s - two_step_token_s) if tp > 2 else 0.0,
        one_step_token_s=one_step_token_s,
        two_step_token_s=two_step_token_s,
        two_step_s=step_s,
        large_tokens=LARGE_ALLREDUCE_BYTES / token_bytes,
        large_s=step_s + count * law.allreduce_large_s,
    )


def kv_bytes_per_token(model: Model, tp: int) -> float:
    """On the GPU with most: with more GPUs than KV heads each is stored on several, a latent vector on all of them."""
    if model.latent:
        return model.kv_bytes_per_token
    return model.kv_bytes_per_token * _kv_heads(model, tp) / model.kv_heads


def _kv_heads(model: Model, tp: int) -> int:
    return 1 if model.latent else -(-model.kv_heads // tp)


def _gemm_io(model: Model, tp: int, operand_bytes: float) -> float:
    """Bytes of a token that the matrix products, the experts' apart, read (`operand_bytes` a value) and write."""
    if (latent := model.latent) is None:
        query, compressed = model.head_dim * model.heads / tp, model.head_dim * 2 * _kv_heads(model, tp)
        attention_in, attention_out = model.hidden + query, query + compressed + model.hidden
    else:
        query, out = model.heads * model.head_dim / tp, model.heads * latent.value / tp
        ranks = latent.kv_rank + (latent.query_rank or 0)
        attention_in = model.hidden + ranks + out
        attention_out = ranks + latent.rotary + query + model.heads * latent.key / tp + model.hidden
    wide = model.dense_layers * model.intermediate
    wide += model.expert_layers * model.experts.shared_intermediate if model.experts else 0
    feed_forward = model.layers if _every_layer_is_dense(model) else model.dense_layers
    read = model.layers * attention_in + feed_forward * model.hidden + wide / tp
    written = model.layers * attention_out + feed_forward * model.hidden + 2 * wide / tp
    return read * operand_bytes + written * model.activation_bytes


def _elementwise(model: Model, tp: int) -> float:
    """Values that norms, rotary embedding and activation functions of all layers read and write per token."""
    rotary = 2 * model.head_dim * (model.heads / tp + _kv_heads(model, tp))
    wide = model.dense_layers * model.intermediate
    if model.experts:
        used = model.experts.active * model.experts.intermediate + model.experts.shared_intermediate
        wide += model.expert_layers * used
    return model.layers * (_TOKEN_ELEMENTWISE * model.hidden + rotary) + 3 * wide / tp
