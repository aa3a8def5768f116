"""What the operators of an iteration do, seen from outside: what binds them, and that more work never is faster."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.calibrate.fit import with_constants
from throttllem.physics.catalogue import Catalogue, Gpu
from throttllem.physics.engine import EnginePhysics
from throttllem.physics.load import load
from throttllem.physics.model import Model

CATALOGUE = Catalogue.load()
A100, H100 = (
    with_constants(CATALOGUE.gpu(name), {"power.limit_w": 1e6}) for name in ("a100-40gb-sxm", "h100-80gb-sxm")
)
PLAIN, GROUPED = CATALOGUE.model("llama-2-13b"), CATALOGUE.model("llama-3-8b")
ENGINES = [EnginePhysics(gpu, model, tp) for gpu in (A100, H100) for model in (PLAIN, GROUPED) for tp in (1, 2, 4, 8)]
engines = st.sampled_from(ENGINES)


def decode_s(engine: EnginePhysics, batch: int, context: int) -> float:
    return engine.iteration(engine.gpu.clock_max_mhz, batch, batch * context, 0, 0.0)[0]


def test_a_long_context_of_heads_not_grouped_is_walked_on_the_a100() -> None:
    engine, costs = EnginePhysics(A100, PLAIN, 4), load(A100, PLAIN, 4)
    assert decode_s(engine, 1, 4000) - decode_s(engine, 1, 3000) == pytest.approx(1000 * costs.walk_token_s, rel=1e-6)
    many = decode_s(engine, 64, 1001) - decode_s(engine, 64, 1000)
    assert many == pytest.approx(64 * costs.kv_token_s, rel=1e-6)


@pytest.mark.parametrize(("gpu", "model"), [(A100, GROUPED), (H100, PLAIN)])
def test_a_long_context_that_is_split_is_read_at_full_bandwidth(gpu: Gpu, model: Model) -> None:
    engine, costs = EnginePhysics(gpu, model, 4), load(gpu, model, 4)
    assert decode_s(engine, 1, 4000) - decode_s(engine, 1, 3000) == pytest.approx(1000 * costs.kv_token_s, rel=1e-6)


def test_waiting_for_the_walk_draws_less_than_reading() -> None:
    engine = EnginePhysics(A100, PLAIN, 8)
    walking, reading = (engine.iteration(1410, batch, batch * 4000, 0, 0.0)[1] for batch in (1, 16))
    assert walking < 0.95 * reading


@pytest.mark.parametrize("tp", [4, 8])
def test_an_all_reduce_goes_from_one_step_to_two_without_a_jump(tp: int) -> None:
    costs = load(A100, GROUPED, tp)
    rows = costs.one_step_tokens
    assert 1 < rows < costs.large_tokens
    assert costs.one_step_token_s * rows == pytest.approx(costs.two_step_s + costs.two_step_token_s * rows)
    assert costs.one_step_token_s > costs.two_step_token_s


def test_a_large_all_reduce_costs_a_library_call_more() -> None:
    costs, engine = load(A100, GROUPED, 2), EnginePhysics(A100, GROUPED, 2)
    assert costs.large_tokens == 1024
    below, at, above = (engine.iteration(1410, 0, 0, prompt, 0.0)[0] for prompt in (1023, 1024, 1025))
    assert (at - below) - (above - at) == pytest.approx(costs.large_s, rel=0.01)


@given(engines, st.integers(1, 255), st.integers(1, 8192), st.integers(1, 64))
def test_more_requests_of_the_same_length_are_never_faster(
    engine: EnginePhysics, batch: int, context: int, more: int
) -> None:
    assert decode_s(engine, batch + more, context) > decode_s(engine, batch, context)


@given(engines, st.data(), st.integers(0, 64), st.integers(1, 4096))
def test_a_longer_prompt_is_never_faster(engine: EnginePhysics, data: st.DataObject, batch: int, context: int) -> None:
    clock = data.draw(st.sampled_from(engine.gpu.clocks_mhz))
    seconds = [
        engine.iteration(clock, batch, batch * context, prompt, prompt**2 / 2)[0]
        for prompt in (0, 1, 16, 63, 64, 65, 255, 409, 410, 511, 512, 513, 819, 820, 1023, 1024, 1025, 4096, 8192)
    ]
    assert all(longer > shorter for shorter, longer in pairwise(seconds))
