"""Blocks of prompts with a common beginning are counted once, whoever leaves first."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.core.toy import spec
from throttllem.core.forecast.projection import project
from throttllem.core.scoreboard import Scoreboard, SequenceState
from throttllem.core.shared_blocks import SharedBlocks, saved_blocks
from throttllem.core.types import Request, Slo

prompts = st.lists(st.lists(st.integers(0, 1), max_size=5), min_size=1, max_size=8)


def common(one, other):
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def union(blocks):
    """Different blocks: a block is all that leads to it."""
    return len({tuple(prompt[: n + 1]) for prompt in blocks for n in range(len(prompt))})


def linked(found):
    """Each prompt, in order, linked with that before it which has most in common with it."""
    shared = SharedBlocks()
    for key, prompt in enumerate(found):
        most = max(range(key), key=lambda other: common(prompt, found[other]), default=None)
        if most is not None and common(prompt, found[most]):
            shared.link(key, most, common(prompt, found[most]))
    return shared


@given(prompts, st.randoms(use_true_random=False))
def test_whoever_leaves_what_is_left_counts_once(found, random):
    shared, there = linked(found), dict(enumerate(found))
    while there:
        held = sum(map(len, there.values()))
        assert held - sum(shared.saved(there)) == union(there.values())
        gone = random.choice(list(there))
        shared.remove(gone)
        del there[gone]
    assert shared.links() == ()


@given(prompts, st.lists(st.integers(1, 9), min_size=8, max_size=8))
def test_a_projection_counts_them_once_at_every_offset(found, ends):
    end = np.array(ends[: len(found)])
    places = {key: key for key in range(len(found))}
    saved = saved_blocks(linked(found).links(), {}, places, np.zeros(end.size, dtype=np.int64), end)
    for offset, blocks in enumerate(saved):
        there = [prompt for prompt, until in zip(found, end, strict=True) if until > offset]
        assert sum(map(len, there)) - blocks == union(there)


def test_no_block_is_saved_before_both_hold_it():
    saved = saved_blocks([(1, 2, 3)], {2: 5}, {1: 0, 2: 1}, np.array([0, 2]), np.array([4, 6]))
    assert saved.tolist() == [0, 0, 8, 8, 5, 5]
    assert saved_blocks([(1, 2, 3)], {}, {1: 0, 2: 1}, np.array([0, 4]), np.array([3, 6])).tolist() == [0] * 6


def asked(key, prompt_tokens=40, **more):
    request = Request(id=key, arrival_s=0.0, prompt_tokens=prompt_tokens, max_tokens=8, slo=Slo(), **more)
    return SequenceState(request=request, predicted_tokens=8, output_tokens=8)


def test_the_scoreboard_and_the_projection_know_what_is_shared_and_what_is_computed():
    """Blocks of 4: 40 tokens are 10 blocks, and each output one more in its first four iterations."""
    engine, board = spec(kv_blocks=100, block_tokens=4, max_batch=8, prefill_budget_tokens=100), Scoreboard(4)
    board.dispatch(asked(1))
    board.begin(1, 0, 0.0)
    board.dispatch(asked(2, prefix_of=1, prefix_tokens=36, cached_prompt_tokens=36))
    ahead = project(board, engine, first=1)
    assert (ahead.kv_blocks[:2].tolist(), int(ahead.prefill_tokens[0])) == ([12, 13], 4)
    virtually = asked(3, sequences=4, common_prompt_tokens=40, prefix_of=2, prefix_tokens=20)
    ahead = project(board, engine, first=1, extra=virtually)
    assert (int(ahead.kv_blocks[0]), int(ahead.prefill_tokens[0])) == (12 + 10 - 5, 4 + 40 + 3)
    board.begin(2, 1, 0.0)
    assert (board.kv_blocks(1), board.own(1).kv_blocks) == (11 + 10 - 9,) * 2
    board.remove(1)
    assert board.kv_blocks(2) == 11 and board.shared.links() == ()
    again = Scoreboard.from_state(board.state())
    assert again.kv_blocks(2) == 11


def test_a_request_on_an_engine_that_caches_nothing_computes_every_prompt():
    assert asked(1, 40, sequences=6, prompts=2).request.computed_prompt_tokens == 240
    assert (
        asked(1, 40, sequences=6, prompts=2, common_prompt_tokens=36).request.computed_prompt_tokens == 2 * 40 + 4 * 4
    )
    cached = asked(1, 40, sequences=2, cached_prompt_tokens=36, common_prompt_tokens=36)
    assert cached.request.computed_prompt_tokens == 8
