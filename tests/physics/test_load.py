import pytest

from throttllem.physics.catalogue import Catalogue, Gpu
from throttllem.physics.load import LARGE_ALLREDUCE_BYTES, kv_bytes_per_token, load
from throttllem.physics.model import Model

CATALOGUE = Catalogue.load()
PLAIN = CATALOGUE.gpu("a100-40gb-sxm")
ROUND_LAW = {
    "gemm_bandwidth_fraction": 0.5,
    "gemm_peak_fraction": 0.5,
    "gemm_kernel_s": 1e-6,
    "decode_bandwidth_fraction": 0.5,
    "decode_kernel_s": 2e-6,
    "decode_row_s": 5e-9,
    "decode_split_s": 7e-6,
    "decode_walk_token_s": 2e-8,
    "prefill_peak_fraction": 0.25,
    "prefill_bandwidth_fraction": 0.25,
    "prefill_walk_token_s": 1e-8,
    "layer_kernel_s": 3e-6,
    "allreduce_s": 4e-6,
    "allreduce_gpu_s": 1e-6,
    "allreduce_step_s": 6e-6,
    "allreduce_large_s": 3e-5,
    "allreduce_bytes_per_s": 1e6,
}
ROUND_GPU: Gpu = PLAIN.model_copy(
    update={
        "bandwidth_bytes_per_s": 2e6,
        "peak_flop_per_s": 4e6,
        "time": PLAIN.time.model_copy(update=ROUND_LAW),
    }
)
TINY = Model(
    name="tiny",
    layers=2,
    hidden=8,
    heads=4,
    kv_heads=2,
    head_dim=2,
    intermediate=16,
    vocabulary=100,
    max_context_tokens=64,
)
LAYER = 8 * 2 * 2 * (4 + 2) + 3 * 8 * 16  # 192 + 384 = 576 parameters


def test_one_gpu_by_hand() -> None:
    costs = load(ROUND_GPU, TINY, 1)
    assert costs.weights_s == pytest.approx((2 * LAYER + 800) * 2 / 1e6)
    assert costs.token_gemm_compute_s == pytest.approx(2 * 2 * LAYER / 2e6)
    assert costs.head_token_compute_s == pytest.approx(2 * 800 / 2e6)
    assert costs.token_gemm_memory_s == pytest.approx(2 * (4 * 8 + 2 * (2 * 4 + 2 * 2) + 3 * 16) * 2 / 1e6)
    assert costs.token_elementwise_s == pytest.approx(2 * (8 * 8 + 2 * 2 * (4 + 2) + 3 * 16) * 2 / 1e6)
    assert costs.kv_token_s == pytest.approx(2 * 2 * 2 * 2 * 2 / 1e6)
    assert costs.pair_s == pytest.approx(2 * 4 * 4 * 2 / 1e6)
    assert costs.prefill_token_s == pytest.approx(2 * 2 * (4 + 2) * 2 * 2 / 0.5e6)
    assert costs.layers_kernel_s == pytest.approx((4 * 2 + 1) * 1e-6 + 2 * 3e-6)
    assert costs.kv_sequence_s == pytest.approx(2 * 2 * 5e-9)
    assert costs.prefill_walk_token_s == pytest.approx(2 * 1e-8)
    assert costs.decode_kernel_s == pytest.approx(2 * (2e-6 + 7e-6))
    assert costs.walk_token_s == 0
    assert costs.allreduce_s == costs.two_step_s == costs.large_s == 0
    assert costs.two_step_token_s == costs.one_step_token_s == 0


def test_heads_that_are_not_grouped_are_walked_and_not_split() -> None:
    costs = load(ROUND_GPU, TINY.model_copy(update={"kv_heads": 4}), 1)
    assert costs.decode_kernel_s == pytest.approx(2 * 2e-6)
    assert costs.walk_token_s == pytest.approx(2 * 2e-8)


def test_two_gpus_share_the_work_and_talk() -> None:
    one, two = load(ROUND_GPU, TINY, 1), load(ROUND_GPU, TINY, 2)
    for name in (
        "weights_s",
        "token_gemm_compute_s",
        "head_token_compute_s",
        "kv_token_s",
        "pair_s",
        "prefill_token_s",
    ):
        assert getattr(two, name) == pytest.approx(getattr(one, name) / 2), name
    assert two.layers_kernel_s == one.layers_kernel_s
    assert two.allreduce_s == pytest.approx(2 * 2 * (4e-6 + 2 * 1e-6))
    assert two.two_step_token_s == two.one_step_token_s == pytest.approx(2 * 2 * (2 * 1 / 2) * 8 * 2 / 1e6)
    assert two.two_step_s == two.one_step_tokens == 0


def test_four_gpus_talk_in_one_step_or_in_two() -> None:
    costs, message_s = load(ROUND_GPU, TINY, 4), 2 * 2 * 8 * 2 / 1e6
    assert costs.one_step_token_s == pytest.approx(3 * message_s)
    assert costs.two_step_token_s == pytest.approx(1.5 * message_s)
    assert costs.two_step_s == pytest.approx(2 * 2 * 6e-6)
    one, two = costs.one_step_token_s * costs.one_step_tokens, costs.two_step_token_s * costs.one_step_tokens
    assert one == pytest.approx(costs.two_step_s + two)
    assert costs.large_tokens == LARGE_ALLREDUCE_BYTES / (8 * 2)
    assert costs.large_s == pytest.approx(2 * 2 * (6e-6 + 3e-5))


def test_kv_heads_are_stored_twice_if_there_are_too_few() -> None:
    whole = TINY.kv_bytes_per_token
    assert kv_bytes_per_token(TINY, 2) == whole / 2
    assert kv_bytes_per_token(TINY, 4) == whole / 2
