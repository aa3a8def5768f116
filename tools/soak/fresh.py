"""After everything is over: nothing is held, and a client that has nothing to do with it all has its lease.

Lease, set, give back; at once again, with a set that fails on one GPU and leaves all as they were, or as before. Then
all is as it was again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from throttllem.gpu.keeper_client import KeeperError, KeptClocks
from tools.soak.check import WITHIN_S
from tools.soak.draw import COMMON_MHZ
from tools.soak.evidence import Evidence
from tools.soak.house import CLOCKS_MHZ, House
from tools.soak.schedule import Lock

OTHER_MHZ = 945
"""Allowed by every keeper, too."""
LOOK_S, TTL_S = 0.01, 1.0
MOST_S = 15.0
"""Keepers that only begin, again and again, are given no more."""
_SET, _UNKNOWN = "nvmlDeviceSetGpuLockedClocks", 999
_SOON_S, _SWITCHED_S = 1.0, 0.04


def _time_is_up(house: House, since_s: float) -> bool:
    """A keeper that is started anew has its time again, but not for ever."""
    now_s = time.monotonic()
    return now_s > max(since_s, house.evidence.starts_s[-1]) + WITHIN_S or now_s > since_s + MOST_S


async def nothing_is_held(house: House) -> None:
    """The keeper says so."""
    since_s, status = time.monotonic(), None
    while not _time_is_up(house, since_s):
        status = await house.answers(LOOK_S * 10)
        if status is not None and not status["held"] and not status["returning"]:
            return
        await asyncio.sleep(LOOK_S)
    house.evidence.troubles.append(f"a keeper that is stuck: {WITHIN_S:g} s later its status is {status}")


async def fresh_lease(house: House) -> None:
    """All of it, in time."""
    evidence, plans = house.evidence, house.schedule.gpus
    expected = [
        ({plan.before} if plan.declared else {gpu.lock} | _unseen(evidence, gpu.lock)) if plan.allowed else {gpu.lock}
        for gpu, plan in zip(house.machine.gpus, plans, strict=True)
    ]
    refusals, since_s = list[str](), time.monotonic()
    leased = asyncio.create_task(_leased_once(house, refusals))
    while not leased.done() and not _time_is_up(house, since_s):
        await asyncio.wait({leased}, timeout=LOOK_S)
    if not leased.done() or leased.exception():
        leased.cancel()
        await asyncio.wait({leased})
        evidence.troubles.append(f"a fresh client has no lease within {WITHIN_S:g} s: {refusals[-1:]}")
    until_s = time.monotonic() + WITHIN_S
    while time.monotonic() < until_s and not all(gpu.lock in expected[gpu.index] for gpu in house.machine.gpus):
        await asyncio.sleep(LOOK_S)
    evidence.last = tuple(gpu.lock for gpu in house.machine.gpus)
    if any(last not in found for last, found in zip(evidence.last, expected, strict=True)):
        evidence.troubles.append(f"after a fresh client's lease the locks are {evidence.last}, expected {expected}")


def _unseen(evidence: Evidence, lock: Lock | None) -> set[Lock | None]:
    """Of a lease that nobody remembers: a lock at the top clock cannot be seen, and goes with the next lease."""
    return {None} if evidence.forgot and lock is not None and lock[1] == CLOCKS_MHZ[-1] else set()


async def _leased_once(house: House, refusals: list[str]) -> None:
    """Until it worked, as a client does it: a keeper may be about to start, or die once more."""
    before = [gpu.lock for gpu in house.machine.gpus]
    while True:
        client = KeptClocks(house.socket, tuple(house.uuids(house.opted)), TTL_S)
        try:
            await client.set(COMMON_MHZ)
            locks = {house.machine.gpus[index].lock for index in house.opted}
            await asyncio.sleep(_SWITCHED_S)
            await client.give_back()
            await client.set(COMMON_MHZ)  # at once: clocks still switch to what they were
            await _all_or_none(house, client, before)
            await client.give_back()
            break
        except KeeperError as error:
            refusals.append(str(error))
            await asyncio.sleep(LOOK_S)
        finally:
            await client._drop()
    if locks != {(COMMON_MHZ, COMMON_MHZ)}:
        house.evidence.troubles.append(f"a fresh client set {COMMON_MHZ} MHz, and the locks are {locks}")


async def _all_or_none(house: House, client: KeptClocks, before: Sequence[Lock | None]) -> None:
    """A set that one GPU does not follow: soon all are as they were. Raises KeeperError if no keeper is there."""
    fault = house.nvml_fault(_SET, error=_UNKNOWN, times=1, gpu=house.opted[-1])
    try:
        await client.set(OTHER_MHZ)
        house.evidence.troubles.append("a set that failed on one GPU was answered with yes")
    except KeeperError as error:
        if error.code != "gpu":
            raise
    finally:
        house.nvml_again(fault)
    until_s = time.monotonic() + _SOON_S
    while not _whole(house, before):
        if time.monotonic() > until_s:
            locks = [house.machine.gpus[index].lock for index in house.opted]
            house.evidence.troubles.append(f"a set failed on one GPU, and {_SOON_S:g} s later the locks are {locks}")
            return
        await asyncio.sleep(LOOK_S)


def _whole(house: House, before: Sequence[Lock | None]) -> bool:
    """All as the first set left them, or all as they are without a lease."""
    locks = {index: house.machine.gpus[index].lock for index in house.opted}
    free = all(lock in (before[index], house.schedule.gpus[index].before) for index, lock in locks.items())
    return free or set(locks.values()) == {(COMMON_MHZ, COMMON_MHZ)}
