"""The scoreboard: its columns against a dictionary that does the same the slow way, and its single steps by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.columns import column
from core.effort import lines_executed
from core.toy import request, sequence
from throttllem.core.external_load import OwnLoad
from throttllem.core.scoreboard import GrowingBlocks, Scoreboard, SequenceState
from throttllem.core.types import Slo


def test_a_sequence_waits_begins_and_leaves():
    board = Scoreboard(4)
    board.dispatch(sequence(7, 10, 5))
    assert (len(board), 7 in board, list(board.pending), list(board.running)) == (1, True, [7], [])
    board.begin(7, 3, 1.5)
    assert (column(board, "start").tolist(), column(board, "tokens_at_start").tolist(), board.end.tolist()) == (
        [3],
        [10],
        [8],
    )
    assert (list(board.pending), list(board.running), board.running[7].first_token_s) == ([], [7], 1.5)
    assert board.remove(7).request.id == 7
    assert (len(board), column(board, "start").size, 7 in board) == (0, 0, False)
    with pytest.raises(KeyError):
        board.remove(7)


def test_the_last_sequence_moves_into_a_gap():
    board = Scoreboard(4)
    for key in range(4):
        board.dispatch(sequence(key, 10 + key, 5))
        board.begin(key, key, 0.0)
    board.remove(1)
    assert column(board, "tokens_at_start").tolist() == [10, 13, 12]
    assert [board.at(slot).request.id for slot in range(3)] == [0, 3, 2]
    board.remove(2)
    assert [board.at(slot).request.id for slot in range(2)] == [0, 3]
    assert board.at(1).slot == 1


def test_the_deadline_is_the_tighter_of_e2e_and_mean_time_between_tokens():
    slow = sequence(1, 4, 11, slo=Slo(e2e_s=30.0, tbt_s=0.5), arrival_s=2.0)
    assert slow.limits().deadline_s == 32.0
    slow.first_token_s = 3.0
    # Ten gaps of half a second after the first token at 3 s.
    assert slow.limits().deadline_s == 8.0
    slow.lost = True
    assert (slow.limits().deadline_s, slow.limits().tbt_s) == (math.inf, math.inf)
    assert sequence(2, 4, 11).limits().deadline_s == math.inf


def test_the_tightest_time_between_tokens_is_of_sequences_that_are_not_lost():
    board = Scoreboard(4)
    assert board.tightest_tbt_s() == math.inf
    for key, tbt_s in enumerate((0.3, 0.2, 0.1)):
        board.dispatch(sequence(key, 4, 9, slo=Slo(tbt_s=tbt_s)))
    board.begin(1, 0, 0.0)
    assert board.tightest_tbt_s() == 0.1
    board.mark_lost(board.pending[2])
    assert (board.tightest_tbt_s(), board.lost_requests) == (0.2, 1)
    board.mark_lost(board.running[1])
    board.mark_lost(board.running[1])
    assert (board.tightest_tbt_s(), board.lost_requests) == (0.3, 2)
    assert board.deadline_s.tolist() == [math.inf]
    board.remove(1)
    assert board.lost_requests == 1


def test_reservations_follow_max_tokens_and_outlive_a_preemption():
    board = Scoreboard(4)
    board.dispatch(sequence(1, 5, 3, max_tokens=8))
    board.dispatch(sequence(2, 1, 1))
    # ceil(13 / 4) + ceil(2 / 4)
    assert board.reserved_blocks == 4 + 1
    board.begin(1, 0, 0.0)
    board.preempt(1, 2)
    assert board.reserved_blocks == 5
    board.remove(1)
    assert board.reserved_blocks == 1


def test_preemption_puts_the_sequence_in_front_with_its_tokens_in_the_prompt():
    board = Scoreboard(4)
    for key in range(3):
        board.dispatch(sequence(key, 10, 8))
    board.begin(0, 2, 0.5)
    board.begin(1, 2, 0.5)
    board.preempt(1, 5)
    board.preempt(0, 5)
    assert list(board.pending) == [0, 1, 2]
    back = board.pending[0]
    # Iterations 2, 3, 4 gave three tokens.
    assert (back.done_tokens, back.prefill_tokens, back.remaining_tokens, back.earliest) == (3, 13, 5, 5)
    assert column(board, "start").size == 0
    board.begin(0, 9, 2.0)
    assert (back.first_token_s, board.end.tolist(), column(board, "tokens_at_start").tolist()) == (0.5, [14], [13])
    board.preempt(0, 11)
    assert back.done_tokens == 5


def test_an_outgrown_prediction_becomes_max_tokens():
    board = Scoreboard(4)
    board.dispatch(sequence(1, 4, 9, max_tokens=20))
    board.dispatch(sequence(2, 4, 5, max_tokens=6, slo=Slo(tbt_s=1.0)))
    board.begin(1, 0, 0.0)
    board.begin(2, 0, 0.0)
    assert board.outgrown(4) == []
    # After iterations 0 to 4 request 2 has its 5 tokens and is still here.
    assert [found.request.id for found in board.outgrown(5)] == [2]
    assert (board.end.tolist(), board.deadline_s.tolist()) == ([9, 6], [math.inf, 5.0])
    assert board.outgrown(5) == []
    # It outgrows even max_tokens: one more at a time.
    for iteration in (6, 7, 8):
        assert [found.request.id for found in board.outgrown(iteration)] == [2]
        assert board.end.tolist() == [9, iteration + 1]
    assert sorted(found.request.id for found in board.outgrown(9)) == [1, 2]
    assert board.end.tolist() == [20, 10]


def test_sequences_that_left_or_came_back_do_not_outgrow_what_they_were():
    board = Scoreboard(4)
    for key in range(3):
        board.dispatch(sequence(key, 4, 5, max_tokens=9))
        board.begin(key, 0, 0.0)
    board.remove(0)
    board.preempt(1, 2)
    board.begin(1, 4, 1.0)
    # Request 1 has 3 of its 5 tokens to go from iteration 4 on.
    assert [found.request.id for found in board.outgrown(6)] == [2]
    assert [found.request.id for found in board.outgrown(7)] == [1]


def test_a_correction_moves_start_and_end():
    board = Scoreboard(4)
    board.dispatch(sequence(1, 10, 8))
    board.begin(1, 0, 0.0)
    # Iterations 0 to 5 should have given six tokens; it has four.
    board.correct(1, 4, 5, 1.0)
    held = board.running[1]
    assert (held.generated_tokens(5), column(board, "start").tolist(), board.end.tolist()) == (4, [2], [10])
    assert board.kv_blocks(5) == 4, "13 tokens"
    assert board.outgrown(8) == [] and [found.request.id for found in board.outgrown(10)] == [1]
    board.correct(1, 12, 10, 1.0)
    assert (held.generated_tokens(10), column(board, "start").tolist()) == (12, [-1])


def test_a_correction_lets_a_pending_sequence_begin():
    board = Scoreboard(4)
    board.dispatch(sequence(1, 10, 8))
    board.correct(1, 3, 7, 1.5)
    held = board.running[1]
    assert (held.generated_tokens(7), held.first_token_s, board.end.tolist()) == (3, 1.5, [13])
    board.preempt(1, 9)
    # Four tokens were out and are in the prompt; fewer than that can be right, too.
    assert board.pending[1].prefill_tokens == 14
    board.correct(1, 2, 9, 2.0)
    assert (held.generated_tokens(9), held.prefill_tokens, held.first_token_s) == (2, 11, 1.5)
    assert board.kv_blocks(9) == 3


def test_corrections_do_not_pile_up():
    board = Scoreboard(4)
    board.dispatch(sequence(1, 10, 100_000))
    board.begin(1, 0, 0.0)
    for iteration in range(2000):
        board.correct(1, 1 + iteration // 2, iteration, 1.0)
    assert len(board._ends) < 100
    assert [found.request.id for found in board.outgrown(101_001)] == [1]


def test_nothing_is_touched_while_no_prediction_fails():
    def lines(count):
        board = Scoreboard(4)
        for key in range(count):
            board.dispatch(sequence(key, 4, 50))
            board.begin(key, 0, 0.0)
        return lines_executed(lambda: board.outgrown(20))

    assert lines(300) == lines(3)


class Columns(RuleBasedStateMachine):
    """Random life on a scoreboard; the columns must agree with the sequences."""

    def __init__(self):
        super().__init__()
        self.board = Scoreboard(4)
        self.known = {}
        self.iteration = 0

    @rule(
        prompt=st.integers(1, 30),
        output=st.integers(1, 9),
        tbt=st.sampled_from([None, 0.25, 0.5]),
        sequences=st.integers(1, 3),
    )
    def dispatch(self, prompt, output, tbt, sequences):
        key = len(self.known)
        self.known[key] = sequence(key, prompt, output, max_tokens=12, slo=Slo(tbt_s=tbt), sequences=sequences)
        self.board.dispatch(self.known[key])

    @precondition(lambda self: self.board.pending)
    @rule(data=st.data())
    def begin(self, data):
        key = data.draw(st.sampled_from(sorted(self.board.pending)))
        self.board.begin(key, self.iteration, float(self.iteration))

    @precondition(lambda self: self.board.running)
    @rule(data=st.data())
    def preempt(self, data):
        self.board.preempt(data.draw(st.sampled_from(sorted(self.board.running))), self.iteration)

    @precondition(lambda self: len(self.board))
    @rule(data=st.data(), tokens=st.integers(1, 20))
    def correct(self, data, tokens):
        held = self.known[data.draw(st.sampled_from(self.here()))]
        self.board.correct(held.request.id, tokens, self.iteration, float(self.iteration))
        assert held.generated_tokens(self.iteration) == tokens

    @precondition(lambda self: len(self.board))
    @rule(data=st.data())
    def mark_lost(self, data):
        self.board.mark_lost(self.known[data.draw(st.sampled_from(self.here()))])

    @precondition(lambda self: len(self.board))
    @rule(data=st.data())
    def remove(self, data):
        self.board.remove(data.draw(st.sampled_from(self.here())))

    @rule()
    def step(self):
        self.iteration += 1
        late = {
            key
            for key, r in self.board.running.items()
            if r.start + max(1, r.output_tokens - r.done_tokens) <= self.iteration
        }
        assert {found.request.id for found in self.board.outgrown(self.iteration)} == late

    def here(self):
        return sorted([*self.board.pending, *self.board.running])

    @invariant()
    def columns_agree_with_sequences(self):
        board = self.board
        seen = [board.at(slot) for slot in range(len(board.running))]
        assert {r.request.id: r for r in seen} == board.running
        assert [r.slot for r in seen] == list(range(len(seen)))
        assert column(board, "start").tolist() == [r.start for r in seen]
        assert column(board, "tokens_at_start").tolist() == [r.request.prompt_tokens + r.done_tokens for r in seen]
        assert board.end.tolist() == [r.start + r.remaining_tokens for r in seen]
        assert board.deadline_s.tolist() == [r.limits().deadline_s for r in seen]
        here = [self.known[key] for key in self.here()]
        assert board.lost_requests == sum(r.lost for r in here)
        assert board.reserved_blocks == sum(-(-(r.request.prompt_tokens + 12) // 4) * r.sequences for r in here)
        assert column(board, "widths").tolist() == [r.sequences for r in seen]
        assert board.multi_sequence == sum(r.sequences > 1 for r in here)
        assert board.running_sequences + board.pending_sequences == sum(r.sequences for r in here)
        waiting = board.pending.values()
        assert board.own(self.iteration + 5) == OwnLoad(
            running=sum(r.sequences for r in seen),
            kv_blocks=sum(-(-(r.prefill_tokens + self.iteration + 5 - r.start) // 4) * r.sequences for r in seen),
            pending=sum(r.sequences for r in waiting),
            pending_blocks=sum(-(-r.prefill_tokens // 4) * r.sequences for r in waiting),
        )
        assert board.tightest_tbt_s() == min((r.limits().tbt_s for r in here), default=math.inf)
        assert all(r.start is None and r.slot == -1 for r in board.pending.values())


TestColumns = Columns.TestCase


def test_a_mean_is_not_spread_over_tokens_that_inflation_added():
    board = Scoreboard(4)
    made = request(1, 8, 13, max_tokens=64, arrival_s=0.0, slo=Slo(tbt_s=0.25))
    board.dispatch(SequenceState(request=made, predicted_tokens=13, output_tokens=13, expected_tokens=9))
    board.begin(1, 0, 1.0)
    assert board.deadline_s.tolist() == [1.0 + 8 * 0.25]
    assert [r.output_tokens for r in board.outgrown(13)] == [64]
    assert board.deadline_s.tolist() == [1.0 + 63 * 0.25]


@pytest.mark.parametrize(
    ("renewed", "output"),
    [(None, 20), (math.nan, 20), (math.inf, 20), (12.3, 13), (99.0, 20), (1.0, 6), (5.0, 6)],
)
def test_what_a_renewed_prediction_may_be(renewed, output):
    board = Scoreboard(4)
    board.dispatch(sequence(1, 4, 5, max_tokens=20))
    board.begin(1, 0, 0.0)
    assert [found.output_tokens for found in board.outgrown(5, lambda request, generated: renewed)] == [output]


def test_beyond_max_tokens_no_prediction_is_renewed():
    board = Scoreboard(4)
    board.dispatch(sequence(1, 4, 5, max_tokens=5))
    board.begin(1, 0, 0.0)

    def renew(request, generated):
        raise AssertionError("it knows no better than the engine")

    assert [found.output_tokens for found in board.outgrown(5, renew)] == [6]


# ---- growing blocks ----------------------------------------------------------------------------------------


held = st.lists(st.tuples(st.integers(1, 200), st.integers(-300, 300), st.integers(1, 4)), max_size=8)


@given(held, held, st.integers(1, 40), st.integers(0, 500))
def test_growing_blocks_equal_the_sum_over_sequences(stay, leave, block, later):
    growing = GrowingBlocks(block)
    for one in [*stay, *leave]:
        growing.add(*one)
    for one in leave:
        growing.remove(*one)
    iteration = 300 + later
    expected = sum(-(-(tokens + iteration - start) // block) * width for tokens, start, width in stay)
    assert growing.at(iteration) == expected
    assert growing.sequences == sum(width for _, _, width in stay)


def test_tokens_that_are_not_sure_are_those_beyond_the_expected_ones():
    known = sequence(1, 4, 32)
    bounded = SequenceState(request=known.request, predicted_tokens=32, output_tokens=32, expected_tokens=20)
    assert (known.unsure_tokens, bounded.unsure_tokens) == (0, 12)
    bounded.output_tokens, bounded.done_tokens = 40, 8  # it has outgrown its prediction
    assert bounded.unsure_tokens == 32


def test_no_fewer_tokens_than_none_are_unsure():
    """An end that lies beyond the projection would be read from outside of it."""
    assert (
        SequenceState(request=request(1, 4, 8), predicted_tokens=8, output_tokens=3, expected_tokens=8).unsure_tokens
        == 0
    )
