"""A profile's columns as the law takes them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.calibrate.points import Point, bands, points_of, sample
from throttllem.config import BatchingOptions
from throttllem.engines.simulated.fleet import build_fleet
from throttllem.profiling.measure import ProfilePlan, profile_engine
from throttllem.profiling.profile import ProfileError

from .synthetic import CATALOGUE, LIKE, MODEL, measure

FILE = Path("p.csv")
ROW = {
    "tp": 1, "block_tokens": 16, "batch": 4, "kv_blocks": 40, "clock_mhz": 1410, "prefill_tokens": 0,
    "seconds": 0.02, "watts": 300.0,
}  # fmt: skip


def one(**changed) -> Point:
    (point,) = points_of(pl.DataFrame([ROW | changed]), MODEL, FILE)
    return point


def test_decode_alone_fills_half_of_each_last_block():
    assert one()[4:8] == (4, 40 * 16 - 4 * 15 // 2, 0, 0.0)


def test_prompts_are_the_fewest_that_the_context_allows():
    # 64 of the 68 blocks are the prompt's.
    assert one(prefill_tokens=1024, kv_blocks=68)[4:8] == (3, 4 * 16 - 3 * 15 // 2, 1024, 1024**2 / 2)
    assert one(prefill_tokens=2 * MODEL.max_context_tokens, kv_blocks=2000).decode_batch == 2


def test_a_profile_may_say_more_of_its_prompts():
    assert one(prefill_tokens=1000, kv_blocks=100, prompts=2)[4:8] == (2, 36 * 16 - 15, 1000, 250_000.0)
    assert one(prefill_tokens=1000, kv_blocks=100, prompts=2, prefill_pairs=3e5).prefill_pairs == 3e5


def test_decode_rows_read_a_token_each_at_least_and_none_reads_none():
    # Two prompts of 24 tokens would hold four of the five blocks; of 47 and 1, three.
    assert one(batch=4, prompts=2, prefill_tokens=48, kv_blocks=5).kv_tokens == 2
    assert one(batch=1, prefill_tokens=500, kv_blocks=32).kv_tokens == 0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"batch": 1, "prefill_tokens": 9000}, "p.csv, line 2: 9000 prefill_tokens are 2 prompts or more"),
        ({"prompts": 5, "prefill_tokens": 50}, "5 prompts"),
        ({"prompts": 1}, "1 prompts and 0 prefill_tokens contradict each other"),
        ({"prompts": 0, "prefill_tokens": 5}, "0 prompts and 5 prefill_tokens contradict"),
        ({"prompts": 3, "prefill_tokens": 2}, "3 prompts and 2 prefill_tokens contradict"),
        ({"kv_blocks": 3}, "3 kv_blocks for a batch of 4, and each request holds one"),
        ({"prefill_tokens": 1000, "kv_blocks": 62}, "62 kv_blocks, and 1000 prefill_tokens .* hold 63 at least"),
        ({"prefill_tokens": 1000, "kv_blocks": 65, "prompts": 1}, "65 kv_blocks, .* hold 66 at least"),
        ({"prefill_tokens": 600, "prefill_pairs": 40_000.0}, "40000 prefill_pairs, .* 45000 to "),
        ({"prefill_tokens": 600, "prompts": 2, "prefill_pairs": 88_000.0}, "88000 prefill_pairs, .* 90000 to "),
        (
            {"prefill_tokens": 600, "prompts": 1, "kv_blocks": 42, "prefill_pairs": 250_000.0},
            "250000 prefill_pairs, .* have 180000 to 221400",
        ),
        ({"prefill_pairs": 9.0}, "9 prefill_pairs, and 0 prefill_tokens .* have 0 to 0"),
        ({"batch": 2**53, "kv_blocks": 7}, r"7 kv_blocks for a batch of 9.0072e\+15,"),
    ],
)
def test_impossible_prompts_are_refused(changed, words):
    with pytest.raises(ProfileError, match=words):
        one(**changed)


def test_pairs_may_be_rounded_and_of_a_later_chunk():
    whole = {"prefill_tokens": 600, "prompts": 1, "kv_blocks": 400}
    for pairs in (600 * 599 / 2, 600 * 601 / 2, 1.80e5, 600 * (5000 + 300)):
        assert one(**whole, prefill_pairs=pairs).prefill_pairs == pairs


def test_the_first_bad_row_is_named_and_all_are_counted():
    rows = [ROW, ROW | {"kv_blocks": 2}, ROW, ROW | {"kv_blocks": 1}]
    with pytest.raises(
        ProfileError, match=r"p.csv, line 3: 2 kv_blocks .*\(2 of 4 rows are impossible\): correct these"
    ):
        points_of(pl.DataFrame(rows), MODEL, FILE)


def test_what_profile_writes_is_read_as_it_was_measured():
    """The law at the point read from each row is the measurement, up to the blocks' rounding."""
    fleet = build_fleet(CATALOGUE, LIKE.name, MODEL.name, (1,), BatchingOptions())
    plan = ProfilePlan(rows=300, noise_time=0.0, noise_power=0.0)
    profile = profile_engine(fleet.physics[1], fleet.specs[1], plan)
    for point in points_of(profile, MODEL, FILE):
        assert fleet.physics[1].iteration(*point.arguments)[0] == pytest.approx(point.seconds, rel=0.01)


def test_a_sample_is_even_and_the_same_again():
    points = measure(LIKE)
    common = [point for point in points if point.batch == 4] * 20
    chosen = sample([*points, *common], 80)
    assert len(chosen) == 80 and chosen == sample([*points, *common], 80)
    # 40 clocks and batches and sizes, with and without a prompt, and batch 4 is far the most frequent.
    assert len({(point.tp, point.clock_mhz, point.batch, point.prefill_tokens > 0) for point in chosen}) >= 75
    assert sample(points, 10**6) == points


def test_few_values_are_their_own_bands():
    assert bands([5, 3, 5, 9], most=4) == {3: 0, 5: 1, 9: 2}


def test_many_values_go_with_their_neighbours():
    assert bands(list(range(10)), most=3) == {0: 0, 1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 1, 7: 2, 8: 2, 9: 2}


def test_a_value_seen_too_rarely_joins_its_neighbour():
    assert bands([1, 1, 2, 3, 3, 4], most=9, fewest=2) == {1: 0, 2: 1, 3: 1, 4: 1}


@given(st.lists(st.integers(1, 30), min_size=1), st.integers(1, 8), st.integers(1, 8))
def test_bands_are_in_order_and_large_enough(values, most, fewest):
    found = bands(values, most, fewest)
    assert set(found) == set(values)
    assert [found[value] for value in sorted(found)] == sorted(found.values())
    sizes = Counter(found[value] for value in values)
    assert set(sizes) == set(range(len(sizes))) and len(sizes) <= most
    assert min(sizes.values()) >= min(fewest, len(values))
