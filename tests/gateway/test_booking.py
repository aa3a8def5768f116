"""Steps as energy, by exact reports, by prompt counts and by the time passed; nothing is booked twice or to nobody."""

import pytest
from core.toy import CLOCKS_MHZ, spec

from throttllem.engines.base import Report
from throttllem.gateway.energy.accounting import EnergyAccounting
from throttllem.gpu.simulated import SimulatedGpu


class Desk:
    """A booking whose time is set by hand; its GPU draws 100 W for anything and 40 W for nothing."""

    def __init__(self, *, exact=False):
        self.now_s = 0.0
        gpu = SimulatedGpu(CLOCKS_MHZ, switch_latency_s=0.0, watts=lambda mhz, work: 100.0, idle_w=40.0)
        self.meter = EnergyMeter(gpu=gpu)
        self.accounting = EnergyAccounting(meter=self.meter, now=lambda: self.now_s, kv_blocks=lambda: 3)
        self.accounting.begin(spec(), exact=exact)

    def after(self, seconds):
        self.now_s += seconds
        return self.accounting

    def exact(self, *, joules, seconds=1.0, rows=0, prefills=()):
        self.accounting.exact(
            Report(
                running=0, waiting=0, step=1, seconds=seconds, joules=joules, decode_sequences=rows, prefills=prefills
            )
        )

    @property
    def balance(self):
        ledger = self.meter.ledger
        return ledger.total_j, ledger.idle_j, ledger.open_j()


def test_time_is_shared_among_those_who_decode():
    desk = Desk()
    desk.after(1.0).dispatched(1, 1, 10)
    desk.after(2.0).stepped((1,))
    desk.accounting.joined(1)
    desk.after(1.0).stepped(())
    desk.accounting.dispatched(2, 3, 30)
    desk.after(1.0).stepped((2,))
    desk.accounting.joined(2)
    desk.after(4.0).stepped(())
    assert desk.accounting.left(1) == pytest.approx(200.0 + 100.0 + 100.0 / 31 + 100.0)
    assert desk.accounting.left(2) == pytest.approx(100.0 * 30 / 31 + 300.0)
    assert desk.balance == (pytest.approx(840.0), pytest.approx(40.0), 0.0)


def test_prompts_are_those_of_who_came_first():
    desk = Desk()
    desk.accounting.dispatched(1, 1, 10)
    desk.accounting.dispatched(2, 1, 30)
    desk.after(1.0).prompts(20)
    desk.after(1.0).prompts(20)
    desk.accounting.stepped((1, 2))
    assert desk.accounting.left(1) == pytest.approx(50.0)
    assert desk.accounting.left(2) == pytest.approx(150.0)


def test_who_leaves_pays_until_he_leaves():
    desk = Desk()
    desk.accounting.dispatched(1, 1, 10)
    desk.after(1.0).stepped((1,))
    desk.accounting.joined(1)
    assert desk.after(2.0).left(1) == pytest.approx(300.0)
    assert desk.accounting.left(1) is None
    desk.after(1.0).idle()
    assert desk.balance == (pytest.approx(340.0), pytest.approx(40.0), 0.0)


def test_an_engine_that_is_lost_is_paid_for_by_who_was_in_it():
    desk = Desk()
    desk.accounting.dispatched(1, 1, 10)
    desk.after(1.0).stepped((1,))
    desk.accounting.joined(1)
    desk.after(1.0).end()
    desk.after(50.0).idle()
    desk.accounting.begin(spec())
    assert desk.after(1.0).left(1) == pytest.approx(200.0)
    assert desk.balance == (pytest.approx(200.0 + 40.0), pytest.approx(40.0), 0.0)


def test_exact_reports_are_shared_among_those_who_are_here():
    desk = Desk()
    desk.accounting.dispatched(1, 1, 4)
    desk.accounting.dispatched(2, 1, 4)
    desk.after(1.0)
    desk.exact(joules=80.0, prefills=((1, 4), (2, 4)))
    desk.accounting.joined(1)
    desk.accounting.joined(2)
    assert desk.accounting.left(2) == pytest.approx(40.0)  # in mid-iteration: the engine still counts it
    desk.after(1.0)
    desk.exact(joules=60.0, rows=2)
    desk.accounting.paused(1)  # its last token: its client has yet to read it
    desk.after(1.0)
    desk.exact(joules=30.0, rows=1, prefills=((9, 5),))
    assert desk.accounting.left(1) == pytest.approx(100.0)
    total_j, idle_j, open_j = desk.balance
    assert (total_j, idle_j, open_j) == (pytest.approx(170.0), pytest.approx(30.0), 0.0)


def test_who_leaves_in_mid_iteration_leaves_no_idle_time_behind():
    """One second of idling, one step of two seconds that its only request did not see the end of, one second more."""
    desk = Desk(exact=True)
    desk.after(1.0).dispatched(1, 1, 4)
    desk.after(0.5).left(1)
    desk.after(0.5).idle()
    desk.accounting.dispatched(2, 1, 4)
    desk.accounting.left(2)
    desk.after(1.0)
    desk.exact(joules=80.0, seconds=2.0, prefills=((1, 4),))
    desk.after(1.0).idle()
    assert desk.meter.gpu.read().energy_j == pytest.approx(40.0 + 80.0 + 40.0)
    assert desk.balance == (pytest.approx(160.0), pytest.approx(160.0), 0.0)


def test_a_request_that_never_reached_an_exact_engine_hides_no_idle_time():
    desk = Desk(exact=True)
    desk.accounting.dispatched(1, 1, 4)
    desk.accounting.left(1)
    desk.after(5.0).idle()
    desk.accounting.dispatched(2, 1, 4)
    desk.after(1.0)
    desk.exact(joules=10.0, seconds=1.0, prefills=((2, 4),))
    assert desk.accounting.left(2) == pytest.approx(10.0)
    assert desk.balance == (pytest.approx(210.0), pytest.approx(200.0), 0.0)


def test_idle_time_before_an_exact_report_is_not_that_of_its_iteration():
    desk = Desk()
    desk.after(5.0)
    desk.exact(joules=10.0, seconds=2.0)
    assert desk.balance == (pytest.approx(130.0), pytest.approx(130.0), 0.0)
