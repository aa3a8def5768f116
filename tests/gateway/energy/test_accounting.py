"""Joules of requests: shared by the tokens processed between two settlements, whatever the engine reports of its steps.
Requests' and idle joules add up to the GPU's counter.
"""

import pytest
from core.toy import CLOCKS_MHZ, spec, table
from hypothesis import given
from hypothesis import strategies as st
from launchers.fake import process

from throttllem.core.clocks.savings_estimate import SavingsEstimate
from throttllem.engines.base import Report
from throttllem.engines.progress import Progress
from throttllem.gateway.control.backend import Backend
from throttllem.gateway.control.clock_setter import ClockSetter
from throttllem.gateway.control.engine_model import EngineModel
from throttllem.gateway.energy.accounting import Energy, EnergyAccounting
from throttllem.gateway.energy.table_meter import TableMeter
from throttllem.gpu.device import Reading
from throttllem.gpu.simulated import SimulatedGpu


class Desk:
    """A backend that is connected to no engine, with its time set by hand. Its simulated GPU draws 100 W for any work
    and 40 W when idle.
    """

    def __init__(self, *, exact=False, gpu=None, **estimates):
        self.now_s, self.events, self.left_j = 0.0, [], 0.0
        self.gpu = gpu or SimulatedGpu(CLOCKS_MHZ, switch_latency_s=0.0, watts=lambda mhz, work: 100.0, idle_w=40.0)
        self.accounting = EnergyAccounting(gpu=self.gpu, now=lambda: self.now_s, kv_blocks=lambda: 3, **estimates)
        self.backend = Backend(
            name="toy",
            kind="simulated",
            tp=1,
            catalogue_gpu="toy",
            model=EngineModel(catalogue=None, gpu="toy", tp=1, name="toy"),
            engine=None,
            clock=ClockSetter(name="toy", gpu=self.gpu, reading=self.gpu.read, now=lambda: self.now_s),
            accounting=self.accounting,
            process=process(lambda: self.now_s),
            now=lambda: self.now_s,
        )
        self.connect(exact=exact)

    def connect(self, *, exact=False):
        self.backend.key, self.backend.state, self.backend._emit = 0, "up", self.events.append
        self.backend.progress = Progress(0, exact=exact)
        self.accounting.begin(spec(), self.backend.progress)

    def after(self, seconds):
        self.now_s += seconds
        return self

    def dispatched(self, request_id, *, prompt_tokens, sequences=1):
        self.backend.dispatched(request_id, streams=True, sequences=sequences, prompt_tokens=prompt_tokens * sequences)

    def tokens(self, *request_ids, count=1):
        for request_id in request_ids:
            self.backend.progress.token(request_id, count)

    def settle(self):
        self.accounting.settle()

    def left(self, request_id):
        joules = self.backend.left(request_id)
        self.left_j += joules or 0.0
        return joules

    def step(self, *, joules, seconds=1.0, step=1, sequences=0, **more):
        """An exact engine's report of a step that ends now."""
        self.backend._reported(
            Report(**{"running": 0, "waiting": 0} | more)
            if joules is None
            else Report(
                **{"running": 0, "waiting": 0, "started": (), "finished": ()} | more,
                step=step,
                seconds=seconds,
                joules=joules,
                decode_sequences=sequences,
            )
        )

    @property
    def totals(self):
        """All joules, and the idle ones; requests' and idle joules are all."""
        open_j = sum(flight.energy_j for flight in self.backend.progress.in_flight.values())
        assert self.left_j + open_j + self.accounting.idle_j == pytest.approx(self.accounting.total_j)
        return self.accounting.total_j, self.accounting.idle_j


# ---- shared by tokens ----------------------------------------------------------------------------------------


def test_time_is_shared_by_the_tokens_that_were_processed_in_it():
    desk = Desk()
    desk.after(1.0).dispatched(1, prompt_tokens=10)
    desk.after(2.0).tokens(1)
    desk.settle()
    desk.dispatched(2, prompt_tokens=10, sequences=3)
    desk.after(1.0).tokens(1, 1)
    desk.tokens(2, count=3)
    desk.settle()
    desk.after(4.0).tokens(1)
    desk.tokens(2, count=3)
    assert desk.left(1) == pytest.approx(200.0 + 100.0 * 2 / (2 + 30 + 3) + 400.0 / 4)
    assert desk.left(2) == pytest.approx(100.0 * 33 / 35 + 400.0 * 3 / 4)
    assert desk.totals == (pytest.approx(740.0), pytest.approx(40.0))


def test_a_settlement_between_tokens_leaves_the_time_open_for_the_next_token():
    """A long prefill shows no token: it is the request's all the same, not idle time."""
    desk = Desk()
    desk.dispatched(1, prompt_tokens=1000)
    for _ in range(8):
        desk.after(0.25).settle()
    assert desk.totals == (0.0, 0.0)
    desk.tokens(1)
    assert desk.left(1) == pytest.approx(200.0)


def test_prompts_are_charged_in_the_order_of_arrival_where_only_their_sum_is_reported():
    desk = Desk()
    desk.dispatched(1, prompt_tokens=10)
    desk.dispatched(2, prompt_tokens=30)
    for _ in range(2):
        desk.after(1.0).accounting.processed_prompts(20)
        desk.settle()
    desk.tokens(1, 2)
    assert desk.left(1) == pytest.approx(50.0)
    assert desk.left(2) == pytest.approx(150.0)


def test_reported_prompt_tokens_are_charged_once():
    """Once with the report of the step, not again with the first token."""
    desk = Desk()
    desk.dispatched(1, prompt_tokens=10)
    desk.dispatched(2, prompt_tokens=10)
    desk.after(1.0).step(joules=None, step=1, running=1, prompt_tokens=10)
    desk.tokens(1)
    desk.settle()
    desk.after(1.0).step(joules=None, step=2, running=2, prompt_tokens=10)
    desk.tokens(1, 2)
    assert desk.left(1) == pytest.approx(100.0 + 100.0 / 12)
    assert desk.left(2) == pytest.approx(100.0 * 11 / 12)


def test_more_prompt_tokens_than_there_are_charge_no_request():
    """Those of other clients' prompts."""
    desk = Desk()
    desk.dispatched(1, prompt_tokens=10)
    desk.after(1.0).accounting.processed_prompts(500)
    desk.settle()
    (flight,) = desk.backend.progress.in_flight.values()
    assert (flight.processed_prompt_tokens, flight.charged_prompt_tokens) == (10, 10)


# ---- requests that leave -------------------------------------------------------------------------------------


def test_a_cancelled_request_pays_for_its_tokens_and_the_rest_is_idle():
    desk = Desk()
    desk.dispatched(1, prompt_tokens=10)
    desk.after(1.0).tokens(1)
    desk.settle()
    desk.after(1.0).tokens(1)
    assert desk.left(1) == pytest.approx(200.0)
    assert desk.left(1) is None
    desk.after(1.0).settle()
    assert desk.totals == (pytest.approx(240.0), pytest.approx(40.0))


def test_a_cancelled_request_whose_tokens_are_settled_leaves_the_time_since_to_the_others():
    desk = Desk()
    desk.dispatched(1, prompt_tokens=10)
    desk.dispatched(2, prompt_tokens=10)
    desk.after(1.0).tokens(1, 2)
    desk.settle()
    assert desk.after(1.0).left(1) == pytest.approx(50.0)
    desk.after(1.0).tokens(2)
    assert desk.left(2) == pytest.approx(50.0 + 200.0)
    assert desk.totals == (pytest.approx(300.0), 0.0)


def test_a_request_that_never_ran_has_no_joules():
    desk = Desk()
    desk.dispatched(1, prompt_tokens=10)
    assert desk.after(1.0).left(1) is None
    assert desk.left(2) is None
    assert desk.totals == (pytest.approx(40.0), pytest.approx(40.0))


def test_a_preempted_request_keeps_its_joules_and_pays_for_its_second_run():
    desk = Desk(exact=True)
    desk.dispatched(1, prompt_tokens=4)
    desk.dispatched(2, prompt_tokens=4)
    desk.after(1.0).step(joules=80.0, step=1, running=2, started=(1, 2), prefills=((1, 4), (2, 4)))
    desk.settle()
    desk.after(1.0).step(joules=60.0, step=2, running=1, waiting=1, sequences=1, preempted=(2,))
    desk.settle()
    desk.after(1.0).step(joules=90.0, step=3, running=2, sequences=1, started=(2,), prefills=((2, 5),))
    first_j, second_j = desk.left(1), desk.left(2)
    assert first_j == pytest.approx(40.0 + 60.0 + 90.0 / 7)
    assert second_j == pytest.approx(40.0 + 90.0 * 6 / 7)
    assert desk.totals == (pytest.approx(230.0), 0.0)


def test_requests_in_a_lost_engine_pay_for_it_until_it_is_lost():
    desk = Desk()
    desk.dispatched(1, prompt_tokens=10)
    desk.after(1.0).tokens(1)
    desk.settle()
    desk.after(1.0).tokens(1)
    desk.accounting.end()
    desk.after(50.0).settle()
    assert desk.left(1) == pytest.approx(200.0)
    desk.connect()
    desk.after(1.0).settle()
    assert desk.totals == (pytest.approx(200.0 + 40.0), pytest.approx(40.0))


def test_what_a_lost_engine_drew_without_a_token_is_idle():
    desk = Desk()
    desk.dispatched(1, prompt_tokens=10)
    desk.after(2.0).accounting.end()
    assert desk.left(1) is None
    assert desk.totals == (pytest.approx(80.0), pytest.approx(80.0))


# ---- engines that measure their steps ------------------------------------------------------------------------


def test_measured_steps_are_shared_by_the_tokens_in_them():
    desk = Desk(exact=True)
    desk.dispatched(1, prompt_tokens=4)
    desk.dispatched(2, prompt_tokens=4)
    desk.after(1.0).step(joules=80.0, step=1, running=2, started=(1, 2), prefills=((1, 4), (2, 4)))
    assert desk.left(2) == pytest.approx(40.0)  # in mid-iteration: the engine still counts it
    desk.after(1.0).step(joules=60.0, step=2, running=1, sequences=2, finished=(1,))
    assert desk.left(1) == pytest.approx(40.0 + 60.0)
    desk.after(1.0).step(joules=30.0, step=3, sequences=1, prefills=((9, 5),))
    desk.after(1.0).settle()
    assert desk.totals == (pytest.approx(170.0 + 40.0), pytest.approx(30.0 + 40.0))


def test_a_request_that_leaves_in_mid_iteration_leaves_no_idle_time_behind():
    """One second idle, a step of two seconds that its only request did not see the end of, one second idle."""
    desk = Desk(exact=True)
    desk.after(1.0).dispatched(1, prompt_tokens=4)
    desk.after(0.5).left(1)
    desk.after(0.5).settle()
    desk.dispatched(2, prompt_tokens=4)
    desk.left(2)
    desk.after(1.0).step(joules=80.0, seconds=2.0, prefills=((1, 4),))
    desk.after(1.0).settle()
    assert desk.gpu.read().energy_j == pytest.approx(40.0 + 80.0 + 40.0)
    assert desk.totals == (pytest.approx(160.0), pytest.approx(160.0))


def test_a_request_that_never_reached_the_engine_hides_no_idle_time():
    desk = Desk(exact=True)
    desk.dispatched(1, prompt_tokens=4)
    desk.left(1)
    desk.after(5.0).settle()
    desk.dispatched(2, prompt_tokens=4)
    desk.after(1.0).step(joules=10.0, running=1, started=(2,), prefills=((2, 4),))
    assert desk.left(2) == pytest.approx(10.0)
    assert desk.totals == (pytest.approx(210.0), pytest.approx(200.0))


def test_idle_time_before_a_measured_step_does_not_belong_to_it():
    desk = Desk(exact=True)
    desk.after(5.0).step(joules=10.0, seconds=2.0)
    desk.settle()
    desk.accounting.end()
    assert desk.gpu.read().energy_j == pytest.approx(130.0)
    assert desk.totals == (pytest.approx(130.0), pytest.approx(130.0))


def test_an_engine_that_is_lost_in_mid_iteration_loses_no_joule():
    """Its last report held no request that is still here."""
    desk = Desk(exact=True)
    desk.dispatched(1, prompt_tokens=4)
    desk.after(0.5).left(1)
    desk.after(0.5).step(joules=80.0, running=1, prefills=((1, 4),))
    desk.accounting.end()
    assert desk.totals == (pytest.approx(80.0), pytest.approx(80.0))


# ---- the counter ---------------------------------------------------------------------------------------------


class Counter:
    """A GPU whose counter is set by hand."""

    def __init__(self):
        self.reading = Reading(clock_mhz=1400, watts=1.0, energy_j=1000.0)

    def rose(self, joules, **more):
        self.reading = Reading(**{"clock_mhz": 1400, "watts": 1.0, "energy_j": self.reading.energy_j + joules} | more)

    def read(self):
        return self.reading

    def worked(self, work):
        pass

    def idled(self, seconds):
        pass


def test_the_counter_before_the_engine_was_up_is_not_ours():
    gpu = Counter()
    desk = Desk(gpu=gpu)
    desk.dispatched(1, prompt_tokens=10)
    desk.dispatched(2, prompt_tokens=20)
    gpu.rose(32.0)
    desk.after(1.0).tokens(1, 2)
    desk.settle()
    gpu.rose(8.0)
    desk.after(1.0).tokens(1, 2)
    assert (desk.left(1), desk.left(2)) == (pytest.approx(32.0 * 11 / 32 + 4.0), pytest.approx(32.0 * 21 / 32 + 4.0))
    gpu.rose(5.0)
    desk.after(1.0).accounting.end()
    gpu.rose(99.0)  # while the engine was down
    desk.connect()
    assert desk.accounting.energy() == Energy(total_j=45.0, idle_j=5.0, watts=1.0)


def test_a_simulated_gpu_draws_by_the_work_between_two_settlements():
    drawn = []
    gpu = SimulatedGpu(
        CLOCKS_MHZ, switch_latency_s=0.0, watts=lambda mhz, work: drawn.append(work) or mhz / 10, idle_w=40.0
    )
    desk = Desk(gpu=gpu)
    desk.dispatched(7, prompt_tokens=10, sequences=3)
    desk.after(2.0).tokens(7, count=3)
    desk.settle()
    assert desk.accounting.energy().watts == 140.0
    for _ in range(4):
        desk.after(0.5).tokens(7, count=3)
    assert desk.left(7) == pytest.approx(280.0 + 280.0)
    desk.after(1.5).settle()
    assert [(work.seconds, work.decode_sequences, work.prefill_tokens) for work in drawn] == [(2.0, 3, 30), (2.0, 3, 0)]
    assert all(work.kv_tokens == 3 * spec().block_tokens for work in drawn)
    energy = desk.accounting.energy()
    assert (energy.total_j, energy.idle_j, energy.watts) == (pytest.approx(620.0), pytest.approx(60.0), 40.0)


HAPPENED = st.lists(
    st.tuples(
        st.sampled_from(["dispatched", "tokens", "left", "settle", "step", "prompts", "lost"]),
        st.integers(0, 6),
        st.floats(0.0, 3.0),
        st.floats(0.0, 500.0),
    ),
    max_size=60,
)


@given(HAPPENED, st.booleans())
def test_requests_and_idle_joules_add_up_to_the_counter(happened, exact):
    """Whatever comes in whatever order, with a counter that goes its own way."""
    gpu = Counter()
    desk = Desk(gpu=gpu, exact=exact)
    down_j = 0.0
    for what, number, seconds, joules in happened:
        gpu.rose(joules)
        desk.after(seconds)
        match what:
            case "dispatched" if number not in desk.backend.progress.in_flight:
                desk.dispatched(number, prompt_tokens=1 + number)
            case "tokens":
                desk.tokens(number, count=1 + number % 3)
            case "left":
                desk.left(number)
            case "settle":
                desk.settle()
            case "step" if exact:
                here = tuple(desk.backend.progress.in_flight)[: number + 1]
                desk.step(
                    joules=1.0, step=len(desk.events), running=number % 2, prefills=tuple((key, 1) for key in here)
                )
            case "prompts":
                desk.accounting.processed_prompts(number)
            case "lost":
                desk.accounting.end()
                for request_id in tuple(desk.backend.progress.in_flight):
                    desk.left(request_id)
                gpu.rose(joules)
                down_j += joules
                desk.connect(exact=exact)
        assert all(flight.energy_j >= 0.0 for flight in desk.backend.progress.in_flight.values())
    desk.after(1.0).accounting.end()
    total_j, _ = desk.totals
    assert total_j == pytest.approx(gpu.read().energy_j - 1000.0 - down_j)


# ---- estimates -----------------------------------------------------------------------------------------------


def test_what_the_clocks_of_a_dry_run_would_have_saved():
    """An engine at the maximum clock whose dry run goes lower: an estimate below what it took; where clocks are set
    there is none.
    """

    def energy(dry_run_mhz):
        gpu, made = Counter(), spec(max_batch=64, kv_blocks=2000)
        law = table(made)
        desk = Desk(gpu=gpu, at_maximum=SavingsEstimate(table=law), dry_run=SavingsEstimate(table=law))
        desk.accounting.begin(made, desk.backend.progress)
        for number in range(75):
            desk.dispatched(number, prompt_tokens=4)
            for _ in range(20):
                gpu.rose(3.0, dry_run_mhz=dry_run_mhz)
                desk.after(0.03).tokens(number)
            desk.left(number)
        return desk.accounting.energy()

    advised, top, real = energy(CLOCKS_MHZ[0]), energy(CLOCKS_MHZ[-1]), energy(None)
    assert 0.1 < advised.would_save < 0.8
    assert advised.saved == pytest.approx(0.0)
    assert top.would_save == pytest.approx(0.0)
    assert (real.would_save, real.advised_j) == (None, None)


def test_joules_of_requests_without_control_are_not_idle():
    desk = Desk()
    desk.after(1.0)
    with desk.backend.uncontrolled():
        desk.after(2.0)
        with desk.backend.uncontrolled():
            desk.after(3.0)
    found = desk.after(4.0).accounting.energy()
    # A simulated GPU knows only of what it is given: it draws idle power meanwhile.
    assert (found.idle_j, found.uncontrolled_j, found.total_j) == (200.0, 200.0, 400.0)
    assert [(type(event).__name__, event.requests) for event in desk.events] == [
        ("Uncontrolled", 1), ("Uncontrolled", 2), ("Uncontrolled", 1), ("Uncontrolled", 0)
    ]  # fmt: skip


def test_an_engine_that_speculates_keeps_to_its_table_and_is_compared_by_whole_steps():
    """Four tokens a step in the time of one: no bias, and a lower clock that only holds the load so saves."""

    def served(*, accepted):
        gpu, made = Counter(), spec(max_batch=64, kv_blocks=2000)
        law = table(made)
        meter = TableMeter(table=law)
        desk = Desk(gpu=gpu, meter=meter, dry_run=SavingsEstimate(table=law))
        desk.accounting.begin(made, desk.backend.progress)
        step_s, step_w = law.at(CLOCKS_MHZ[-1], 1, 3, 0)
        for number in range(2000):
            if number % 50 == 0:
                desk.left(number - 50)
                desk.dispatched(number, prompt_tokens=4)
            gpu.rose(step_s * step_w, clock_mhz=CLOCKS_MHZ[-1], dry_run_mhz=CLOCKS_MHZ[0])
            report = Report(running=1, waiting=0, step=number, generated_tokens=1 + accepted, accepted_tokens=accepted)
            desk.after(step_s).backend.progress.report(report)
            desk.tokens(number - number % 50, count=1 + accepted)
            desk.settle()
        return meter.view()[-1].seconds_bias, desk.accounting.energy().would_save

    (plain_bias, plain), (fast_bias, fast) = served(accepted=0), served(accepted=3)
    assert plain_bias == pytest.approx(1.0, rel=0.02)
    assert fast_bias == pytest.approx(1.0, rel=0.02)
    assert fast == pytest.approx(plain, abs=0.05)
