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
# Decode attention reads the KV cache. On an A100, the kernel of ungrouped heads has one thread block read a head's
# whole context, which sets a floor per token of the mean context (`walk_token_s`); that of grouped heads splits it.
#
# An all-reduce takes one step (every GPU reads the messages of all others) or two (reduce, then gather: fewer bytes,
# one latency more); vLLM takes the cheaper by size. NCCL takes over from LARGE_ALLREDUCE_BYTES on.

from __future__ import annotations

from typing import NamedTuple

from throttllem.physics.catalogue import Gpu
from throttllem.physics.laws import TimeLaw
from throttllem.physics.model import Model

GEMMS_PER_LAYER = 4
"""qkv, output, gate with up, down."""
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
    token_elementwise_s: float
    kv_token_s: float
    kv_sequence_s: float
    walk_token_s: float
    """Decode attention lasts at least this per token of the mean context."""
    pair_s: float
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
    gemm_bandwidth = gpu.bandwidth_bytes_per_s * law.gemm_bandwidth_fraction
    gemm_peak = gpu.peak_flop_per_s * law.gemm_peak_fraction
    head = model.vocabulary * model.hidden / tp
    parameters = model.layers * (model.attention_parameters + model.dense_parameters) / tp
    query_width = model.heads * model.head_dim
    grouped = model.heads > model.kv_heads
    attention_io = 2 * (model.heads + _kv_heads(model, tp) * tp) / tp * model.head_dim * value
    return Load(
        weights_s=(parameters * model.weights.bytes_per_parameter + head * value) / gemm_bandwidth,
        token_gemm_memory_s=model.layers * _gemm_io(model, tp) * value / gemm_bandwidth,
        token_gemm_compute_s=2 * parameters / gemm_peak,
        head_token_compute_s=2 * head / gemm_peak,
        token_elementwise_s=model.layers * _elementwise(model, tp) * value / gemm_bandwidth,
        kv_token_s=kv_bytes_per_token(model, tp) / (gpu.bandwidth_bytes_per_s * law.decode_bandwidth_fraction),
        kv_sequence_s=model.layers * _kv_heads(model, tp) * law.decode_row_s,
        walk_token_s=0.0 if grouped else model.layers * law.decode_walk_token_s,
        pair_s=4 * query_width * model.layers / tp / (gpu.peak_flop_per_s * law.prefill_peak_fraction),
        prefill_token_s=model.layers * attention_io / (gpu.bandwidth_bytes_per_s * law.prefill_bandwidth_fraction),
        prefill_walk_token_s=model.layers * law.prefill_walk_token_s,
        layers_kernel_s=(GEMMS_PER_LAYER * model.layers + 1) * law.gemm_kernel_s + model.layers * law.layer_kernel_s,
        decode_kernel_s=model.layers * (law.decode_kernel_s + (law.decode_split_s if grouped else 0.0)),
        prefill_kernel_s=model.layers * law.prefill_kernel_s,
        **_allreduce(law, model, tp)._asdict(),
    )


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
    """On the GPU with most. With more GPUs than KV heads, each head is stored on several GPUs."""
    return model.kv_bytes_per_token * _kv_heads(model, tp) / model.kv_heads


def _kv_heads(model: Model, tp: int) -> int:
    return -(-model.kv_heads // tp)


def _gemm_io(model: Model, tp: int) -> float:
    """Values that the matrix products of one layer read and write per token."""
    attention = model.head_dim * (2 * model.heads / tp + 2 * _kv_heads(model, tp))
    return 4 * model.hidden + attention + 3 * model.intermediate / tp


def _elementwise(model: Model, tp: int) -> float:
    """Values that norms, rotary embedding and activation function of one layer read and write per token."""
    rotary = 2 * model.head_dim * (model.heads / tp + _kv_heads(model, tp))
    return _TOKEN_ELEMENTWISE * model.hidden + rotary + 3 * model.intermediate / tp
