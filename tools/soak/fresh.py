"""After everything is over: nothing is held, and a client that has nothing to do with it all has its lease.

Lease, set, release; at once again, with a set that fails on one GPU and leaves all as they were, or restored. Then
every GPU that the keeper may set is at its baseline, or unlocked, no matter what it was locked to before.
"""

from __future__ import annotations

import asyncio
import time

from throttllem.gpu.keeper_client import KeeperClient, KeeperError
from tools.soak.bed import SoakBed
from tools.soak.check import WITHIN_S
from tools.soak.draw import COMMON_MHZ

OTHER_MHZ = 945
"""Allowed by every keeper, too."""
LOOK_S, TTL_S = 0.01, 1.0
MOST_S = 15.0
"""Keepers that only begin, again and again, are given no more."""
_SET, _UNKNOWN = "nvmlDeviceSetGpuLockedClocks", 999
_SOON_S, _SWITCHED_S = 1.0, 0.04


def _time_is_up(bed: SoakBed, since_s: float) -> bool:
    """A keeper that is started again has its time again, but not for ever."""
    now_s = time.monotonic()
    return now_s > max(since_s, bed.evidence.starts_s[-1]) + WITHIN_S or now_s > since_s + MOST_S


async def nothing_is_held(bed: SoakBed) -> None:
    """By its own status."""
    since_s, status = time.monotonic(), None
    while not _time_is_up(bed, since_s):
        status = await bed.answers(LOOK_S * 10)
        if status is not None and not status["held"] and not status["returning"]:
            return
        await asyncio.sleep(LOOK_S)
    bed.evidence.troubles.append(f"a keeper that is stuck: {WITHIN_S:g} s later its status is {status}")


async def fresh_lease(bed: SoakBed) -> None:
    """All of it, in time."""
    evidence, plans = bed.evidence, bed.schedule.gpus
    expected = [plan.baseline if plan.allowed else gpu.lock for gpu, plan in zip(bed.machine.gpus, plans, strict=True)]
    refusals, since_s = list[str](), time.monotonic()
    leased = asyncio.create_task(_leased_once(bed, refusals))
    while not leased.done() and not _time_is_up(bed, since_s):
        await asyncio.wait({leased}, timeout=LOOK_S)
    if not leased.done() or leased.exception():
        leased.cancel()
        await asyncio.wait({leased})
        evidence.troubles.append(f"a fresh client has no lease within {WITHIN_S:g} s: {refusals[-1:]}")
    until_s = time.monotonic() + WITHIN_S
    while time.monotonic() < until_s and [gpu.lock for gpu in bed.machine.gpus] != expected:
        await asyncio.sleep(LOOK_S)
    evidence.last = tuple(gpu.lock for gpu in bed.machine.gpus)
    if list(evidence.last) != expected:
        evidence.troubles.append(f"after a fresh client's lease the locks are {evidence.last}, expected {expected}")


async def _leased_once(bed: SoakBed, refusals: list[str]) -> None:
    """Until it worked, as a client does it: a keeper may be about to start, or die once more."""
    while True:
        client = KeeperClient(bed.socket, tuple(bed.uuids(bed.opted)), TTL_S)
        try:
            await client.set(COMMON_MHZ)
            locks = {bed.machine.gpus[index].lock for index in bed.opted}
            await asyncio.sleep(_SWITCHED_S)
            await client.restore()
            await client.set(COMMON_MHZ)  # at once: clocks still switch
            await _all_or_none(bed, client)
            await client.restore()
            break
        except KeeperError as error:
            refusals.append(str(error))
            await asyncio.sleep(LOOK_S)
        finally:
            client.close()
    if locks != {(COMMON_MHZ, COMMON_MHZ)}:
        bed.evidence.troubles.append(f"a fresh client set {COMMON_MHZ} MHz, and the locks are {locks}")


async def _all_or_none(bed: SoakBed, client: KeeperClient) -> None:
    """A set that one GPU does not follow: soon all are as they were, or restored. Raises KeeperError: no keeper."""
    fault = bed.nvml_fault(_SET, error=_UNKNOWN, times=1, gpu=bed.opted[-1])
    try:
        await client.set(OTHER_MHZ)
        bed.evidence.troubles.append("a set that failed on one GPU was answered with yes")
    except KeeperError as error:
        if error.code != "gpu":
            raise
    finally:
        bed.nvml_again(fault)
    until_s = time.monotonic() + _SOON_S
    while not _whole(bed):
        if time.monotonic() > until_s:
            locks = [bed.machine.gpus[index].lock for index in bed.opted]
            bed.evidence.troubles.append(f"a set failed on one GPU, and {_SOON_S:g} s later the locks are {locks}")
            return
        await asyncio.sleep(LOOK_S)


def _whole(bed: SoakBed) -> bool:
    """All as the first set left them, or all restored."""
    locks = {index: bed.machine.gpus[index].lock for index in bed.opted}
    restored = all(lock == bed.schedule.gpus[index].baseline for index, lock in locks.items())
    return restored or set(locks.values()) == {(COMMON_MHZ, COMMON_MHZ)}
