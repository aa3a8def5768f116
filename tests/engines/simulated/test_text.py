"""The texts of the simulated engine: counted as they are made, and harmless inside JSON."""

import json
import random

from hypothesis import given
from hypothesis import strategies as st

from throttllem.engines.simulated.text import Tape, count_tokens, estimate_tokens

TAPE = Tape(7)


def test_tokens_by_hand():
    assert count_tokens("Hello there, you") == 6  # "Hell" "o" " ther" "e" "," " you"
    assert count_tokens("") == 0
    assert count_tokens("a   b\n\n") == 4


@given(st.integers(0, 2**32), st.integers(1, 3 * len(TAPE.pieces)))
def test_an_answer_counts_as_the_tokens_that_made_it(seed, tokens):
    begin = TAPE.begin(random.Random(seed))
    pieces = TAPE.take(begin, 0, tokens)
    assert len(pieces) == tokens
    assert count_tokens(b"".join(pieces).decode()) == tokens
    assert pieces[0][:1].isupper()


@given(st.integers(0, 2**32), st.integers(1, 400), st.integers(1, 400))
def test_an_answer_in_parts_is_the_whole(seed, first, more):
    begin = TAPE.begin(random.Random(seed))
    parts = TAPE.take(begin, 0, first) + TAPE.take(begin, first, first + more)
    assert parts == TAPE.take(begin, 0, first + more)


def test_every_piece_stands_in_json_as_it_is():
    assert all(json.dumps(piece.decode()) == f'"{piece.decode()}"' for piece in TAPE.pieces)


def test_the_seed_makes_the_words():
    assert Tape(7).text == TAPE.text != Tape(8).text


def test_what_an_answer_can_hold():
    end = TAPE.text[-12:] + TAPE.text[:9]
    assert TAPE.holds(end) and TAPE.holds(" the")
    assert not TAPE.holds("\n\nUser:")


@given(st.text(max_size=200), st.integers(1, 30))
def test_only_what_can_never_fit_is_estimated(text, most_tokens):
    tokens, exact = estimate_tokens(text, most_tokens=most_tokens)
    if exact:
        assert tokens == count_tokens(text)
    else:
        assert tokens > most_tokens
        assert count_tokens(text) > 0
