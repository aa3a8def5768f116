"""SLOs: judged one by one, counted once, over all time and over the last minutes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.core.types import Slo
from throttllem.gateway.control.slo_attainment import RECENT_S, Latencies, SloAttainment, SloCounts, added, judged

ALL = Slo(e2e_s=2.0, tbt_s=0.1, ttft_s=0.5)


@pytest.mark.parametrize(
    ("slo", "seen", "violated"),
    [
        (ALL, Latencies(e2e_s=2.0, tbt_s=0.1, ttft_s=0.5), ()),
        (ALL, Latencies(e2e_s=2.1, tbt_s=0.1, ttft_s=0.5), ("e2e_violated",)),
        (ALL, Latencies(e2e_s=2.0, tbt_s=0.2, ttft_s=0.6), ("tbt_violated", "ttft_violated")),
        (ALL, Latencies(e2e_s=1.0), ()),
        (Slo(tbt_s=0.1), Latencies(e2e_s=99.0, tbt_s=0.05), ()),
        (Slo(e2e_s=2.0, ttft_s=0.1), Latencies(e2e_s=2.1), ("e2e_violated",)),
    ],
)
def test_each_slo_by_itself(slo, seen, violated):
    found = judged(slo, seen, served=True)
    assert (found.with_slo, found.met) == (1, int(not violated))
    assert [name for name in ("e2e_violated", "tbt_violated", "ttft_violated") if getattr(found, name)] == list(
        violated
    )


def test_a_request_that_was_not_served_violates_all_its_slos():
    assert judged(Slo(e2e_s=1.0, ttft_s=1.0), Latencies(ttft_s=0.1), served=False) == SloCounts(
        with_slo=1, met=0, e2e_violated=1, ttft_violated=1
    )


def test_what_could_not_be_seen_is_neither_met_nor_violated():
    """An output in one piece shows no token."""
    unseen = Latencies(e2e_s=1.0)
    assert judged(Slo(tbt_s=0.1, ttft_s=0.1), unseen, served=True) == SloCounts()
    assert judged(Slo(tbt_s=0.1), unseen, served=False) == SloCounts(with_slo=1, tbt_violated=1)
    assert judged(Slo(e2e_s=0.5, tbt_s=0.1), unseen, served=True) == SloCounts(with_slo=1, e2e_violated=1)


def test_a_request_without_an_slo_does_not_count():
    assert judged(Slo(), Latencies(e2e_s=1.0), served=False) == SloCounts()


@given(st.lists(st.tuples(st.floats(0.0, 120.0), st.booleans()), max_size=60))
def test_the_last_minutes_are_a_part_of_everything(steps):
    attainment, now_s, ends = SloAttainment(), 0.0, []
    for gap_s, met in steps:
        now_s += gap_s
        one = SloCounts(with_slo=1, met=int(met), e2e_violated=int(not met))
        attainment.ended(one, now_s)
        ends.append((now_s, one))
    assert attainment.ever.with_slo == len(steps)
    assert attainment.ever.met == sum(met for _, met in steps)
    # Slices of some seconds: what ended up to one slice longer ago may be in or out.
    least = sum(1 for at_s, _ in ends if at_s > now_s - RECENT_S + 5.0)
    most = sum(1 for at_s, _ in ends if at_s >= now_s - RECENT_S)
    assert least <= attainment.recent(now_s).with_slo <= most
    assert attainment.recent(now_s + RECENT_S + 5.0) == SloCounts()


def test_sums():
    one = SloCounts(with_slo=1, met=0, e2e_violated=1, tbt_violated=1)
    assert added(one, one) == SloCounts(with_slo=2, met=0, e2e_violated=2, tbt_violated=2)


def test_attainment_is_unknown_while_no_request_had_an_slo():
    assert SloCounts().attainment is None
    assert SloCounts(with_slo=4, met=3).attainment == 0.75
