"""Packing: what the rule says, in cases small enough to see."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.core.forecast.packing import pack


@pytest.mark.parametrize(
    ("prompts", "decode_sequences", "budget", "slots", "whole", "chunked"),
    [
        ([], 0, 10, 4, [], []),
        ([4, 4, 4], 0, 10, 4, [4, 4], [4, 4, 2]),
        ([4, 4, 4], 0, 10, 1, [4], [4]),
        ([4], 0, 10, 0, [], []),
        ([40, 1], 0, 10, 4, [40], [10]),
        ([4, 4], 6, 10, 4, [4], [4]),
        ([4, 4], 9, 10, 4, [4], [1]),
        ([4, 4], 10, 10, 4, [4], []),
        ([4, 4], 12, 10, 4, [4], []),
        ([10, 1], 0, 10, 4, [10], [10]),
        ([2, 9, 1], 0, 10, 4, [2], [2, 8]),
    ],
)
def test_cases(prompts, decode_sequences, budget, slots, whole, chunked):
    for expected, cut in ((whole, False), (chunked, True)):
        assert pack(prompts, decode_sequences, budget=budget, slots=slots, chunked=cut) == expected


@given(
    st.lists(st.integers(1, 30), max_size=8), st.integers(0, 30), st.integers(1, 30), st.integers(0, 8), st.booleans()
)
def test_is_a_prefix_within_the_budget(prompts, decode_sequences, budget, slots, chunked):
    taken = pack(iter(prompts), decode_sequences, budget=budget, slots=slots, chunked=chunked)
    room = max(0, budget - decode_sequences)
    assert len(taken) <= slots
    assert taken[:-1] == prompts[: len(taken)][:-1], "only the last one can be cut"
    assert sum(taken) <= room or (len(taken) == 1 and not chunked)
    if chunked and len(prompts) <= slots:
        assert sum(taken) == min(room, sum(prompts)), "no room is left over"
