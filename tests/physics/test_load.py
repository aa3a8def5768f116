import pytest

from throttllem.physics.catalogue import Catalogue, Gpu
from throttllem.physics.engine import EnginePhysics
from throttllem.physics.load import LARGE_ALLREDUCE_BYTES, kv_bytes_per_token, load
from throttllem.physics.model import Experts, Latent, Model, Weights, Window

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
    "fp8_bandwidth_fraction": 0.25,
    "fp8_peak_fraction": 0.5,
    "fp8_kernel_s": 9e-6,
    "int4_bandwidth_fraction": 0.125,
    "expert_bandwidth_fraction": 1.0,
    "expert_peak_fraction": 0.125,
    "expert_kernel_s": 8e-6,
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


MOE = TINY.model_copy(update={"experts": Experts(count=8, active=2, intermediate=4, dense_layers=1)})


def test_experts_are_read_by_the_share_that_a_batch_reaches() -> None:
    costs, one = load(ROUND_GPU, MOE, 1), 3 * 8 * 4
    assert costs.experts_s == pytest.approx(8 * one * 2 / 2e6)  # of the one layer that has them
    assert costs.expert_missed == pytest.approx(6 / 8)
    assert costs.token_expert_compute_s == pytest.approx(2 * one * 2 / 0.5e6)
    assert costs.experts_kernel_s == pytest.approx(8e-6)
    dense = load(ROUND_GPU, TINY, 1)
    assert costs.weights_s == pytest.approx(dense.weights_s - 3 * 8 * 16 * 2 / 1e6)
    assert costs.layers_kernel_s == pytest.approx(dense.layers_kernel_s - 2 * 1e-6)
    assert dense.experts_s == dense.token_expert_memory_s == 0
    shared = MOE.model_copy(update={"experts": MOE.experts.model_copy(update={"shared_intermediate": 5})})
    assert load(ROUND_GPU, shared, 1).weights_s - costs.weights_s == pytest.approx(3 * 8 * 5 * 2 / 1e6)
    assert load(ROUND_GPU, MOE, 2).experts_s == pytest.approx(costs.experts_s / 2)


@pytest.mark.parametrize(
    ("weights", "fp8", "layer_s", "compute_s", "kernel_s"),
    [
        (Weights.FP8, 8e6, 2 * LAYER / 0.5e6, 2 * 2 * LAYER / 4e6, 9e-6),
        (Weights.FP8, None, 2 * LAYER / 0.5e6, 2 * 2 * LAYER / 2e6, 1e-6),  # unpacked: no FP8 tensor cores
        (Weights.INT4, 8e6, 2 * LAYER * Weights.INT4.bytes_per_parameter / 0.25e6, 2 * 2 * LAYER / 2e6, 1e-6),
    ],
)
def test_quantised_weights_are_fewer_bytes_and_perhaps_faster_arithmetic(
    weights: Weights, fp8: float | None, layer_s: float, compute_s: float, kernel_s: float
) -> None:
    gpu, model = ROUND_GPU.model_copy(update={"peak_fp8_flop_per_s": fp8}), TINY.model_copy(update={"weights": weights})
    costs = load(gpu, model, 1)
    assert costs.weights_s == pytest.approx(layer_s + 800 * 2 / 1e6)  # the head is not quantised
    assert costs.token_gemm_compute_s == pytest.approx(compute_s)
    assert costs.layers_kernel_s == pytest.approx(4 * 2 * kernel_s + 1e-6 + 2 * 3e-6)


def test_a_window_bounds_what_its_layers_read() -> None:
    model = TINY.model_copy(update={"window": Window(tokens=8, layers=1)})
    engine, plain = EnginePhysics(PLAIN, model, 1), EnginePhysics(PLAIN, TINY, 1)
    assert engine.iteration(1410, 4, 4 * 8, 0, 0.0) == pytest.approx(plain.iteration(1410, 4, 4 * 8, 0, 0.0))
    grown, whole = (each.iteration(1410, 4, 10**12, 0, 0.0)[0] for each in (engine, plain))
    assert grown == pytest.approx(whole / 2, rel=0.01)
    assert engine.iteration(1410, 0, 0, 10**4, 1e14)[0] == pytest.approx(
        plain.iteration(1410, 0, 0, 10**4, 1e14)[0] / 2, rel=0.01
    )


def test_a_latent_vector_is_read_whole_by_every_gpu() -> None:
    latent = Latent(kv_rank=6, rotary=2, key=4, value=4)
    model = TINY.model_copy(update={"kv_heads": 4, "head_dim": 6, "latent": latent})
    assert kv_bytes_per_token(model, 1) == kv_bytes_per_token(model, 4) == 2 * (6 + 2) * 2
    cheap = ROUND_GPU.model_copy(update={"peak_flop_per_s": 1e12})
    read_s = 2 * 8 * 2 / 1e6
    assert load(cheap, model, 1).kv_token_s == load(cheap, model, 2).kv_token_s == pytest.approx(read_s)
    computed_s = 2 * 2 * 4 * (2 * 6 + 2) / 1e6
    assert load(ROUND_GPU, model, 1).kv_token_s == pytest.approx(computed_s)
    assert load(cheap, model, 1).walk_token_s == 0
