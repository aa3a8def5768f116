"""The batcher on cases small enough to count by hand: blocks of 4 tokens, a sequence in its start iteration holds its
prompt, and one token more in each iteration after it.
"""

import pytest
from core.effort import lines_executed
from core.toy import spec

from throttllem.engines.simulated.batcher import Batcher


def batcher_of(*requests, **changes):
    """A batcher with (prompt, answer) or (prompt, answer, max_tokens) waiting, numbered from 0."""
    batcher = Batcher(spec(**changes))
    for key, (prompt, answer, *limit) in enumerate(requests):
        add(batcher, key, prompt, answer, *limit)
    return batcher


def add(batcher, key, prompt, answer, limit=None):
    batcher.add(key, prompt_tokens=prompt, output_tokens=answer, max_tokens=limit or answer)


def run(batcher, iterations=1000):
    """[(iteration, outcome)] until the batcher is empty."""
    log = []
    while len(log) < iterations and (iteration := batcher.begin()) is not None:
        log.append((iteration, batcher.end()))
    return log


def blocks(log):
    return [iteration.kv_blocks for iteration, _ in log]


def test_a_single_request_grows_block_by_block():
    log = run(batcher_of((5, 6)))
    # Tokens held: 5 (the prompt), 6, 7, 8, 9, 10 -> ceil(/4).
    assert blocks(log) == [2, 2, 2, 2, 3, 3]
    # The prompt is read by its own prefill, not by a decoding sequence.
    assert [iteration.kv_tokens for iteration, _ in log] == [0, 6, 7, 8, 9, 10]
    assert [iteration.decode_sequences for iteration, _ in log] == [0, 1, 1, 1, 1, 1]
    assert [iteration.prefills for iteration, _ in log] == [((0, 5),), (), (), (), (), ()]
    assert [outcome.started for _, outcome in log] == [(0,), (), (), (), (), ()]
    assert [outcome.finished for _, outcome in log] == [(), (), (), (), (), (0,)]
    assert [outcome.index for _, outcome in log] == list(range(6))


def test_a_one_token_answer_starts_and_finishes_at_once():
    batcher = batcher_of((8, 1))
    ((iteration, outcome),) = run(batcher)
    assert (iteration.kv_blocks, outcome.started, outcome.finished) == (2, (0,), (0,))
    assert (batcher.used_blocks, len(batcher), batcher.begin()) == (0, 0, None)


def test_whole_prompts_go_while_they_fit_the_budget():
    log = run(batcher_of((20, 3), (20, 3), (40, 2), prefill_budget_tokens=32))
    # 0: 20, and 20 more would be above 32.  1: one sequence decodes, 31 are left: 20.
    # 2: two sequences decode, 40 fits no budget at all: the first prompt goes anyway.
    assert [iteration.prefills for iteration, _ in log] == [((0, 20),), ((1, 20),), ((2, 40),), ()]
    assert [iteration.prefill_pairs for iteration, _ in log] == [200, 200, 800, 0]
    assert [iteration.batch for iteration, _ in log] == [1, 2, 3, 2]


def test_chunked_prompts_fill_the_budget():
    log = run(batcher_of((20, 3), (20, 3), (40, 2), prefill_budget_tokens=32, chunked=True), 4)
    # 0: 20 + 12.  1: one sequence decodes, 31 left: the other 8, and 23 of 40.  2: two sequences decode, 30
    # left: the other 17.
    assert [iteration.prefills for iteration, _ in log] == [((0, 20), (1, 12)), ((1, 8), (2, 23)), ((2, 17),), ()]
    # A chunk attends to what came before it and half of itself: 20*10 + 12*6; 8*(12+4) + 23*11.5; 17*(23+8.5).
    assert [iteration.prefill_pairs for iteration, _ in log] == [272, 392.5, 535.5, 0]
    # A prompt holds all its blocks from its first chunk on: 5 + 5; 21 tokens 6 + 5 + 10; 22 and 21 tokens 6 + 6 + 10.
    assert blocks(log)[:3] == [10, 21, 22]
    assert [outcome.started for _, outcome in log] == [(0,), (1,), (2,), ()]


def test_decoding_sequences_use_the_budget():
    log = run(batcher_of((1, 9), (1, 9), (9, 1), prefill_budget_tokens=3, chunked=True))
    # 0: 1 + 1 + the first of 9.  From 1 on two sequences decode and one token is left for the prompt.
    assert [iteration.prefill_tokens for iteration, _ in log] == [3, 1, 1, 1, 1, 1, 1, 1, 1]
    assert log[-1][1].finished == (0, 1, 2)


def test_the_batch_is_never_above_its_maximum():
    log = run(batcher_of((4, 3), (4, 2), (4, 1), (4, 1), max_batch=2))
    # 0 and 1 take both places; 1 leaves after iteration 1, 0 after iteration 2.
    assert [outcome.started for _, outcome in log] == [(0, 1), (), (2,), (3,)]
    assert [iteration.batch for iteration, _ in log] == [2, 2, 2, 1]


def test_no_evict_reserves_for_the_longest_answer():
    log = run(batcher_of((4, 3, 16), (4, 4, 16), (4, 1, 16), kv_blocks=12, no_evict=True))
    # Each reserves ceil((4 + 16) / 4) = 5 of 12 blocks: the third waits until the first is gone, though few are used.
    assert [outcome.started for _, outcome in log] == [(0, 1), (), (), (2,)]
    assert blocks(log) == [2, 4, 4, 3]
    assert all(outcome.preempted == () for _, outcome in log)


def test_preemption_takes_the_latest_and_recomputes_it():
    batcher = batcher_of((4, 8), (4, 8), kv_blocks=4, no_evict=False)
    log = run(batcher)
    # Tokens held by each: 4, 5..8 -> 1 + 1, then 2 + 2 blocks. In iteration 5 both need a third and none is free:
    # sequence 1 goes (5 tokens generated), sequence 0 takes one. Row 1 needs ceil(9 / 4) = 3, so it waits for
    # sequence 0's end (7).
    assert blocks(log) == [2, 4, 4, 4, 4, 3, 3, 3, 3, 3, 3]
    assert [iteration.preempted for iteration, _ in log][5] == log[5][1].preempted == (1,)
    # The prompt and the 5 tokens are computed again; 3 of 8 tokens were left: iterations 8, 9, 10.
    assert log[8][0].prefills == ((1, 9),)
    assert [(o.index, o.started) for _, o in log if o.started] == [(0, (0, 1)), (8, (1,))]
    assert [(o.index, o.finished) for _, o in log if o.finished] == [(7, (0,)), (10, (1,))]
    assert batcher.preemptions == 1


def test_preempted_sequences_go_first_and_no_other_joins_with_them():
    batcher = batcher_of((4, 8), (4, 8), (1, 1), kv_blocks=5, max_batch=2, no_evict=False)
    log = run(batcher, 5)
    assert blocks(log) == [2, 4, 4, 4, 4]
    # Iteration 5: 4 + 2 blocks are needed, 5 are free: sequence 1 goes. Request 2 would fit (1 block), but not now.
    # Iteration 6: sequence 1 is first in the queue and needs 3 of the 2 free blocks: request 2 must not overtake it.
    log = run(batcher)
    assert [iteration.index for iteration, _ in log if iteration.preempted] == [5]
    assert [(o.index, o.started) for _, o in log if o.started] == [(8, (1, 2))]


def test_as_many_are_preempted_as_needed():
    batcher = batcher_of((4, 9), (4, 9), kv_blocks=6, no_evict=False)
    log = run(batcher, 4)
    add(batcher, 2, 1, 9)
    add(batcher, 3, 1, 9)
    log += run(batcher, 2)
    # Iteration 4: 2 + 2 + 1 + 1 blocks, all 6. In 5 sequences 0 and 1 need one more each: sequence 3 frees
    # one, sequence 2 another.
    assert (blocks(log), log[5][0].preempted) == ([2, 4, 4, 4, 6, 6], (3, 2))
    # Rows 0 and 1 end in iteration 8; then 2 comes back before 3, with the one token that each had as prompt.
    log = run(batcher)
    assert (log[3][1].index, log[3][0].prefills, log[3][1].started) == (9, ((2, 2), (3, 2)), (2, 3))
    assert log[-1][1].finished == (2, 3) and log[-1][1].index == 9 + 7


def test_a_prompt_in_prefill_is_preempted_before_any_decoding_sequence():
    batcher = batcher_of((3, 7), kv_blocks=5, prefill_budget_tokens=3, chunked=True, no_evict=False)
    log = run(batcher, 1)
    add(batcher, 1, 12, 1)
    log += run(batcher)
    # Row 0 holds 3, 4, 5.. tokens: 1, 1, 2 blocks; prompt 1 takes 3 blocks and 2 tokens of budget in iterations 1-5.
    # In iteration 6 (9 tokens) sequence 0 needs the sixth of 5 blocks: the prompt frees its 3 and begins again.
    assert blocks(log) == [1, 4, 5, 5, 5, 5, 3, 3, 3, 3, 3]
    assert [iteration.prefill_tokens for iteration, _ in log] == [3, 2, 2, 2, 2, 2, 0, 3, 3, 3, 3]
    assert log[6][0].preempted == (1,)
    assert [(o.index, o.finished) for _, o in log if o.finished] == [(6, (0,)), (10, (1,))]


def test_cancel_while_waiting_running_and_unknown():
    batcher = batcher_of((4, 9, 20), (4, 9, 20), (4, 9, 20), max_batch=2)
    run(batcher, 3)
    assert (batcher.used_blocks, batcher.waiting) == (4, 1)
    batcher.cancel(2)
    assert (batcher.used_blocks, batcher.waiting, len(batcher)) == (4, 0, 2)
    batcher.cancel(0)
    # Row 1 alone: 6 tokens in iteration 2.
    assert (batcher.used_blocks, len(batcher)) == (2, 1)
    with pytest.raises(KeyError):
        batcher.cancel(0)
    log = run(batcher)
    assert [outcome.finished for _, outcome in log][-1] == (1,)
    assert batcher.used_blocks == 0


def test_cancel_of_a_prompt_under_way_gives_back_all_it_held():
    batcher = batcher_of((12, 4, 20), prefill_budget_tokens=8, chunked=True, no_evict=True, kv_blocks=8)
    run(batcher, 1)
    assert batcher.used_blocks == 3
    batcher.cancel(0)
    assert (batcher.used_blocks, len(batcher), batcher.begin()) == (0, 0, None)
    # Its reservation of all 8 blocks is gone as well: another of that size starts.
    add(batcher, 1, 12, 1, 20)
    assert [outcome.started for _, outcome in run(batcher)] == [(), (1,)]


def test_cancel_of_a_preempted_sequence():
    batcher = batcher_of((4, 8), (4, 8), kv_blocks=4, no_evict=False)
    run(batcher, 6)
    batcher.cancel(1)
    assert [outcome.finished for _, outcome in run(batcher)] == [(), (0,)]


@pytest.mark.parametrize(
    ("prompt", "answer", "limit", "words"),
    [
        (200, 1, 57, "can never fit"),  # 257 tokens, 256 of context
        (100, 1, 29, "can never fit"),  # 33 blocks of 32
        (0, 1, 1, "at least 1"),
        (1, 0, 1, "at least 1"),
        (1, 3, 2, "at most max_tokens"),
    ],
)
def test_what_can_never_fit_is_refused(prompt, answer, limit, words):
    batcher = Batcher(spec(kv_blocks=64 if prompt == 200 else 32))
    with pytest.raises(ValueError, match=words) as refusal:
        batcher.add(7, prompt_tokens=prompt, output_tokens=answer, max_tokens=limit)
    assert "request 7" in str(refusal.value)
    assert len(batcher) == 0


def test_what_just_fits_is_served():
    log = run(batcher_of((100, 28), kv_blocks=32, max_context_tokens=128))
    assert log[-1][1].finished == (0,)
    # The last token's own keys and values are never written: 100 + 27 tokens.
    assert log[-1][0].kv_blocks == 32


@pytest.mark.parametrize("no_evict", [True, False])
def test_an_iteration_is_o1_while_the_batch_is_unchanged(no_evict):
    def lines(sequences):
        batcher = batcher_of(
            *[(1 + key % 7, 90) for key in range(sequences)],
            kv_blocks=100_000,
            max_batch=1000,
            prefill_budget_tokens=100_000,
            no_evict=no_evict,
        )
        run(batcher, 5)
        return [lines_executed(lambda: (batcher.begin(), batcher.end())) for _ in range(12)]

    assert lines(400) == lines(4)
