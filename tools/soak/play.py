"""Plays one schedule, from the start of the keeper to a fresh client's lease after everything is over.

Waits as long as may be waited, and notes what it saw; what that is worth `check` says.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Coroutine
from contextlib import suppress

from tools.soak.check import WITHIN_S, due_s
from tools.soak.evidence import Evidence, Loss
from tools.soak.faults_gateway import inherited
from tools.soak.fresh import MOST_S, fresh_lease, nothing_is_held
from tools.soak.house import START_S, House
from tools.soak.kinds import KINDS
from tools.soak.locks import fits
from tools.soak.place import Place, waited_s
from tools.soak.schedule import Fault, Schedule, Stop

ENDS_S = 6.0
"""So long requests may take, and faults to be over, after everything was lifted."""
LOOK_S = 0.01


async def play(schedule: Schedule, place: Place) -> Evidence:
    """What was seen."""
    async with House(schedule, place) as house:
        house.start_keeper()
        if await house.answers() is None:
            house.evidence.troubles.append("the keeper does not even start")
        else:
            house.start_engine()
            await _live(house)
            await _settle(house)
        if house.evidence.restored_s is None or house.evidence.troubles:
            await _say_where_they_are(house)
        _look_back(house)
    return house.evidence


async def _live(house: House) -> None:
    """From the gateway's start to its end, and to the lifting of what lasts."""
    schedule, evidence = house.schedule, house.evidence
    house.start_gateway()
    if not schedule.early:
        await _first_clock(house)
    evidence.began_s = time.monotonic()
    works: list[Coroutine[None, None, None]] = [_asks(house), _lift(house)]
    works += [_goes_wrong(house, fault) for fault in schedule.faults]
    tasks = [asyncio.create_task(work) for work in works]
    await house.until(schedule.life_s)
    if schedule.lift_s < 0:
        await asyncio.wait(tasks, timeout=ENDS_S)
        await _answered(house)
    house.ask(len(schedule.ask_at_s), 30)
    await _stop(house)
    done, late = await asyncio.wait(tasks, timeout=ENDS_S)
    evidence.troubles += [f"a fault did not end: {task.get_coro()}" for task in late]
    evidence.troubles += [f"a fault failed: {task.exception()!r}" for task in done if task.exception()]
    for task in late:
        task.cancel()


async def _first_clock(house: House) -> None:
    until_s = time.monotonic() + START_S
    while not any(gpu.effective for gpu in house.machine.gpus):
        if time.monotonic() > until_s:
            house.evidence.troubles.append("the gateway does not even set a first clock")
            return
        await asyncio.sleep(LOOK_S)


async def _goes_wrong(house: House, fault: Fault) -> None:
    await house.until(fault.at_s)
    if not house.lifting.is_set():
        await KINDS[fault.kind].inject(house, fault)


async def _asks(house: House) -> None:
    for number, at_s in enumerate(house.schedule.ask_at_s):
        await house.until(at_s)
        house.ask(number, house.draw.randint(4, 24))


async def _lift(house: House) -> None:
    await house.until(house.schedule.life_s + house.schedule.lift_s)
    house.lifting.set()


async def _answered(house: House) -> None:
    """Every request has ended, or has had the time for it."""
    until_s = time.monotonic() + ENDS_S
    while time.monotonic() < until_s and house.unanswered():
        await asyncio.sleep(LOOK_S)


async def _stop(house: House) -> None:
    """The gateway ends as it was drawn; from then on its lease is lost, or soon."""
    house.witness.ending = True
    gateway, stop = house.gateway, house.schedule.stop
    house.evidence.stopped_s = now_s = time.monotonic()
    match stop:
        case Stop.TERM:
            gateway.send(signal.SIGTERM)
            with suppress(TimeoutError):
                await asyncio.wait_for(gateway.dead.wait(), ENDS_S)
            if gateway.alive:
                house.evidence.troubles.append(f"the gateway did not end on SIGTERM within {ENDS_S:g} s")
                await gateway.killed()
        case Stop.KILL:
            await gateway.killed()
        case Stop.FREEZE:
            gateway.send(signal.SIGSTOP)
            at_s = now_s + house.schedule.ttl_s
            loss = Loss(at_s=at_s, from_s=now_s, why="the gateway was stopped", gpus=house.held)
            house.evidence.losses.append(loss)
        case Stop.INHERIT:
            await inherited(house)
            await gateway.dead.wait()
    if house.witness.rivals:  # the last of them had it
        now_s, heirs = time.monotonic(), bool(house.witness.heirs)
        at_s = now_s + house.schedule.ttl_s * heirs
        house.evidence.losses.append(Loss(at_s=at_s, from_s=now_s, why="the gateways ended", gpus=house.held))


async def _settle(house: House) -> None:
    """All is restored, in time; then a fresh client has its lease, and all is restored again."""
    evidence = house.evidence
    evidence.writes = tuple(house.machine.writes())
    house.waited_s = waited_s()
    while time.monotonic() < (until_s := min(due_s(evidence) + WITHIN_S, evidence.stopped_s + MOST_S)):
        if _restored(house):
            evidence.restored_s = time.monotonic()
            break
        await asyncio.sleep(min(LOOK_S, max(0.0, until_s - time.monotonic())))
    evidence.base_s = due_s(evidence)
    evidence.left = tuple(gpu.lock for gpu in house.machine.gpus)
    if evidence.restored_s is not None:
        await nothing_is_held(house)
        await fresh_lease(house)


def _restored(house: House) -> bool:
    return house.keeper.alive and all(
        fits(house.evidence, index, house.machine.gpus[index].lock) for index in house.opted
    )


async def _say_where_they_are(house: House) -> None:
    """Something is wrong: every process tells the log what it is doing."""
    for child in house.children:
        if child.alive:
            child.send(signal.SIGUSR1)
    status = await house.answers(0.5)
    await asyncio.sleep(0.1)
    with (house.place.folder / "keeper.log").open("a") as log:
        alive = [f"{child.role} {child.pid}" for child in house.children if child.alive]
        log.write(f"{house.now():.3f} s: alive are {alive}; the keeper says {status}\n")


def _look_back(house: House) -> None:
    """What the machine and the logs say of it all."""
    evidence, machine, folder = house.evidence, house.machine, house.place.folder
    evidence.writes = tuple(machine.writes())
    evidence.write_count = int(machine._state.layout.write_count)
    evidence.attempted = tuple(gpu.attempted for gpu in machine.gpus)
    evidence.effective = tuple(gpu.effective for gpu in machine.gpus)
    evidence.idle = [kind for kind, waits in house.waiting if waits()]
    evidence.gaps = house.place.pulse.gaps(evidence.began_s)
    evidence.waited_s = waited_s() - house.waited_s
    logs = [f"--- {path.name}\n{path.read_text(errors='replace')}" for path in sorted(folder.glob("*.log"))]
    evidence.logs = "".join(logs)
