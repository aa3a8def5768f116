"""The projection against a naive loop over rows and iterations, and against what the batcher then does."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from core.toy import SPEC, row, spec
from throttllem.core.projection import project
from throttllem.core.scoreboard import Scoreboard
from throttllem.engine.batcher import Batcher

FIRST = 100


def naive_packing(left, decode_rows, spec, slots):
    """The packing rule in words: whole prompts while they fit, the first always; chunked, whatever room is left."""
    room, taken = max(spec.prefill_budget_tokens - decode_rows, 0), []
    for tokens in left[:slots]:
        share = min(tokens, room) if spec.chunked else tokens
        if share > room and taken:
            break
        if share == 0:
            break
        taken.append(share)
        room -= share
    return taken or left[:1]


def naive(board, spec, pending):
    """(batch, KV blocks, prompt tokens) of every coming iteration, row by row."""
    lives = [
        [FIRST, r.start, r.prefill_tokens, max(r.start + r.remaining_tokens, FIRST + 1)] for r in board_rows(board)
    ]
    running, placed, left, k, prefill = len(lives), [], [r.prefill_tokens for r in pending], FIRST, []
    while len([life for life in placed if life[1] is not None]) < len(pending):
        done = len([life for life in placed if life[1] is not None])
        there = [left[j] for j in range(done, len(pending)) if pending[j].earliest <= k]
        taken = naive_packing(there, running + done, spec, max(1, spec.max_batch - running - done))
        for j, tokens in enumerate(taken, start=done):
            if j == len(placed):
                placed.append([k, None, pending[j].prefill_tokens, None])
            left[j] -= tokens
            if left[j] == 0:
                placed[j][1], placed[j][3] = k, k + pending[j].remaining_tokens
        prefill.append(sum(taken))
        k += 1
    lives += placed
    horizon = max((life[3] for life in lives), default=FIRST) - FIRST
    out = np.zeros((3, horizon), dtype=np.int64)
    for k in range(FIRST, FIRST + horizon):
        for begin, start, prompt, end in lives:
            if begin <= k < end:
                out[0, k - FIRST] += 1
                out[1, k - FIRST] += -(-(prompt + max(0, k - start)) // spec.block_tokens)
    out[2, : len(prefill)] = prefill
    return out, [life[3] - FIRST for life in lives], [life[1] - FIRST for life in placed]


def board_rows(board):
    return [board.row_at(slot) for slot in range(len(board.running))]


@st.composite
def boards(draw):
    """A scoreboard in the middle of its life, the engine's spec, and perhaps one request more."""
    engine = spec(
        block_tokens=draw(st.integers(1, 64)),
        max_batch=draw(st.integers(1, 12)),
        prefill_budget_tokens=draw(st.integers(1, 64)),
        chunked=draw(st.booleans()),
    )
    board = Scoreboard(engine.block_tokens)
    for key, (prompt, age, left) in enumerate(
        draw(st.lists(st.tuples(st.integers(1, 100), st.integers(1, 60), st.integers(-3, 60)), max_size=6))
    ):
        board.dispatch(row(key, prompt, max(1, age + left)))
        board.begin(key, FIRST - age, 0.0)
    earliest = 0
    waiting = draw(
        st.lists(st.tuples(st.integers(1, 90), st.integers(1, 40), st.integers(0, 20), st.integers(0, 3)), max_size=5)
    )
    rows = []
    for key, (prompt, answer, done, later) in enumerate(waiting, start=100):
        earliest += later
        rows.append(row(key, prompt, answer, earliest=FIRST + earliest - 1))
        rows[-1].done_tokens = min(done, answer + 1)
    extra = rows.pop() if rows and draw(st.booleans()) else None
    for waits in rows:
        board.dispatch(waits)
    return board, engine, rows, extra


@settings(max_examples=max(150, settings().max_examples))
@given(boards())
def test_equals_the_naive_loop(case):
    board, engine, rows, extra = case
    projection = project(board, engine, first=FIRST, extra=extra)
    expected, ends, starts = naive(board, engine, rows + ([extra] if extra else []))
    np.testing.assert_array_equal([projection.batch, projection.kv_blocks, projection.prefill_tokens], expected)
    assert projection.ends.tolist() == ends
    assert projection.starts.tolist() == starts
    assert (projection.first, projection.horizon) == (FIRST, expected.shape[1])
    assert len(board.pending) == len(rows), "the extra row joins virtually only"


def test_the_empty_engine_has_no_future():
    projection = project(Scoreboard(4), spec(), first=3)
    assert (projection.horizon, projection.ends.size, projection.starts.size) == (0, 0, 0)


def test_rows_that_should_be_gone_count_for_one_more_iteration():
    board = Scoreboard(4)
    for key, answer in enumerate((3, 9)):
        board.dispatch(row(key, 4, answer))
        board.begin(key, FIRST - 7, 0.0)
    projection = project(board, spec(), first=FIRST)
    # Both hold 4 + 7 tokens now, and the second one 12 in its last iteration.
    assert (projection.ends.tolist(), projection.batch.tolist(), projection.kv_blocks.tolist()) == (
        [1, 2],
        [2, 1],
        [6, 3],
    )


lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(30, 60)), min_size=1, max_size=5)


@given(lengths, lengths, st.integers(0, 20), st.integers(1, 17), st.booleans())
def test_foresees_what_the_batcher_does(before, after, age, block, chunked):
    """With exact lengths, and answers too long for anybody to leave while the prompts are placed, to the block."""
    engine = spec(block_tokens=block, kv_blocks=2000, max_batch=64, prefill_budget_tokens=64, chunked=chunked)
    batcher, board = Batcher(engine), Scoreboard(block)

    def admit(key, prompt, answer):
        batcher.add(key, prompt_tokens=prompt, answer_tokens=answer, max_tokens=answer)
        board.dispatch(row(key, prompt, answer, earliest=batcher.iteration))

    for key, (prompt, answer) in enumerate(before):
        admit(key, prompt, answer)
    while board.pending or batcher.iteration < age:
        assert batcher.begin()
        for key in (outcome := batcher.end()).started:
            board.begin(key, outcome.index, 0.0)
    for key, (prompt, answer) in enumerate(after, start=100):
        admit(key, prompt, answer)
    projection = project(board, engine, first=batcher.iteration)
    done = []
    while (iteration := batcher.begin()) is not None:
        batcher.end()
        done.append((iteration.batch, iteration.kv_blocks, iteration.prefill_tokens))
    seen = [projection.batch.tolist(), projection.kv_blocks.tolist(), projection.prefill_tokens.tolist()]
    assert list(zip(*seen, strict=True)) == done


@given(boards())
def test_replenished_never_falls_below_now(case):
    board, engine, _, _ = case
    projection = project(board, engine, first=FIRST)
    full = projection.replenished()
    for name in ("batch", "kv_blocks"):
        before, after = getattr(projection, name), getattr(full, name)
        assert after.tolist() == [max(value, before[0]) for value in before.tolist()]
    assert (full.prefill_tokens.tolist(), full.ends.tolist()) == (
        projection.prefill_tokens.tolist(),
        projection.ends.tolist(),
    )


def test_replenished_never_falls_below_what_is_now():
    board = Scoreboard(4)
    for key, answer in enumerate((3, 9, 30)):
        board.dispatch(row(key, 8, answer))
        board.begin(key, 0, 0.0)
    plain = project(board, SPEC, first=1)
    full = plain.replenished()
    assert plain.batch.min() == 1
    assert full.batch.tolist() == [3] * plain.horizon
    assert (full.kv_blocks == [max(blocks, int(plain.kv_blocks[0])) for blocks in plain.kv_blocks]).all()
    assert (full.ends == plain.ends).all()
