"""No run goes below the bound, whatever its clocks and holds; its parts are below the law at every clock."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arena.small_task import ENGINE, SLO, small_task
from throttllem.arena.bound import affine, at_most_together, lower_bound_j
from throttllem.arena.clairvoyant import search
from throttllem.arena.schedule import Plan, every
from throttllem.config import BatchingOptions, Noise
from throttllem.core.types import Slo
from throttllem.engines.simulated.fleet import build_fleet
from throttllem.physics.catalogue import Catalogue

SILENT = Noise(time=0.0, power=0.0)
SPEC, PHYSICS = ENGINE


@pytest.mark.parametrize("slo", [SLO, replace(SLO, e2e_s=4.0), replace(SLO, ttft_s=0.5), replace(SLO, tbt_s=0.02)])
@settings(max_examples=12, deadline=None)
@given(clocks=st.lists(st.integers(0, 80), min_size=15, max_size=15), period_s=st.sampled_from([None, 3.0, 20.0]))
def test_no_plan_that_meets_enough_goes_below(slo, clocks, period_s):
    task = small_task(slo=slo, noise=SILENT)
    bound_j = lower_bound_j(task, SPEC, PHYSICS)
    holds = None if period_s is None else every(period_s, 60.0)
    outcome = task.run(Plan(segment_s=5.0, clocks=np.array(clocks), holds=holds))
    assert bound_j < outcome.energy_j or outcome.met < task.least_met
    free = replace(task, slo=Slo(), least_met=0)
    assert lower_bound_j(free, SPEC, PHYSICS) < outcome.energy_j


def test_it_lies_under_what_the_search_finds_and_above_an_idle_engine():
    task = small_task(noise=SILENT)
    found, bound_j = search(task, evaluations=150), lower_bound_j(task, SPEC, PHYSICS)
    assert task.engine.idle_w * task.window_s < 0.9 * bound_j
    assert bound_j < found.energy_j < 1.4 * bound_j


def test_tighter_slos_raise_it():
    bounds_j = [
        lower_bound_j(replace(small_task(slo=replace(SLO, e2e_s=e2e_s), noise=SILENT), least_met=met), SPEC, PHYSICS)
        for e2e_s, met in ((30.0, 60), (8.0, 60), (8.0, 30))
    ]
    assert bounds_j[1] > bounds_j[0]
    assert bounds_j[1] > bounds_j[2]


@pytest.mark.parametrize(
    ("gpu", "model", "tp"),
    [
        ("a100-40gb-sxm", "llama-2-13b", 2),
        ("h100-80gb-sxm", "llama-3-70b", 4),  # messages in one step or two; at the power limit
        ("h100-80gb-sxm", "mixtral-8x7b", 2),  # experts
        ("a100-80gb-sxm", "mistral-7b", 1),  # a sliding window
    ],
)
@settings(max_examples=60, deadline=None)
@given(
    sequences=st.integers(0, 256),
    context=st.integers(1, 4000),
    prompt_tokens=st.integers(0, 2048),
    before=st.integers(0, 2000),
    place=st.floats(0, 1),
    share=st.sampled_from([0.0, 0.2, 0.4, 0.6]),
    price_w=st.sampled_from([0.0, 50.0, 2000.0]),
)
def test_the_law_is_nowhere_below_its_affine_parts(
    gpu, model, tp, sequences, context, prompt_tokens, before, place, share, price_w
):
    if sequences + prompt_tokens == 0:
        return
    physics = build_fleet(Catalogue.load(), gpu, model, (tp,), BatchingOptions()).physics[tp]
    law = physics.law()
    clock = physics.gpu.clocks_mhz[round(place * (law.clocks - 1))]
    pairs = prompt_tokens * (before + prompt_tokens / 2)
    load = (1, sequences, sequences * context, prompt_tokens, pairs)
    seconds, watts = physics.iteration(clock, *load[1:])
    parts = affine(law.at[: law.clocks], physics.idle_w(), share, 2304)
    least_s, least_j = (sum(part * of for part, of in zip(bound, load, strict=True)) for bound in parts)
    cost_j = (watts - physics.idle_w()) * seconds + price_w * seconds
    assert (least_j + price_w * least_s).min() <= cost_j * (1 + 1e-9)
    assert all((part >= 0).all() for bound in parts for part in bound)
    unlimited_w = physics.gpu.power.limit_w * tp
    if watts < unlimited_w:
        row = physics.row(clock)
        assert least_s[row] <= seconds * (1 + 1e-9)
        assert least_j[row] <= (watts - physics.idle_w()) * seconds * (1 + 1e-9)


def test_how_many_can_be_together():
    arrival_s = np.array([0.0, 1.0, 2.0, 10.0, 11.0, 30.0])
    most = np.full(6, 100.0)
    assert at_most_together(arrival_s, 3.0, 0, most).tolist() == [3, 3, 3, 2, 2, 1]
    assert at_most_together(arrival_s, 8.5, 1, most).tolist() == [4, 4, 4, 3, 3, 2]
    assert at_most_together(arrival_s, 3.0, 0, np.full(6, 2.0)).tolist() == [2, 2, 2, 2, 2, 1]
