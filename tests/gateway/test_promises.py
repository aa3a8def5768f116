"""Promises: judged one by one, counted once, over all time and over the last minutes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.core.types import Slo
from throttllem.gateway.control.slo_attainment import RECENT_S, Latencies, SloAttainment, added, judged
from throttllem.gateway.telemetry.status import SloCounts

ALL = Slo(e2e_s=2.0, tbt_s=0.1, ttft_s=0.5)


@pytest.mark.parametrize(
    ("slo", "seen", "missed"),
    [
        (ALL, Latencies(e2e_s=2.0, tbt_s=0.1, ttft_s=0.5), ()),
        (ALL, Latencies(e2e_s=2.1, tbt_s=0.1, ttft_s=0.5), ("e2e_violated",)),
        (ALL, Latencies(e2e_s=2.0, tbt_s=0.2, ttft_s=0.6), ("tbt_violated", "ttft_violated")),
        (ALL, Latencies(e2e_s=1.0), ()),
        (Slo(tbt_s=0.1), Latencies(e2e_s=99.0, tbt_s=0.05), ()),
        (Slo(e2e_s=2.0, ttft_s=0.1), Latencies(e2e_s=2.1), ("e2e_violated",)),
    ],
)
def test_each_promise_by_itself(slo, seen, missed):
    found = judged(slo, seen, served=True)
    assert (found.with_slo, found.met) == (1, int(not missed))
    assert [name for name in ("e2e_violated", "tbt_violated", "ttft_violated") if getattr(found, name)] == list(missed)


def test_one_that_was_not_served_kept_nothing_of_what_it_was_promised():
    assert judged(Slo(e2e_s=1.0, ttft_s=1.0), Latencies(ttft_s=0.1), served=False) == SloCounts(
        with_slo=1, met=0, e2e_violated=1, ttft_violated=1
    )


def test_what_could_not_be_seen_was_not_kept():
    """An answer in one piece shows no token."""
    unseen = Latencies(e2e_s=1.0)
    assert judged(Slo(tbt_s=0.1, ttft_s=0.1), unseen, served=True) == SloCounts()
    assert judged(Slo(tbt_s=0.1), unseen, served=False) == SloCounts(with_slo=1, tbt_violated=1)
    assert judged(Slo(e2e_s=0.5, tbt_s=0.1), unseen, served=True) == SloCounts(with_slo=1, e2e_violated=1)


def test_no_promise_is_neither_kept_nor_broken():
    assert judged(Slo(), Latencies(e2e_s=1.0), served=False) == SloCounts()


@given(st.lists(st.tuples(st.floats(0.0, 120.0), st.booleans()), max_size=60))
def test_the_last_minutes_are_a_part_of_everything(steps):
    promises, now_s, all_of_them = SloAttainment(), 0.0, []
    for gap_s, kept in steps:
        now_s += gap_s
        one = SloCounts(with_slo=1, met=int(kept), e2e_violated=int(not kept))
        promises.ended(one, now_s)
        all_of_them.append((now_s, one))
    assert promises.ever.with_slo == len(steps)
    assert promises.ever.met == sum(kept for _, kept in steps)
    # Slices of some seconds: what ended up to one slice longer ago may be in or out.
    least = sum(1 for at_s, _ in all_of_them if at_s > now_s - RECENT_S + 5.0)
    most = sum(1 for at_s, _ in all_of_them if at_s >= now_s - RECENT_S)
    assert least <= promises.recent(now_s).with_slo <= most
    assert promises.recent(now_s + RECENT_S + 5.0) == SloCounts()


def test_sums():
    one = SloCounts(with_slo=1, met=0, e2e_violated=1, tbt_violated=1)
    assert added(one, one) == SloCounts(with_slo=2, met=0, e2e_violated=2, tbt_violated=2)
