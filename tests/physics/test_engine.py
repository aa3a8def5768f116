from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.physics.catalogue import Catalogue, Gpu
from throttllem.physics.clock import clock_scale
from throttllem.physics.engine import EnginePhysics, ModelDoesNotFit
from throttllem.physics.load import load

CATALOGUE = Catalogue.load()
PAIRS = [
    ("a100-40gb-sxm", "llama-2-13b", 1),
    ("a100-40gb-sxm", "llama-2-13b", 4),
    ("a100-40gb-pcie", "llama-3-8b", 1),
    ("h100-80gb-sxm", "llama-3-70b", 8),
]
ENGINES = [EnginePhysics(CATALOGUE.gpu(gpu), CATALOGUE.model(model), tp) for gpu, model, tp in PAIRS]

engines = st.sampled_from(ENGINES)
batches = st.integers(1, 256)
contexts = st.integers(1, 4096)
prompts = st.integers(0, 8192)


def unlimited(gpu: Gpu) -> Gpu:
    return gpu.model_copy(update={"power": gpu.power.model_copy(update={"limit_w": 1e6})})


def test_an_iteration_by_hand() -> None:
    gpu, model = unlimited(CATALOGUE.gpu("a100-40gb-sxm")), CATALOGUE.model("llama-2-13b")
    costs, law, power = load(gpu, model, 4), gpu.time, gpu.power
    scale = clock_scale(law, power, 1005, 1410)
    memory = costs.weights_s + 108 * costs.token_gemm_memory_s
    compute = 108 * costs.token_gemm_compute_s + 9 * costs.head_token_compute_s
    gemm = ((memory * scale.memory) ** law.gemm_norm + (compute * scale.compute) ** law.gemm_norm) ** (
        1 / law.gemm_norm
    )
    rows, prompt = 108 * costs.token_elementwise_s, 100 * costs.prefill_token_s
    kv, pairs = 8000 * costs.kv_token_s + 8 * costs.kv_sequence_s, 5000 * costs.pair_s
    busy = gemm + (rows + prompt + kv) * scale.memory + (pairs + 100 * costs.prefill_walk_token_s) * scale.compute
    kernels = costs.layers_kernel_s + costs.decode_kernel_s + costs.prefill_kernel_s
    assert costs.one_step_tokens < 108 < costs.large_tokens
    fixed = (kernels + costs.allreduce_s + costs.two_step_s) * scale.latency
    walk = max(0.0, 1000 * costs.walk_token_s * scale.latency - kv * scale.memory)
    link = 108 * costs.two_step_token_s * scale.latency
    seconds = busy + fixed + walk + link + law.host_s + 8 * law.host_request_s
    traffic = (memory + rows) * law.gemm_bandwidth_fraction + kv * law.decode_bandwidth_fraction
    traffic += prompt * law.prefill_bandwidth_fraction
    switching = power.core_w * busy + power.compute_w * (compute + pairs) * scale.compute
    watts = power.idle_w + power.static_w + (power.memory_w * traffic + scale.switching * switching) / seconds
    got = EnginePhysics(gpu, model, 4).iteration(1005, 8, 8000, 100, 5000.0)
    assert got == pytest.approx((seconds, 4 * watts), rel=1e-12)


def test_decode_of_one_request_is_the_weights_read_once() -> None:
    seconds, _ = EnginePhysics(CATALOGUE.gpu("a100-40gb-sxm"), CATALOGUE.model("llama-2-13b"), 1).iteration(
        1410, 1, 1, 0, 0.0
    )
    assert 26.03e9 / 1.555e12 < seconds < 1.6 * 26.03e9 / 1.555e12


@given(engines, batches, contexts, prompts)
def test_time_falls_and_power_rises_with_the_clock(
    engine: EnginePhysics, batch: int, context: int, prompt: int
) -> None:
    points = [engine.iteration(clock, batch, batch * context, prompt, prompt**2 / 2) for clock in engine.gpu.clocks_mhz]
    for (slow_s, low_w), (fast_s, high_w) in pairwise(points):
        assert fast_s <= slow_s
        assert high_w >= low_w * (1 - 1e-12)
    assert points[-1][0] < points[0][0]
    assert points[-1][1] > points[0][1]


@given(engines, st.data(), batches, contexts, prompts, batches, st.integers(1, 10**5), st.integers(1, 2000))
def test_time_rises_with_batch_kv_and_prefill(
    engine: EnginePhysics,
    data: st.DataObject,
    batch: int,
    context: int,
    prompt: int,
    more_rows: int,
    more_kv: int,
    more_prompt: int,
) -> None:
    clock = data.draw(st.sampled_from(engine.gpu.clocks_mhz))
    kv, pairs = batch * context, prompt**2 / 2
    seconds, _ = engine.iteration(clock, batch, kv, prompt, pairs)
    assert engine.iteration(clock, batch + more_rows, kv + more_rows * context, prompt, pairs)[0] > seconds
    assert engine.iteration(clock, batch, kv + more_kv, prompt, pairs)[0] > seconds
    longer = prompt + more_prompt
    assert engine.iteration(clock, batch, kv, longer, longer**2 / 2)[0] > seconds


@given(engines, st.data(), batches, contexts, prompts)
def test_power_is_between_idle_and_limit(
    engine: EnginePhysics, data: st.DataObject, batch: int, context: int, prompt: int
) -> None:
    clock = data.draw(st.sampled_from(engine.gpu.clocks_mhz))
    _, watts = engine.iteration(clock, batch, batch * context, prompt, prompt**2 / 2)
    assert engine.idle_w() < watts <= engine.gpu.power.limit_w * engine.tp


def test_the_power_limit_lowers_the_speed_to_that_of_a_lower_clock() -> None:
    gpu, model = CATALOGUE.gpu("a100-40gb-pcie"), CATALOGUE.model("llama-3-8b")
    work = (1, 1000, 4096, 4096**2 / 2)
    free, capped = EnginePhysics(unlimited(gpu), model, 1), EnginePhysics(gpu, model, 1)
    assert free.iteration(1410, *work)[1] > gpu.power.limit_w
    seconds, watts = capped.iteration(1410, *work)
    assert watts == gpu.power.limit_w
    assert seconds > free.iteration(1410, *work)[0]
    held = max(clock for clock in gpu.clocks_mhz if free.iteration(clock, *work)[1] <= watts)
    assert free.iteration(held + 15, *work)[0] <= seconds <= free.iteration(held, *work)[0]
    assert capped.iteration(held + 30, *work) == (seconds, watts)


def test_a_limit_below_the_lowest_clock_runs_there() -> None:
    gpu = CATALOGUE.gpu("a100-40gb-pcie")
    tight = gpu.model_copy(update={"power": gpu.power.model_copy(update={"limit_w": 50.0})})
    model = CATALOGUE.model("llama-3-8b")
    work = (64, 64_000, 0, 0.0)
    assert EnginePhysics(tight, model, 1).iteration(1410, *work) == EnginePhysics(gpu, model, 1).iteration(210, *work)


def test_clock_off_the_grid_lies_between_its_neighbours_and_outside_is_refused() -> None:
    engine = ENGINES[1]
    fast, between, slow = (engine.iteration(clock, 8, 8000, 0, 0.0)[0] for clock in (1020, 1010.5, 1005))
    assert fast < between < slow
    for clock in (0, 209, 1411):
        with pytest.raises(ValueError, match=f"clock {clock} MHz: a100-40gb-sxm runs at 210 to 1410 MHz"):
            engine.iteration(clock, 1, 1, 0, 0.0)


def test_totals_are_of_all_gpus() -> None:
    engine = ENGINES[1]
    assert engine.idle_w() == 4 * engine.gpu.power.idle_w
    assert engine.startup_w == 4 * engine.gpu.startup_w
    assert engine.startup_s > 20


def test_kv_capacity_by_hand() -> None:
    gpu, model = CATALOGUE.gpu("a100-40gb-sxm"), CATALOGUE.model("llama-2-13b")
    free = 42.5e9 * 0.9 - 1e9 - model.weight_bytes / 4
    assert EnginePhysics(gpu, model, 4).kv_capacity_tokens() == int(free // (model.kv_bytes_per_token / 4))


def test_a_model_that_does_not_fit_names_the_smallest_size_that_does() -> None:
    gpu, model = CATALOGUE.gpu("a100-40gb-sxm"), CATALOGUE.model("llama-3-70b")
    with pytest.raises(
        ModelDoesNotFit, match=r"needs 66\.6 GiB .* 35\.6 GiB .* are there: the smallest tp that fits is 4"
    ):
        EnginePhysics(gpu, model, 2)
    assert EnginePhysics(gpu, model, 4).kv_capacity_tokens() >= 1
    huge = model.model_copy(update={"layers": 400})
    with pytest.raises(ModelDoesNotFit, match="no tp up to 8 fits"):
        EnginePhysics(gpu, huge, 8)


@pytest.mark.parametrize("tp", [0, 3, -1])
def test_a_tp_that_cannot_share_the_heads(tp: int) -> None:
    with pytest.raises(ModelDoesNotFit, match=rf"40 heads, which {tp} GPUs cannot share; tp may be \[1, 2, 4, 5, 8\]"):
        EnginePhysics(CATALOGUE.gpu("a100-40gb-sxm"), CATALOGUE.model("llama-2-13b"), tp)


def test_an_a100_sxm_draws_what_a_real_one_drew() -> None:
    """One served run with a power log (docs/physics.md): 280 W at one request, 293 W at a few to ten."""
    engine = EnginePhysics(CATALOGUE.gpu("a100-80gb-sxm"), CATALOGUE.model("qwen3-8b"), 1)
    assert engine.idle_w() == pytest.approx(82.8, rel=0.08)
    assert engine.iteration(1410, 1, 440, 0, 0.0)[1] == pytest.approx(280, rel=0.08)
    assert engine.iteration(1410, 6, 6 * 440, 0, 0.0)[1] == pytest.approx(293, rel=0.08)
    assert engine.iteration(210, 1, 440, 0, 0.0)[1] < 140
