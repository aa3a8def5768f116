"""What an engine's prefix cache should hold, and what it reports to have had of that."""

import pytest

from throttllem.engines.prefix_cache import Prefix, PrefixCache, blocks_of

SYSTEM = list(range(40))


def blocks(*more, seed="tiny"):
    return blocks_of([*SYSTEM, *more], 4, seed)


def test_blocks_are_those_of_equal_beginnings():
    one, other = blocks(1, 2, 3, 4, 5), blocks(1, 2, 3, 4, 6)
    assert len(one) == 11 and one == other
    assert [a == b for a, b in zip(blocks(1, 2, 3, 4), blocks(9, 2, 3, 4), strict=True)] == [True] * 10 + [False]
    assert not {*blocks()} & {*blocks(seed="adapter")}
    assert blocks_of([], 4, "") == blocks_of([1, 2, 3], 4, "") == ()


def test_a_prompt_that_was_sent_is_cached_and_shared_while_it_runs():
    cache = PrefixCache(block_tokens=4, kv_blocks=100)
    assert cache.find(blocks(), 40) == Prefix()
    cache.sent(7, blocks())
    assert cache.find(blocks(), 40) == Prefix(cached_tokens=36, of=7, tokens=36)  # the last token is computed
    cache.sent(8, blocks(1, 2, 3, 4))
    assert cache.find(blocks(1, 2, 3, 4, 5), 45) == Prefix(cached_tokens=44, of=8, tokens=44)
    cache.left(8)
    assert cache.find(blocks(1, 2, 3, 4, 5), 45) == Prefix(cached_tokens=44, of=7, tokens=40)
    cache.left(7)
    assert cache.find(blocks(), 40) == Prefix(cached_tokens=36)


def test_the_least_recently_used_blocks_go_first_and_of_one_prompt_its_end():
    cache = PrefixCache(block_tokens=4, kv_blocks=12)
    cache.sent(1, blocks())
    cache.left(1)
    cache.sent(2, blocks_of(range(100, 120), 4, "tiny"))
    assert cache.find(blocks(), 40).cached_tokens == 28


@pytest.mark.parametrize("by", ["metrics", "steps", "replies"])
def test_reported_hits_scale_predictions(by):
    cache = PrefixCache(block_tokens=4, kv_blocks=100)
    if by != "replies":
        cache.reported(5000)
    for request_id in range(200):
        cache.sent(request_id, blocks())
        if by == "steps":
            cache.looked_up(20)
        if by != "replies":
            cache.reported(5000 + 20 * request_id)
        cache.served(request_id, 20)
        cache.left(request_id)
    assert cache.find(blocks(), 40).cached_tokens == pytest.approx(20, abs=4)
    for odd in (0, float("inf"), float("nan"), float("inf")):  # a counter that began again, and what is no count
        cache.reported(odd)
    assert cache.find(blocks(), 40).cached_tokens == pytest.approx(20, abs=4)
