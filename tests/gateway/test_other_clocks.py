"""The estimate of what the top clock would have taken, against an engine that ran there."""

import asyncio
import random

import pytest
from core.toy import spec, table

from gateway.rig import rig, virtually
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.gateway.energy.savings_estimate import SavingsEstimate
from throttllem.gpu.device import Work


async def energy(policy, gap_s, count):
    """Joules of `count` requests that come when they come, the estimate of the top clock for them, and the clocks."""
    async with rig(policy=policy, max_batch=64, kv_blocks=2000) as it:
        await it.up()
        dice, tasks = random.Random(3), []
        for _ in range(count):
            tasks.append(asyncio.ensure_future(it.ask(tokens=dice.randint(20, 60), stream=False)))
            await asyncio.sleep(dice.expovariate(1 / gap_s))
        await asyncio.gather(*tasks)
        await asyncio.sleep(count * gap_s * 1.3 + 20.0 - it.loop.now())
        return it.backend.accounting.energy(), it.backend.gpu.read().clock_mhz


@pytest.mark.parametrize(("gap_s", "count"), [(2.0, 20), (0.4, 100)])
def test_it_is_about_what_the_top_clock_takes(gap_s, count):
    (truth, top), (slow, low) = (
        virtually(energy(policy, gap_s, count)) for policy in (ClockPolicy.TOP, ClockPolicy.THROTTLLEM)
    )
    assert (top, low) == (1400, 600)
    assert slow.top_j == pytest.approx(truth.total_j, rel=0.15)
    assert slow.total_j < truth.total_j
    assert truth.top_j == pytest.approx(truth.total_j)
    assert truth.saved == pytest.approx(0.0)


def work(**more):
    return Work(seconds=0.1, decode_sequences=4, kv_tokens=100, prefill_tokens=0, prefill_pairs=0.0, **more)


def test_idle_time_and_unknown_clocks_are_as_they_were():
    top = SavingsEstimate(table=table(spec()), spec=spec())
    top.idle(100.0, 4000.0)
    top.step(work(), kv_blocks=3, prompts=0, clock_mhz=None, joules=7.0)
    top.step(work(), kv_blocks=3, prompts=0, clock_mhz=1400, joules=5.0)
    assert top.joules() == pytest.approx(4012.0)


def test_before_the_engine_was_up_nothing_is_made_up():
    top = SavingsEstimate(table=table(spec()))
    top.step(work(), kv_blocks=3, prompts=0, clock_mhz=600, joules=5.0)
    assert top.joules() == 5.0


def test_an_engine_that_is_full_does_the_same_steps_faster():
    some, law = spec(max_batch=4), table(spec(max_batch=4))
    top = SavingsEstimate(table=law, spec=some)
    for _ in range(600):
        top.step(work(), kv_blocks=20, prompts=0, clock_mhz=600, joules=10.0)
    slow, fast = (law.at(clock, 4, 20, 0) for clock in (600, 1400))
    same = 6000.0 * (fast[0] * fast[1]) / (slow[0] * slow[1]) + 60.0 * (1 - fast[0] / slow[0]) * some.idle_w
    assert top.joules() == pytest.approx(same, rel=0.15)


def test_it_never_falls():
    top, told = SavingsEstimate(table=table(spec()), spec=spec()), [0.0]
    for number in range(2000):
        clock = 600 if number % 700 < 400 else 1400
        top.step(work(), kv_blocks=20, prompts=number % 5 == 0, clock_mhz=clock, joules=10.0)
        if number % 9 == 0:
            top.idle(number % 11, 5.0)
        told.append(top.joules())
    assert told == sorted(told)
    assert told[-1] > told[1000] > 0


def test_a_clock_between_those_of_the_table_counts_as_the_one_below():
    law = table(spec())
    top = SavingsEstimate(table=law, spec=spec())
    assert [top._column(mhz) for mhz in (None, 1400, 1399, 700, 600, 300)] == [4, 4, 3, 0, 0, 0]
