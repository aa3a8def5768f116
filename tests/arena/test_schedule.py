"""What a plan comes to is what a simulation of it comes to; the best static clock is one that meets enough."""

from dataclasses import replace

import numpy as np
import pytest

from arena.small_task import SLO, WINDOW_S, small_task
from throttllem.arena.schedule import Holds, Plan, cheapest, every, every_static, least_met, static
from throttllem.core.types import Slo


def test_half_a_point_of_attainment_may_be_given_up():
    assert least_met(1000, 1000) == 995
    assert least_met(990, 1000) == 985
    assert least_met(100, 100) == 100  # half a request is none


def test_the_best_static_clock_is_the_cheapest_that_meets_enough():
    task = small_task()
    statics = every_static(task)
    found = cheapest(task, statics)
    assert found.met >= task.least_met
    enough = [outcome.energy_j for outcome in statics if outcome.met >= task.least_met]
    assert found.energy_j == min(enough)
    assert found.energy_j < statics[-1].energy_j
    with pytest.raises(ValueError, match="no clock meets"):
        cheapest(replace(task, least_met=task.requests.arrival_s.size + 1), statics)


def test_met_counts_each_slo():
    task = small_task()
    run = task.advance(task.engine.begin(), static(40))
    e2e_s = run.ended_s - task.requests.arrival_s
    ttft_s = run.first_token_s - task.requests.arrival_s
    tpot_s = (run.ended_s - run.first_token_s) / np.maximum(1, task.requests.output_tokens - 1)
    for slo, met in (
        (Slo(e2e_s=float(np.median(e2e_s))), e2e_s <= np.median(e2e_s)),
        (Slo(ttft_s=float(np.median(ttft_s))), ttft_s <= np.median(ttft_s)),
        (Slo(tbt_s=float(np.median(tpot_s))), tpot_s <= np.median(tpot_s)),
        (Slo(), e2e_s > 0),
    ):
        assert replace(task, slo=slo).met(run) == met.sum()


def test_energy_is_counted_over_the_window():
    task = small_task()
    run = task.advance(task.engine.begin(), static(80))
    assert run.now_s < WINDOW_S
    assert task.energy_j(run) == run.energy_j + (WINDOW_S - run.now_s) * task.engine.idle_w
    assert replace(task, window_s=1.0).energy_j(run) == run.energy_j


def test_a_plan_of_equal_segments_is_the_static_clock():
    task = small_task()
    clocks = np.full(15, 50)
    fixed, by_segment = task.run(static(50)), task.run(Plan(segment_s=5.0, clocks=clocks))
    assert (fixed.energy_j, fixed.met) == (by_segment.energy_j, by_segment.met)
    clocks[3] = 80
    assert task.run(Plan(segment_s=5.0, clocks=clocks)).energy_j > fixed.energy_j


def test_requests_are_held_until_the_end_of_their_time():
    arrival_s = np.array([0.0, 3.0, 9.9, 10.0, 19.0, 31.0])
    holds = every(10.0, 25.0)
    assert holds.border_s.tolist() == [0.0, 10.0, 20.0, 30.0]
    assert holds.release_s(arrival_s).tolist() == [10.0, 10.0, 10.0, 20.0, 20.0, 31.0]
    passing = Holds(border_s=holds.border_s, held=np.array([True, False, True]))
    assert passing.release_s(arrival_s).tolist() == [10.0, 10.0, 10.0, 10.0, 19.0, 31.0]
    task = small_task(slo=replace(SLO, e2e_s=60.0))
    run = task.advance(task.engine.begin(), static(80, every(10.0, 60.0)))
    assert (run.first_token_s > every(10.0, 60.0).release_s(task.requests.arrival_s)).all()
