"""The projection against a naive loop over sequences and iterations, and against what the batcher then does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.forecast.plain import pack
from core.toy import sequence, spec
from throttllem.core.external_load import ExternalLoad
from throttllem.core.forecast.projection import project
from throttllem.core.scoreboard import Scoreboard
from throttllem.engines.simulated.batcher import Batcher

FIRST = 100


def naive_packing(left, decode_sequences, spec, slots):
    """The packing rule in words: whole prompts while they fit, the first always; chunked, whatever room is left."""
    room, taken = max(spec.prefill_budget_tokens - decode_sequences, 0), []
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
    """(batch, KV blocks, prompt tokens) of every coming iteration, sequence by sequence, prompt by prompt."""
    lives = [
        [FIRST, r.start, r.prefill_tokens, max(r.start + r.remaining_tokens, FIRST + 1), r.sequences]
        for r in running(board)
    ]
    prompts = [r for r in pending for _ in range(r.sequences)]
    decoding = sum(life[4] for life in lives) + max(0, board.external.batch)
    placed, left, k, prefill = [], [r.prefill_tokens for r in prompts], FIRST, []
    while len([life for life in placed if life[1] is not None]) < len(prompts):
        done = len([life for life in placed if life[1] is not None])
        there = [left[j] for j in range(done, len(prompts)) if prompts[j].earliest <= k]
        taken = naive_packing(there, decoding + done, spec, max(1, spec.max_batch - decoding - done))
        for j, tokens in enumerate(taken, start=done):
            if j == len(placed):
                placed.append([k, None])
            left[j] -= tokens
            if left[j] == 0:
                placed[j][1] = k
        prefill.append(sum(taken))
        k += 1
    starts = []
    for r in pending:  # a request begins with its first prompt and starts with its last
        mine, placed = placed[: r.sequences], placed[r.sequences :]
        starts.append(mine[-1][1])
        lives.append([mine[0][0], starts[-1], r.prefill_tokens, starts[-1] + r.remaining_tokens, r.sequences])
    horizon = max((life[3] for life in lives), default=FIRST) - FIRST
    out = np.zeros((3, horizon), dtype=np.int64)
    for k in range(FIRST, FIRST + horizon):
        for begin, start, prompt, end, width in lives:
            if begin <= k < end:
                out[0, k - FIRST] += width
                out[1, k - FIRST] += -(-(prompt + max(0, k - start)) // spec.block_tokens) * width
    if board.external != ExternalLoad():
        out[0] = np.maximum(out[0] + board.external.batch, 1)
        out[1] = np.maximum(out[1] + board.external.kv_blocks, 1)
    out[2, : len(prefill)] = prefill
    return out, [life[3] - FIRST for life in lives], [start - FIRST for start in starts]


def running(board):
    return [board.at(slot) for slot in range(len(board.running))]


@st.composite
def boards(draw):
    """A scoreboard in the middle of its life, the engine's spec, and perhaps one request more. In half of the cases
    some requests have several sequences, and the engine holds more, or less, than ours.
    """
    widths = draw(st.sampled_from([st.just(1), st.integers(1, 4)]))
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
        board.dispatch(sequence(key, prompt, max(1, age + left), sequences=draw(widths)))
        board.begin(key, FIRST - age, 0.0)
    earliest = 0
    waiting = draw(
        st.lists(st.tuples(st.integers(1, 90), st.integers(1, 40), st.integers(0, 20), st.integers(0, 3)), max_size=5)
    )
    pending = []
    for key, (prompt, output, done, later) in enumerate(waiting, start=100):
        earliest += later
        pending.append(sequence(key, prompt, output, earliest=FIRST + earliest - 1, sequences=draw(widths)))
        pending[-1].done_tokens = min(done, output + 1)
    extra = pending.pop() if pending and draw(st.booleans()) else None
    for waits in pending:
        board.dispatch(waits)
    if draw(st.booleans()):
        board.external = ExternalLoad(batch=draw(st.integers(-5, 5)), kv_blocks=draw(st.integers(-20, 20)))
    return board, engine, pending, extra


@settings(max_examples=max(150, settings().max_examples))
@given(boards())
def test_equals_the_naive_loop(case):
    board, engine, pending, extra = case
    projection = project(board, engine, first=FIRST, extra=extra)
    expected, ends, starts = naive(board, engine, pending + ([extra] if extra else []))
    np.testing.assert_array_equal([projection.batch, projection.kv_blocks, projection.prefill_tokens], expected)
    assert projection.ends.tolist() == ends
    assert projection.starts.tolist() == starts
    assert (projection.first, projection.horizon) == (FIRST, expected.shape[1])
    assert len(board.pending) == len(pending), "the extra request joins virtually only"


def test_a_request_of_several_sequences_is_as_many_requests():
    """With whole prompts in one iteration, three sequences of one request are three requests of one sequence."""

    def board(widths):
        made = Scoreboard(4)
        for key, width in enumerate(widths):
            made.dispatch(sequence(key, 10, 9, sequences=width))
        return made

    wide, single = (project(board(widths), spec(prefill_budget_tokens=100), first=0) for widths in ((3,), (1, 1, 1)))
    for name in ("batch", "kv_blocks", "prefill_tokens"):
        np.testing.assert_array_equal(getattr(wide, name), getattr(single, name))
    assert (wide.ends.tolist(), wide.starts.tolist()) == ([9], [0])


def test_the_empty_engine_has_no_future():
    projection = project(Scoreboard(4), spec(), first=3)
    assert (projection.horizon, projection.ends.size, projection.starts.size) == (0, 0, 0)


def test_sequences_that_should_be_gone_count_for_one_more_iteration():
    board = Scoreboard(4)
    for key, output in enumerate((3, 9)):
        board.dispatch(sequence(key, 4, output))
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
def test_projects_what_the_batcher_does(before, after, age, block, chunked):
    """With exact lengths, and outputs too long for any to leave while the prompts are placed, to the block."""
    engine = spec(block_tokens=block, kv_blocks=2000, max_batch=64, prefill_budget_tokens=64, chunked=chunked)
    batcher, board = Batcher(engine), Scoreboard(block)

    def admit(key, prompt, output):
        batcher.add(key, prompt_tokens=prompt, output_tokens=output, max_tokens=output)
        board.dispatch(sequence(key, prompt, output, earliest=batcher.iteration))

    for key, (prompt, output) in enumerate(before):
        admit(key, prompt, output)
    while board.pending or batcher.iteration < age:
        assert batcher.begin()
        for key in (outcome := batcher.end()).started:
            board.begin(key, outcome.index, 0.0)
    for key, (prompt, output) in enumerate(after, start=100):
        admit(key, prompt, output)
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


# ---- packing -----------------------------------------------------------------------------------------------


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
def test_packing_cases(prompts, decode_sequences, budget, slots, whole, chunked):
    for expected, cut in ((whole, False), (chunked, True)):
        assert pack(prompts, decode_sequences, budget=budget, slots=slots, chunked=cut) == expected


@given(
    st.lists(st.integers(1, 30), max_size=8), st.integers(0, 30), st.integers(1, 30), st.integers(0, 8), st.booleans()
)
def test_packing_is_a_prefix_within_the_budget(prompts, decode_sequences, budget, slots, chunked):
    taken = pack(iter(prompts), decode_sequences, budget=budget, slots=slots, chunked=chunked)
    room = max(0, budget - decode_sequences)
    assert len(taken) <= slots
    assert taken[:-1] == prompts[: len(taken)][:-1], "only the last one can be cut"
    assert sum(taken) <= room or (len(taken) == 1 and not chunked)
    if chunked and len(prompts) <= slots:
        assert sum(taken) == min(room, sum(prompts)), "no room is left over"


@pytest.mark.parametrize("changes", [{"output": 2**40}, {"earliest": 2**40}])
def test_a_horizon_beyond_all_memory_is_an_error(changes):
    engine = spec()
    board = Scoreboard(engine.block_tokens)
    board.dispatch(sequence(1, 4, **({"output": 4} | changes)))
    with pytest.raises(ValueError, match="more iterations than any request takes"):
        project(board, engine, first=0)
