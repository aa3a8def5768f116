"""Every point of a live profile fits the engine, coarse points come first, and none comes twice."""

from dataclasses import replace

import pytest
from engines.live import spec
from hypothesis import given, settings
from hypothesis import strategies as st

from throttllem.profiling.live.plan import QUICK_FULL_TOKENS, LivePlan, live_points, quick_plan
from throttllem.profiling.measure import blocks

ENGINES = st.builds(
    spec,
    max_batch=st.integers(1, 300),
    kv_blocks=st.integers(8, 5000),
    block_tokens=st.sampled_from([1, 16, 64, 128]),
    max_context_tokens=st.integers(600, 9000),
    prefill_budget_tokens=st.integers(320, 9000),
)


PLANS = st.one_of(st.builds(LivePlan, steps=st.integers(1, 12), bursts=st.integers(0, 6)), st.just(quick_plan()))


@settings(max_examples=60, deadline=None)
@given(engine=ENGINES, plan=PLANS)
def test_every_point_fits_the_engine(engine, plan):
    try:
        points = live_points(engine, plan)
    except ValueError as error:
        assert "too small to be profiled" in str(error)
        return
    for point in points:
        assert point.batch <= engine.max_batch
        each = point.context_tokens + point.output_tokens
        assert each <= engine.max_context_tokens
        held = point.batch * blocks(each, engine)
        for burst in point.bursts:
            own = burst.tokens + (1 if point.batch else point.output_tokens)
            assert burst.tokens >= 1
            assert own <= engine.max_context_tokens
            assert point.batch + burst.count <= engine.max_batch
            assert point.batch + burst.count * burst.tokens <= engine.prefill_budget_tokens
            assert held + burst.count * blocks(own, engine) <= engine.kv_blocks


def test_corners_first_and_nothing_twice():
    engine = spec(max_batch=64, kv_blocks=4000, prefill_budget_tokens=2048)
    points = live_points(engine, LivePlan(points=10**6))
    assert [point.batch for point in points[:5]] == [1, 1, 64, 64, 0]
    assert points[4].bursts[-1].tokens == 2048
    assert points[0].bursts[0].count * points[0].bursts[0].tokens >= 2046
    assert points[3].context_tokens * 64 > 0.75 * 4000 * 16
    shapes = [(point.batch, point.context_tokens) for point in points if point.batch]
    assert len(set(shapes)) > 0.95 * len(shapes)
    assert [point.number for point in points] == list(range(len(points)))
    assert points[:60] == live_points(engine, LivePlan())
    assert len(live_points(engine, LivePlan(points=9))) == 9
    assert len(live_points(replace(engine, max_batch=1), LivePlan(points=10**6))) < 100


def test_a_quick_plan_is_a_few_batches_of_few_tokens():
    engine = spec(max_batch=256, kv_blocks=30_000, max_context_tokens=8192, prefill_budget_tokens=8192)
    points = live_points(engine, quick_plan())
    assert len(points) <= 10 and [point.batch for point in points[:2]] == [1, 256]
    assert len({point.batch for point in points}) == 4
    assert max(point.batch * point.context_tokens for point in points) <= QUICK_FULL_TOKENS
    assert quick_plan().seconds < 600 and quick_plan(60.0).seconds == 60.0


def test_an_engine_too_small_for_anything():
    with pytest.raises(ValueError, match="too small to be profiled"):
        live_points(spec(kv_blocks=1, block_tokens=4, max_context_tokens=4), LivePlan())


@pytest.mark.parametrize("bad", [{"points": None}, {"points": 0}, {"seconds": 0.0}, {"steps": 0}, {"bursts": -1}])
def test_a_plan_needs_an_end_and_something_to_do(bad):
    with pytest.raises(ValueError, match=r"must be|needs an end"):
        LivePlan(**bad)
