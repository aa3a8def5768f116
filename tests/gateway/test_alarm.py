"""The timer rings once, at its time, never before."""

import asyncio
import math

from throttllem.gateway.control.alarm import LoopTimer

from gateway.rig import virtually


def test_it_rings_once_at_the_time_last_set():
    async def run():
        now = asyncio.get_running_loop().time
        rung = []
        alarm = LoopTimer(lambda: rung.append(now()), now)
        for due_s in (1.0, 3.0, 2.0, 2.0):
            alarm.set(due_s)
        await asyncio.sleep(10.0)
        alarm.set(11.0)
        alarm.set(math.inf)
        alarm.set(12.0)
        alarm.cancel()
        await asyncio.sleep(10.0)
        alarm.set(5.0)
        await asyncio.sleep(1.0)
        return rung

    assert virtually(run()) == [2.0, 20.0]


def test_it_is_never_early_whatever_the_loop_says():
    async def run():
        loop = asyncio.get_running_loop()
        rung = []
        alarm = LoopTimer(lambda: rung.append(loop.time()), lambda: loop.time() - 0.0025)
        loop.call_later(0.5, alarm.set, 1.0)
        await asyncio.sleep(0.5)
        alarm.set(1.0)
        await asyncio.sleep(2.0)
        return rung

    (at_s,) = virtually(run())
    assert 1.0025 <= at_s < 1.01
