"""What the same load would have taken at other clocks, against an engine that ran at them."""

import asyncio
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from gateway.rig import rig, virtually

from core.toy import SPEC, flat_table, spec, table
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.clocks.savings_estimate import SavingsEstimate, dearer_loads
from throttllem.core.clocks.steady_load import Load, steady
from throttllem.core.types import Slo


async def energy(policy, gap_s, count):
    """The energy of `count` requests at random times, with its estimate, and the clock at the end."""
    async with rig(policy=policy, max_batch=64, kv_blocks=2000) as it:
        await it.up()
        dice, tasks = random.Random(3), []
        for _ in range(count):
            tasks.append(asyncio.ensure_future(it.request(tokens=dice.randint(20, 60), stream=False)))
            await asyncio.sleep(dice.expovariate(1 / gap_s))
        await asyncio.gather(*tasks)
        await asyncio.sleep(count * gap_s * 1.3 + 20.0 - it.loop.now())
        return it.backend.accounting.energy(), it.backend.gpu.read().clock_mhz


@pytest.mark.parametrize(("gap_s", "count"), [(2.0, 20), (0.4, 100)])
def test_the_estimate_is_about_what_the_maximum_clock_takes(gap_s, count):
    (truth, top), (slow, low) = (
        virtually(energy(policy, gap_s, count)) for policy in (ClockPolicy.TOP, ClockPolicy.THROTTLLEM)
    )
    assert (top, low) == (1400, 600)
    assert slow.top_j == pytest.approx(truth.total_j, rel=0.15)
    assert slow.total_j < truth.total_j
    assert truth.top_j == pytest.approx(truth.total_j)
    assert truth.saved == pytest.approx(0.0)


def worked(estimate, *, joules, clock_mhz, kv_blocks=3, prompts=0, seconds=0.1, **more):
    """One step of four sequences."""
    estimate.worked(
        seconds=seconds,
        joules=joules,
        steps=1,
        output_tokens=4,
        prompts=prompts,
        prompt_tokens=0,
        kv_block_steps=kv_blocks,
        clock_mhz=clock_mhz,
        **more,
    )


def test_idle_time_and_unknown_clocks_cost_the_same_at_the_maximum():
    estimate = SavingsEstimate(table=table(spec()), spec=spec())
    estimate.idle(100.0, 4000.0)
    worked(estimate, clock_mhz=None, joules=7.0)
    worked(estimate, clock_mhz=1400, joules=5.0)
    assert estimate.joules() == pytest.approx(4012.0)


def test_before_the_engine_was_up_nothing_is_invented():
    estimate = SavingsEstimate(table=table(spec()))
    worked(estimate, clock_mhz=600, joules=5.0)
    assert estimate.joules() == 5.0


def test_an_engine_that_is_full_does_the_same_steps_faster():
    some, law = spec(max_batch=4), table(spec(max_batch=4))
    estimate = SavingsEstimate(table=law, spec=some)
    for _ in range(600):
        worked(estimate, kv_blocks=20, clock_mhz=600, joules=10.0)
    slow, fast = (law.at(clock, 4, 20, 0) for clock in (600, 1400))
    same = 6000.0 * (fast[0] * fast[1]) / (slow[0] * slow[1]) + 60.0 * (1 - fast[0] / slow[0]) * some.idle_w
    assert estimate.joules() == pytest.approx(same, rel=0.15)


def test_a_clock_that_does_not_hold_the_load_is_compared_with_the_maximum_alone():
    """Sprints at the maximum clock after a clock that is too low, as `throttllem` does it."""
    some = spec(max_batch=6, kv_blocks=2000)
    law, estimate = table(some), SavingsEstimate(table=table(some), spec=some)
    for number in range(3000):
        clock, prompts = (600 if number % 20 < 12 else 1400), number % 4 == 0
        joules = 0.02 * law.at(clock, 4 + prompts, 20, 0)[1]
        worked(estimate, seconds=0.02, kv_blocks=20, prompts=prompts, clock_mhz=clock, joules=joules)
    load = Load(requests_per_s=12.5, prompt_tokens=0.0, output_tokens=16, long_output_tokens=16, burst=1.0, e2e_s=None)
    watts = steady(load, law, some, reserve=0.0).watts
    assert math.isinf(watts[0])
    assert estimate.joules() == pytest.approx(60.0 * watts[-1], rel=0.02)


def test_steps_that_are_settled_together_count_as_steps():
    """A settlement holds many; the estimate is the same however often one is made."""
    each, together = (SavingsEstimate(table=table(spec(max_batch=64)), spec=spec(max_batch=64)) for _ in range(2))
    for _ in range(100):
        for _ in range(10):
            worked(each, clock_mhz=600, joules=10.0, kv_blocks=20)
        together.worked(
            seconds=1.0,
            joules=100.0,
            steps=10,
            output_tokens=40,
            prompts=0,
            prompt_tokens=0,
            kv_block_steps=200,
            clock_mhz=600,
        )
    assert together.joules() == pytest.approx(each.joules(), rel=0.01)


def test_another_clock_than_the_maximum():
    """The clock of a dry run: at the clock in force it is the same, at a lower one less."""
    some = spec(max_batch=64, kv_blocks=2000)
    found = {}
    for other_mhz in (600, 1000, 1400):
        estimate = SavingsEstimate(table=table(some), spec=some)
        for number in range(1000):
            worked(estimate, kv_blocks=20, prompts=number % 20 == 0, clock_mhz=1400, other_mhz=other_mhz, joules=10.0)
        found[other_mhz] = estimate.joules()
    assert found[1400] == pytest.approx(10_000.0)
    assert found[600] < found[1000] < found[1400]


def test_it_never_falls():
    estimate, shown = SavingsEstimate(table=table(spec()), spec=spec()), [0.0]
    for number in range(2000):
        clock = 600 if number % 700 < 400 else 1400
        worked(estimate, kv_blocks=20, prompts=number % 5 == 0, clock_mhz=clock, joules=10.0)
        if number % 9 == 0:
            estimate.idle(number % 11, 5.0)
        shown.append(estimate.joules())
    assert shown == sorted(shown)
    assert shown[-1] > shown[1000] > 0


def test_a_clock_between_those_of_the_table_counts_as_the_one_below():
    estimate = SavingsEstimate(table=table(spec()), spec=spec())
    assert [estimate._column(mhz) for mhz in (None, 1400, 1399, 700, 600, 300)] == [4, 4, 3, 0, 0, 0]


def test_an_iteration_of_an_engine_that_speculates_is_a_part_of_a_step():
    some = spec(max_batch=8, kv_blocks=2000)
    law, found = table(some), []
    short = replace(law, seconds=law.at_rate(4.0).seconds)
    for held, rate in ((law, 1.0), (law, 4.0), (short, 1.0)):
        estimate = SavingsEstimate(table=held, spec=some)
        for number in range(6000):
            worked(estimate, seconds=0.02, joules=4.0, prompts=number % 50 == 0, clock_mhz=800, tokens_per_step=rate)
        found.append(estimate.joules())
    assert found[1] == pytest.approx(found[2])
    assert abs(found[1] / found[0] - 1.0) > 0.05


def test_steps_told_together_are_steps_told_one_by_one():
    """The same to the bit, over several slices, with idle time in between."""
    dice, engine = np.random.default_rng(4), spec(max_batch=64, kv_blocks=2000)
    profiled = table(engine, kv_step=64)
    together, single = (SavingsEstimate(table=profiled, spec=engine) for _ in range(2))
    for count in (1, 700, 40):
        seconds, joules = dice.uniform(0.01, 0.4, count), dice.uniform(1.0, 90.0, count)
        tokens, kv_blocks = dice.integers(1, 40, count), dice.integers(40, 900, count)
        prompts, clocks = dice.integers(0, 2, count), dice.choice([600, 800, 1000], count)
        together.stepped(
            seconds=seconds,
            joules=joules,
            output_tokens=tokens,
            prompts=prompts,
            prompt_tokens=prompts * 20,
            kv_blocks=kv_blocks,
            clocks_mhz=clocks,
        )
        columns = (seconds, joules, tokens, prompts, kv_blocks, clocks)
        for s, j, output, prompt, blocks, mhz in zip(*(column.tolist() for column in columns), strict=True):
            single.worked(
                seconds=s,
                joules=j,
                steps=1,
                output_tokens=output,
                prompts=prompt,
                prompt_tokens=prompt * 20,
                kv_block_steps=blocks,
                clock_mhz=mhz,
            )
        for estimate in (together, single):
            estimate.idle(3.0, 120.0)
        assert together.joules() == single.joules()
    assert together == single


def test_the_lowest_clock_is_dearer_where_static_watts_count_and_only_where_the_slo_lets_it_be_taken():
    roomy = replace(SPEC, kv_blocks=100_000, max_batch=40, max_context_tokens=4096)
    flat, steep = flat_table([16, 12, 9, 8, 7]), flat_table([16, 12, 9, 8, 7], watts=(50, 100, 180, 230, 300))
    found = dearer_loads(flat, roomy, Slo(), reserve=0.0)
    assert found.low_rps < 0.05 < found.high_rps
    # All clocks draw 100 W while they run, and the lowest runs 16 / 7 of the time: idle watts make up for part of it.
    assert 0.01 < found.most < 16 / 7 - 1
    assert dearer_loads(steep, roomy, Slo(), reserve=0.0) is None
    # 256 tokens take 1.75 s at the maximum clock, 2 s at the next lower one.
    assert dearer_loads(flat, roomy, Slo(tbt_s=7.5 / 1024), reserve=0.0) is None
    assert dearer_loads(flat, roomy, Slo(e2e_s=256 * 7.5 / 1024), reserve=0.0) is None
