"""Whoever passes the bound passes the projection: on any board, and on tables that do not rise everywhere."""

import math
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from core.toy import row, spec, table
from throttllem.core.admission import ADMIT, admit
from throttllem.core.admission_bound import surely_fits
from throttllem.core.external_load import ExternalLoad
from throttllem.core.scoreboard import Scoreboard
from throttllem.core.types import Slo

WIDE = spec(kv_blocks=400, max_batch=24, no_evict=False, prefill_budget_tokens=48)
TABLE = table(WIDE)
promises = st.builds(
    Slo,
    e2e_s=st.none() | st.floats(0.1, 20),
    tbt_s=st.none() | st.floats(0.01, 0.2),
    ttft_s=st.none() | st.floats(0.02, 5),
)
kinds = st.sampled_from(["waits", "runs", "runs", "is lost", "was thrown out"])
rows = st.tuples(st.integers(1, 90), st.integers(1, 60), promises, kinds, st.integers(0, 30))
FIRST = 30


def bumpy(seed, size):
    noise = 1 + size * np.random.default_rng(seed).random(TABLE.seconds.shape)
    return replace(TABLE, seconds=(TABLE.seconds * noise).astype(np.float32))


def board_of(drawn, others):
    """Rows that began before `FIRST`; those that wait come in about then, in their order."""
    board = Scoreboard(WIDE.block_tokens)
    for key, (prompt, answer, slo, kind, at) in enumerate(drawn):
        one = row(key, prompt, answer, slo=slo, earliest=FIRST + key // 4 if kind == "waits" else at)
        board.dispatch(one)
        if kind != "waits":
            board.begin(key, at, 0.01 * at)
        if kind == "is lost":
            board.mark_lost(one)
        if kind == "was thrown out" and at < FIRST:
            board.preempt(key, FIRST - 1)
    board.others = others
    return board


def asked(board, newcomer, found, the_spec, **times):
    with mock.patch("throttllem.core.admission.surely_fits", return_value=False):
        projected = admit(board, the_spec, found, newcomer, **times)
    return surely_fits(board, the_spec, found, newcomer, **times), projected


@given(
    drawn=st.lists(rows, max_size=20),
    newcomer=rows,
    others=st.builds(ExternalLoad, batch=st.integers(-3, 3), kv_blocks=st.integers(-50, 50)),
    engine=st.tuples(st.booleans(), st.integers(8, 48)),
    passed=st.integers(0, 5),
    delay_s=st.sampled_from([0.0, 0.2]),
    margin=st.sampled_from([0.0, 0.05, 0.2]),
    bump=st.tuples(st.integers(0, 9), st.sampled_from([0.0, 0.5])),
    largest=st.sampled_from([24, 24, 6]),
)
def test_whoever_passes_would_be_admitted(drawn, newcomer, others, engine, passed, delay_s, margin, bump, largest):
    prompt, answer, slo, _, later = newcomer
    first, (chunked, budget) = FIRST + passed, engine
    new = row(99, prompt, answer, slo=slo, earliest=FIRST + 5 + later // 10)
    times = {"first": first, "base_s": 0.01 * first, "delay_s": delay_s, "margin": margin}
    the_spec = replace(WIDE, chunked=chunked, prefill_budget_tokens=budget)
    found = bumpy(*bump)
    found = replace(found, hull=replace(found.hull, max_batch=largest))
    surely, projected = asked(board_of(drawn, others), new, found, the_spec, **times)
    event("passes" if surely else "is projected")
    assert not surely or projected == ADMIT


def light(**promise):
    board = board_of([(40, 60, Slo(**promise), "runs", 0)], ExternalLoad())
    return asked(board, row(2, 40, 60), TABLE, WIDE, first=0, base_s=0.0, delay_s=0.0, margin=0.0)


def test_it_decides_where_promises_are_far_away():
    # Two rows of 25 blocks: 19 ms an iteration at most, and one with a prompt of 40 tokens, twice.
    assert light(e2e_s=1.4) == (True, ADMIT)
    surely, projected = light(e2e_s=1.2)
    assert (surely, projected) == (False, ADMIT)


@pytest.mark.parametrize("change", ["lost", "several", "outside"])
def test_what_it_does_not_judge(change):
    board = board_of([(40, 60, Slo(), "runs", 0)], ExternalLoad())
    new = row(2, 40, 60, sequences=2 if change == "several" else 1)
    new.lost = change == "lost"
    found = table(WIDE, max_batch=1) if change == "outside" else TABLE
    times = {"first": 0, "base_s": 0.0, "delay_s": 0.0, "margin": 0.0}
    assert not surely_fits(board, WIDE, found, new, **times)
    assert surely_fits(board, WIDE, TABLE, row(2, 40, 60), **times)


def test_the_slowest_of_so_much_of_each():
    found = bumpy(3, 1.0)
    for batch, kv, prefill in ((1, 4, 0), (5, 100, 16), (24, 400, 256)):
        every = [
            found.at(1400, b, k, p)[0]
            for b in range(batch + 1)
            for k in range(0, kv + 1, 4)
            for p in range(0, prefill + 1, 16)
        ]
        assert math.isclose(found.slowest_s(batch, kv, prefill), max(every))
