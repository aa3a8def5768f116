"""Admission: each check in the paper's order, on cases that break exactly what they should.

With the toy's table an iteration of b sequences and v blocks takes 13 + 0.5 b + 0.1 v ms at the maximum clock: request
1 alone needs about 16 ms, with the newcomer about 19.
"""

import math
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from core.toy import request, sequence, spec, table
from throttllem.core.admission import (
    ADMIT,
    LOST,
    admit,
    expiry_s,
    never_fits,
    surely_fits,
)
from throttllem.core.external_load import ExternalLoad
from throttllem.core.options import AdmissionOptions, Unmeetable
from throttllem.core.scoreboard import Scoreboard
from throttllem.core.types import Reason, Slo, Verdict, VerdictKind

WIDE = spec(kv_blocks=200, no_evict=False)


def board_with(slo=None, spec=WIDE, **changes):
    """Request 1, running since iteration 0: 40 prompt tokens, 60 to come."""
    board = Scoreboard(spec.block_tokens)
    board.dispatch(sequence(1, 40, 60, slo=slo or Slo(), **changes))
    board.begin(1, 0, 0.0)
    return board


def check(board, newcomer=None, spec=WIDE, *, delay_s=0.0, margin=0.0, base_s=0.0, patient=True, **hull):
    newcomer = newcomer or sequence(2, 100, 80)
    before = (len(board), board.reserved_blocks)
    times = {"first": 0, "base_s": base_s, "delay_s": delay_s, "margin": margin}
    verdict = admit(board, spec, table(WIDE, **hull), newcomer, **times, patient=patient)
    assert (len(board), board.reserved_blocks) == before, "the request joins virtually only"
    return verdict


def wait(why, binding=None):
    return Verdict(kind=VerdictKind.WAIT, why=why, binding=binding)


def test_the_checks_come_in_the_papers_order():
    # At iteration 59 request 1 holds 25 blocks, the newcomer 40: 65. Each step below repairs the fault found before it.
    everything_wrong = Slo(e2e_s=1.05, tbt_s=0.017)
    newcomer = sequence(2, 100, 80, slo=Slo(e2e_s=0.5))
    assert check(board_with(everything_wrong), newcomer, spec(kv_blocks=64, no_evict=False)) == wait(Reason.KV)
    assert check(board_with(everything_wrong), newcomer, spec(kv_blocks=65, no_evict=False)) == wait(Reason.TBT)
    assert check(board_with(Slo(e2e_s=1.05)), newcomer) == wait(Reason.E2E, 1)
    assert check(board_with(Slo(e2e_s=2.0)), newcomer) == LOST
    assert check(board_with(Slo(e2e_s=2.0)), sequence(2, 100, 80, slo=Slo(e2e_s=2.0))) == ADMIT


def test_room_in_the_batch_comes_first():
    full = spec(kv_blocks=10, max_batch=1)
    assert check(board_with(spec=full), spec=full) == wait(Reason.BATCH)


def test_all_sequences_must_fit():
    engine = spec(kv_blocks=200, max_batch=4, no_evict=False)
    assert check(board_with(spec=engine), sequence(2, 100, 80, sequences=3), spec=engine) == ADMIT
    assert check(board_with(spec=engine), sequence(2, 100, 80, sequences=4), spec=engine) == wait(Reason.BATCH)
    # Request 1 takes 25 blocks in the end, each sequence 45.
    tight = spec(kv_blocks=155, no_evict=False)
    assert check(board_with(spec=tight), sequence(2, 100, 80, sequences=3), spec=tight) == ADMIT
    assert check(board_with(spec=tight), sequence(2, 100, 80, sequences=4), spec=tight) == wait(Reason.KV)


def test_what_others_hold_is_not_available():
    engine = spec(kv_blocks=200, max_batch=8, no_evict=False)
    board = board_with(spec=engine)
    board.external = ExternalLoad(batch=6)
    assert check(board, sequence(2, 100, 80), spec=engine) == ADMIT
    board.external = ExternalLoad(batch=7)
    assert check(board, sequence(2, 100, 80), spec=engine) == wait(Reason.BATCH)
    # 65 blocks at iteration 59.
    board.external = ExternalLoad(batch=1, kv_blocks=136)
    assert check(board, sequence(2, 100, 80), spec=engine) == wait(Reason.KV)
    board.external = ExternalLoad(batch=1, kv_blocks=135)
    assert check(board, sequence(2, 100, 80), spec=engine) == ADMIT
    board.external = ExternalLoad(batch=-1, kv_blocks=-40)
    tight = spec(kv_blocks=64, no_evict=False)
    assert check(board, sequence(2, 100, 80), spec=tight) == ADMIT, "shared blocks make room"
    never = spec(kv_blocks=80, max_batch=8, no_evict=True)
    assert check(board, sequence(2, 100, 80), spec=never) == ADMIT, "25 and 45 are reserved"
    board.external = ExternalLoad(kv_blocks=11)
    assert check(board, sequence(2, 100, 80), spec=never) == wait(Reason.KV)


def test_an_engine_that_never_evicts_needs_the_whole_reservation():
    newcomer = sequence(2, 4, 1, max_tokens=60)
    # Request 1 has ceil(100 / 4) = 25 blocks, the newcomer would take 16, though it will use 2.
    assert check(board_with(), newcomer, spec(kv_blocks=40, no_evict=True)) == wait(Reason.KV)
    assert check(board_with(), newcomer, spec(kv_blocks=41, no_evict=True)) == ADMIT
    assert check(board_with(), newcomer, spec(kv_blocks=40, no_evict=False)) == ADMIT


def test_the_newcomers_own_time_between_tokens_counts():
    assert check(board_with(), sequence(2, 100, 80, slo=Slo(tbt_s=0.017))) == wait(Reason.TBT)
    assert check(board_with(), sequence(2, 100, 80, slo=Slo(tbt_s=0.030))) == ADMIT


def test_an_idle_engine_reserves_nothing_of_a_tbt_slo():
    # Its last iteration takes 13 + 0.5 + 4.5 ms.
    for tbt_s, verdict in ((0.0185, ADMIT), (0.0175, LOST)):
        assert check(Scoreboard(WIDE.block_tokens), sequence(2, 100, 80, slo=Slo(tbt_s=tbt_s)), margin=0.2) == verdict


def test_time_between_tokens_is_not_checked_in_iterations_with_prompts():
    # 100 prompt tokens take 30 ms more, which is above 25 ms.
    assert check(board_with(Slo(tbt_s=0.025))) == ADMIT


def test_a_late_first_token_makes_the_newcomer_lost():
    # The first token takes the prompt's iteration: about 50 ms.
    assert check(board_with(), sequence(2, 100, 80, slo=Slo(ttft_s=0.03))) == LOST
    assert check(board_with(), sequence(2, 100, 80, slo=Slo(ttft_s=0.07))) == ADMIT
    assert check(board_with(), sequence(2, 100, 80, slo=Slo(ttft_s=0.07)), delay_s=0.05) == LOST


def test_the_first_token_of_another_stays_in_time():
    board = Scoreboard(4)
    board.dispatch(sequence(1, 32, 20, slo=Slo(ttft_s=0.05)))
    board.dispatch(sequence(3, 32, 20, slo=Slo(ttft_s=0.11)))
    # Both prompts go before the newcomer's; its own 100 tokens come after their first tokens.
    assert check(board) == ADMIT
    assert check(board, delay_s=0.05) == wait(Reason.TTFT, 1)


@pytest.mark.parametrize("why", ["delay", "margin", "base"])
def test_what_is_taken_from_a_deadline(why):
    # Request 1 ends after 60 iterations of 17 to 20 ms and 30 ms for the prompt: about 1.15 s.
    board = board_with(Slo(e2e_s=1.25))
    assert check(board) == ADMIT
    less = {"delay": {"delay_s": 0.2}, "margin": {"margin": 0.2}, "base": {"base_s": 0.2}}[why]
    assert check(board, **less) == wait(Reason.E2E, 1)


def test_a_lost_request_binds_no_other():
    board = board_with(Slo(e2e_s=0.1, tbt_s=0.017))
    assert check(board) == wait(Reason.TBT)
    board.mark_lost(board.running[1])
    assert check(board) == ADMIT


def test_a_lost_newcomer_must_not_violate_the_slos_of_others():
    late = sequence(2, 100, 80, slo=Slo(e2e_s=0.1))
    assert check(board_with(Slo(e2e_s=1.05)), late) == wait(Reason.E2E, 1)
    assert check(board_with(Slo(e2e_s=2.0)), late) == LOST


def test_an_empty_engine_admits_whatever_could_ever_fit():
    unmeetable = sequence(2, 100, 80, slo=Slo(e2e_s=0.01, tbt_s=0.001))
    assert check(Scoreboard(4), unmeetable) == LOST
    assert check(Scoreboard(4), sequence(2, 100, 80, slo=Slo(tbt_s=0.001))) == LOST
    assert check(Scoreboard(4)) == ADMIT
    assert check(Scoreboard(4), sequence(2, 100, 80), spec(kv_blocks=45, no_evict=True)) == ADMIT


def test_outside_the_hull_only_capacity_is_checked():
    tight = board_with(Slo(e2e_s=0.1, tbt_s=0.017))
    assert check(tight, max_batch=1) == ADMIT
    assert check(tight, max_batch=2) == wait(Reason.TBT)
    assert check(tight, spec=spec(kv_blocks=64, no_evict=False), max_batch=1) == wait(Reason.KV)


def test_without_patience_a_request_joins_over_the_slos_of_others_but_not_over_kv():
    for slo in (Slo(e2e_s=1.05), Slo(tbt_s=0.017)):
        assert check(board_with(slo)).kind is VerdictKind.WAIT
        assert check(board_with(slo), patient=False) == ADMIT
    assert check(board_with(), sequence(2, 100, 80, slo=Slo(e2e_s=0.5)), patient=False) == LOST
    assert check(board_with(), spec=spec(kv_blocks=64, no_evict=False), patient=False) == wait(Reason.KV)


def test_patience_is_a_share_of_the_shortest_slo():
    options = AdmissionOptions(patience=0.2)
    hurried, relaxed = (request(1, 8, 8, slo=slo, arrival_s=5.0) for slo in (Slo(e2e_s=10, ttft_s=1), Slo(e2e_s=10)))
    assert [options.is_patient(hurried, 5.0, 5.0 + waited) for waited in (0.19, 0.21)] == [True, False]
    assert [options.is_patient(relaxed, 5.0, 5.0 + waited) for waited in (1.99, 2.01)] == [True, False]
    assert options.is_patient(request(1, 8, 8, slo=Slo(tbt_s=0.1)), 0.0, 1e9)


def test_rejecting_has_its_own_margin_and_patience():
    serves, rejects = AdmissionOptions(), AdmissionOptions(unmeetable=Unmeetable.REJECT)
    made = request(1, 8, 8, slo=Slo(e2e_s=10))
    assert [options.patient_until_s(made, 0.0) for options in (serves, rejects)] == [2.0, 1.0]
    assert [options.margin_in_force for options in (serves, rejects)] == [0.05, 0.2]


def test_no_request_waits_for_a_tbt_slo_that_no_sequence_alone_could_meet():
    assert check(board_with(Slo(tbt_s=0.0145)), sequence(2, 1, 80, slo=Slo())) == wait(Reason.TBT)
    assert check(board_with(), sequence(2, 1, 80, slo=Slo(tbt_s=0.0130))) == LOST


def test_what_never_fits():
    engine = spec(kv_blocks=20, max_context_tokens=70)
    assert never_fits(sequence(1, 40, 30).request, engine) is None
    assert never_fits(sequence(1, 40, 31).request, engine) is Reason.NEVER_FITS_CONTEXT
    assert never_fits(sequence(1, 40, 1, max_tokens=31).request, engine) is Reason.NEVER_FITS_CONTEXT
    small = spec(kv_blocks=17, max_context_tokens=70)
    assert never_fits(sequence(1, 38, 30).request, small) is None
    assert never_fits(sequence(1, 38, 31).request, small) is Reason.NEVER_FITS_KV
    # Three times ceil(21 / 4) blocks of 17, and never more sequences than the engine runs side by side.
    assert never_fits(sequence(1, 20, 0, max_tokens=0, sequences=3).request, small) is None
    assert never_fits(sequence(1, 20, 1, sequences=3).request, small) is Reason.NEVER_FITS_KV
    assert never_fits(sequence(1, 1, 1, sequences=8).request, small) is None
    assert never_fits(sequence(1, 1, 1, sequences=9).request, small) is Reason.BATCH


def test_unmeetable_is_serve_or_reject():
    assert not AdmissionOptions().rejects
    assert AdmissionOptions(unmeetable=Unmeetable("reject")).rejects
    with pytest.raises(ValueError, match=r"admission\.unmeetable = 'drop': must be 'serve' or 'reject'"):
        AdmissionOptions(unmeetable="drop")


def test_when_waiting_is_of_no_use():
    """A prompt of 64 tokens takes 13 + 0.5 + 0.4 (4 blocks: a bin) + 19.2 ms, each of 9 more tokens 13.9 ms."""
    model = table(WIDE)
    prefill_s, step_s = 0.0331, 0.0139

    def expires(output=10, **slo):
        return expiry_s(sequence(1, 64, output, slo=Slo(**slo), arrival_s=5.0), [model])

    assert expires() == math.inf
    assert expires(ttft_s=2.0) == pytest.approx(7.0 - prefill_s)
    assert expires(e2e_s=2.0) == pytest.approx(7.0 - prefill_s - 9 * step_s)
    assert expires(e2e_s=2.0, ttft_s=1.0) == pytest.approx(6.0 - prefill_s)
    assert expires(e2e_s=2.0, tbt_s=0.0138) == -math.inf
    assert expires(e2e_s=2.0, tbt_s=0.0140) == pytest.approx(7.0 - prefill_s - 9 * step_s)
    assert expiry_s(sequence(1, 64, 10, slo=Slo(ttft_s=2.0)), []) == math.inf
    fast = replace(model, seconds=model.seconds / 2)
    made = sequence(1, 64, 10, slo=Slo(ttft_s=2.0))
    assert expiry_s(made, [model, fast]) == pytest.approx(2.0 - prefill_s / 2), "the fastest size may take it"


@given(
    prompt=st.integers(1, 120),
    output=st.integers(1, 80),
    sequences=st.integers(1, 4),
    late_s=st.floats(0.0, 3.0),
    slo=st.builds(Slo, e2e_s=st.floats(0.05, 2.0), ttft_s=st.none() | st.floats(0.02, 1.0)),
)
def test_a_request_that_expires_would_have_been_lost(prompt, output, sequences, late_s, slo):
    """The bound is cheap but never wrong: admission on an empty engine finds the same."""
    newcomer = sequence(2, prompt, output, slo=slo, sequences=sequences)
    if expiry_s(newcomer, [table(WIDE)]) <= late_s:
        assert check(Scoreboard(WIDE.block_tokens), newcomer, base_s=late_s) == LOST


# ---- the bound: a request that passes it passes the projection, on tables that do not rise everywhere ------


BOUND_SPEC = spec(kv_blocks=400, max_batch=24, no_evict=False, prefill_budget_tokens=48)
BOUND_TABLE = table(BOUND_SPEC)
slos = st.builds(
    Slo,
    e2e_s=st.none() | st.floats(0.1, 20),
    tbt_s=st.none() | st.floats(0.01, 0.2),
    ttft_s=st.none() | st.floats(0.02, 5),
)
kinds = st.sampled_from(["waits", "runs", "runs", "is lost", "was preempted"])
drawn_requests = st.tuples(st.integers(1, 90), st.integers(1, 60), slos, kinds, st.integers(0, 30))
FIRST = 30


def bumpy(seed, size):
    noise = 1 + size * np.random.default_rng(seed).random(BOUND_TABLE.seconds.shape)
    return replace(BOUND_TABLE, seconds=(BOUND_TABLE.seconds * noise).astype(np.float32))


def board_of(drawn, external):
    """Requests that began before `FIRST`; those that wait are dispatched about then, in their order."""
    board = Scoreboard(BOUND_SPEC.block_tokens)
    for key, (prompt, output, slo, kind, at) in enumerate(drawn):
        one = sequence(key, prompt, output, slo=slo, earliest=FIRST + key // 4 if kind == "waits" else at)
        board.dispatch(one)
        if kind != "waits":
            board.begin(key, at, 0.01 * at)
        if kind == "is lost":
            board.mark_lost(one)
        if kind == "was preempted" and at < FIRST:
            board.preempt(key, FIRST - 1)
    board.external = external
    return board


def both(board, newcomer, found, the_spec, **times):
    with mock.patch("throttllem.core.admission.surely_fits", return_value=False):
        projected = admit(board, the_spec, found, newcomer, **times)
    return surely_fits(board, the_spec, found, newcomer, **times), projected


@given(
    drawn=st.lists(drawn_requests, max_size=20),
    newcomer=drawn_requests,
    external=st.builds(ExternalLoad, batch=st.integers(-3, 3), kv_blocks=st.integers(-50, 50)),
    engine=st.tuples(st.booleans(), st.integers(8, 48)),
    passed=st.integers(0, 5),
    delay_s=st.sampled_from([0.0, 0.2]),
    margin=st.sampled_from([0.0, 0.05, 0.2]),
    bump=st.tuples(st.integers(0, 9), st.sampled_from([0.0, 0.5])),
    largest=st.sampled_from([24, 24, 6]),
)
def test_what_passes_the_bound_would_be_admitted(
    drawn, newcomer, external, engine, passed, delay_s, margin, bump, largest
):
    prompt, output, slo, _, later = newcomer
    first, (chunked, budget) = FIRST + passed, engine
    new = sequence(99, prompt, output, slo=slo, earliest=FIRST + 5 + later // 10)
    times = {"first": first, "base_s": 0.01 * first, "delay_s": delay_s, "margin": margin}
    the_spec = replace(BOUND_SPEC, chunked=chunked, prefill_budget_tokens=budget)
    found = bumpy(*bump)
    found = replace(found, hull=replace(found.hull, max_batch=largest))
    surely, projected = both(board_of(drawn, external), new, found, the_spec, **times)
    event("passes" if surely else "is projected")
    assert not surely or projected == ADMIT


def light(**slo):
    board = board_of([(40, 60, Slo(**slo), "runs", 0)], ExternalLoad())
    return both(board, sequence(2, 40, 60), BOUND_TABLE, BOUND_SPEC, first=0, base_s=0.0, delay_s=0.0, margin=0.0)


def test_the_bound_decides_where_deadlines_are_distant():
    # Two requests of 25 blocks: 19 ms an iteration at most, and one with a prompt of 40 tokens, twice.
    assert light(e2e_s=1.4) == (True, ADMIT)
    surely, projected = light(e2e_s=1.2)
    assert (surely, projected) == (False, ADMIT)


@pytest.mark.parametrize("change", ["lost", "several", "outside"])
def test_what_the_bound_leaves_to_the_projection(change):
    board = board_of([(40, 60, Slo(), "runs", 0)], ExternalLoad())
    new = sequence(2, 40, 60, sequences=2 if change == "several" else 1)
    new.lost = change == "lost"
    found = table(BOUND_SPEC, max_batch=1) if change == "outside" else BOUND_TABLE
    times = {"first": 0, "base_s": 0.0, "delay_s": 0.0, "margin": 0.0}
    assert not surely_fits(board, BOUND_SPEC, found, new, **times)
    assert surely_fits(board, BOUND_SPEC, BOUND_TABLE, sequence(2, 40, 60), **times)


def test_the_slowest_iteration_up_to_a_size():
    found = bumpy(3, 1.0)
    for batch, kv, prefill in ((1, 4, 0), (5, 100, 16), (24, 400, 256)):
        every = [
            found.at(1400, b, k, p)[0]
            for b in range(batch + 1)
            for k in range(0, kv + 1, 4)
            for p in range(0, prefill + 1, 16)
        ]
        assert math.isclose(found.slowest[found.cell(batch, kv, prefill)], max(every))
