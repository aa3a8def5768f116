"""What the search finds is a run of the simulator that meets enough, is never worse than its starts, and repeats."""

from dataclasses import replace

import numpy as np

from arena.small_task import SLO, small_task
from throttllem.arena.clairvoyant import SEGMENT_S, changed, following, search, search_holding
from throttllem.arena.schedule import Holds, cheapest, every_static


def test_a_schedule_beats_the_best_static_clock_and_is_what_its_run_comes_to():
    task = small_task()
    fixed, found = cheapest(task, every_static(task)), search(task, evaluations=150)
    assert found.met >= task.least_met
    assert found.energy_j < 0.99 * fixed.energy_j  # the burst is over in 5 of 60 s
    assert found.plan.segment_s == SEGMENT_S
    again = task.run(found.plan)
    assert (again.energy_j, again.met) == (found.energy_j, found.met)
    assert search(small_task(), evaluations=150).energy_j == found.energy_j


def test_following_the_load_is_a_start_of_its_own():
    task = small_task()
    fixed = cheapest(task, every_static(task))
    found = following(task, fixed)
    assert found.energy_j < fixed.energy_j
    assert found.met >= task.least_met
    assert np.unique(found.plan.clocks).size > 3


def test_holding_requests_pays_where_the_slo_leaves_time():
    loose = small_task(slo=replace(SLO, e2e_s=60.0))
    found = search(loose, evaluations=100)
    held = search_holding(loose, found, evaluations=100)
    assert held.met >= loose.least_met
    assert held.energy_j < found.energy_j
    assert held.plan.holds is not None
    assert loose.run(held.plan).energy_j == held.energy_j


def test_holding_requests_is_left_alone_where_first_tokens_are_due():
    task = small_task(slo=replace(SLO, ttft_s=0.5))
    found = search(task, evaluations=50)
    assert search_holding(task, found, evaluations=50).energy_j == found.energy_j


def test_changes_of_the_times_of_holding_keep_them_in_order():
    holds = Holds(border_s=np.array([0.0, 2.0, 10.0]), held=np.array([True, True]))
    first = changed(holds, 0)
    assert [other.border_s.tolist() for other in first[:-1]] == [
        [0.0, 10.0, 10.0],
        [0.0, 3.0, 10.0],
        [0.0, 1.0, 10.0],
        [0.0, 5.0, 10.0],
    ]
    assert first[-1].held.tolist() == [False, True]
    assert [other.border_s.tolist() for other in changed(holds, 1)[:-1]] == [[0.0, 2.0, 9.0], [0.0, 2.0, 7.0]]
