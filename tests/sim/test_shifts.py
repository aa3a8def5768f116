"""What goes wrong in a run comes at its time, is seen by the core as a gateway's would be, and ends."""

import pytest
from core.toy import TOP_MHZ, request
from sim.toy_runs import simulate, steady

from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.types import ClockRead, Observed, Slo
from throttllem.sim.shifts import LoadReport, OtherClient, Pace, faster, held_down, longer, other_client


def reads(run):
    return [(now_s, event) for now_s, event, _ in run.log if isinstance(event, ClockRead)]


def test_an_engine_becomes_slower_and_recovers():
    plain = simulate([request(1, 4, 2, arrival_s=1.0), request(2, 4, 2, arrival_s=3.0)])
    run = simulate(
        [request(1, 4, 2, arrival_s=1.0), request(2, 4, 2, arrival_s=3.0), request(3, 4, 2, arrival_s=5.0)],
        shifts=(Pace(at_s=2.0, factor=1.5), Pace(at_s=4.0, factor=1.0)),
    )
    took_s = [life.ended_s - life.request.arrival_s for life in run.lives.values()]
    alone_s = plain.lives[1].ended_s - 1.0
    assert took_s == pytest.approx([alone_s, 1.5 * alone_s, alone_s])


def test_gpus_that_are_held_down_run_at_no_higher_clock_until_they_are_free():
    run = simulate(steady(2, 6), shifts=held_down(2.0, 4.0, 800))
    assert reads(run) == [
        (2.0, ClockRead(engine=0, mhz=800, limit_mhz=800)),
        (4.0, ClockRead(engine=0, mhz=TOP_MHZ)),
    ]
    assert {mhz for mhz, _, _ in run.physics[1].log} == {800, TOP_MHZ}


def test_a_clock_that_is_set_meanwhile_is_in_force_afterwards():
    run = simulate(steady(2, 6), ClockPolicy.FIXED, shifts=held_down(0.02, 4.0, 600))
    assert [(event.mhz, event.limit_mhz) for _, event in reads(run)] == [(600, 600), (600, 600), (1000, None)]


def test_another_client_makes_iterations_longer_and_the_reports_show_it():
    alone = simulate(steady(2, 6))
    run = simulate(steady(2, 6), shifts=other_client(2.0, 4.0, 3, 20))
    assert max(s for _, s, _ in run.physics[1].log) > max(s for _, s, _ in alone.physics[1].log)
    seen = [(now_s, event.running, event.kv_blocks) for now_s, event, _ in run.log if isinstance(event, Observed)]
    assert [now_s for now_s, _, _ in seen] == pytest.approx([2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0][: len(seen)])
    assert all((running >= 3) == (now_s <= 4.0) for now_s, running, _ in seen if now_s != 4.0)
    assert run.controller.external_sequences(0) == 0, "it has left"


def test_the_core_plans_with_the_other_client_and_learns_of_its_requests_apart():
    slo = Slo(e2e_s=0.3, attainment=0.9)
    shifts = (OtherClient(at_s=2.0, sequences=4, context_tokens=8), *(LoadReport(at_s=2.0 + n / 4) for n in range(80)))
    run = simulate(steady(4, 20, slo=slo), ClockPolicy.LEAST_ENERGY, shifts=shifts)
    assert run.controller.external_sequences(0) == 4
    (only,) = run.controller.snapshot().attainment
    assert only.ended == len(run.lives)
    assert run.controller.state().margins.by_class[""].load > 0.0


def test_requests_come_faster_from_a_time_on():
    plain = steady(2, 4)
    found = list(faster(plain, 1.0, 2.0))
    assert [one.arrival_s for one in found] == [0.0, 0.5, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25]
    assert [one.id for one in found] == [one.id for one in plain]


def test_outputs_get_longer_from_a_time_on_within_their_limit():
    found = list(longer(steady(1, 4, answer=16, max_tokens=20), 2.0, 1.5))
    assert [one.output_tokens for one in found] == [16, 16, 20, 20]
    assert [one.output_tokens for one in longer(steady(1, 2, answer=16), 0.0, 0.01)] == [1, 1]
