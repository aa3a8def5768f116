"""Times switches of a GPU's clocks at work: from the command until the clock is read back.

Knows nothing of requests, points and files.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

from throttllem.core.forecast.switch_latency import FEWEST, ProfiledSwitches, within
from throttllem.gpu.device import Gpu
from throttllem.profiling.live.load import now

SECONDS = 20.0
"""Longest time for all of them."""
MOST_S, POLL_S = 2.0, 0.01
"""How long the end of one switch is waited for."""
APART_S = 0.07
"""From one switch to the next at least: the keeper takes 20 a second."""


async def timed_switches(
    gpu: Gpu, clocks_mhz: Sequence[int], at_work: Callable[[], Awaitable[None]], *, seed: int
) -> tuple[ProfiledSwitches, ...]:
    """What switches to each clock took, `FEWEST` of each, or as many as SECONDS allow; from clocks at random.

    `at_work` returns once the engine decodes: idle GPUs do not show the clock that was set.
    """
    order, until_s, rng = list(clocks_mhz), now() + SECONDS, random.Random(seed)
    took: dict[int, list[float]] = {mhz: [] for mhz in clocks_mhz}
    last_mhz: int | None = None
    for _ in range(FEWEST):
        rng.shuffle(order)
        if order[0] == last_mhz:
            order.append(order.pop(0))
        for mhz in order:
            if now() >= until_s or gpu.read().trouble is not None:  # which the first point will name
                break
            await at_work()
            before, last_mhz, began_s = gpu.read().switch, mhz, now()
            await gpu.set_clock(mhz)
            limit_s = now() + MOST_S
            while (switch := gpu.read().switch) is before and now() < limit_s:
                await asyncio.sleep(POLL_S)
            if switch is not None and switch is not before and switch.mhz == mhz:
                took[mhz].append(switch.seconds)
            await asyncio.sleep(max(0.0, began_s + APART_S - now()))
    return tuple(
        ProfiledSwitches(mhz=mhz, count=len(took[mhz]), within_s=within(took[mhz])) for mhz in sorted(took) if took[mhz]
    )
