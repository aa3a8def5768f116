"""Plays one schedule, from the start of the keeper to a fresh client's lease after everything is over.

Waits as long as the rules allow, and notes what it saw; `check` judges it.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Coroutine
from contextlib import suppress

from tools.soak.bed import START_S, SoakBed
from tools.soak.check import WITHIN_S, due_s
from tools.soak.evidence import Evidence, Loss
from tools.soak.faults import KINDS
from tools.soak.faults.gateway import inherited
from tools.soak.fresh import MOST_S, fresh_lease, nothing_is_held
from tools.soak.locks import fits
from tools.soak.sandbox import Sandbox, waited_s
from tools.soak.schedule import Fault, Schedule, Stop

ENDS_S = 6.0
"""How long requests and faults may take to end after everything was lifted."""
LOOK_S = 0.01


async def play(schedule: Schedule, sandbox: Sandbox) -> Evidence:
    """What was seen."""
    async with SoakBed(schedule, sandbox) as bed:
        bed.start_keeper()
        if await bed.answers() is None:
            bed.evidence.troubles.append("the keeper does not even start")
        else:
            bed.start_engine()
            await _live(bed)
            await _settle(bed)
        if bed.evidence.restored_s is None or bed.evidence.troubles:
            await _log_stacks(bed)
        _look_back(bed)
    return bed.evidence


async def _live(bed: SoakBed) -> None:
    """From the gateway's start to its end, and to the lifting of what lasts."""
    schedule, evidence = bed.schedule, bed.evidence
    bed.start_gateway()
    if not schedule.early:
        await _first_clock(bed)
    evidence.began_s = time.monotonic()
    works: list[Coroutine[None, None, None]] = [_asks(bed), _lift(bed)]
    works += [_goes_wrong(bed, fault) for fault in schedule.faults]
    tasks = [asyncio.create_task(work) for work in works]
    await bed.until(schedule.life_s)
    if schedule.lift_s < 0:
        await asyncio.wait(tasks, timeout=ENDS_S)
        await _answered(bed)
    bed.ask(len(schedule.ask_at_s), 30)
    await _stop(bed)
    done, late = await asyncio.wait(tasks, timeout=ENDS_S)
    evidence.troubles += [f"a fault did not end: {task.get_coro()}" for task in late]
    evidence.troubles += [f"a fault failed: {task.exception()!r}" for task in done if task.exception()]
    for task in late:
        task.cancel()


async def _first_clock(bed: SoakBed) -> None:
    until_s = time.monotonic() + START_S
    while not any(gpu.effective for gpu in bed.machine.gpus):
        if time.monotonic() > until_s:
            bed.evidence.troubles.append("the gateway does not even set a first clock")
            return
        await asyncio.sleep(LOOK_S)


async def _goes_wrong(bed: SoakBed, fault: Fault) -> None:
    await bed.until(fault.at_s)
    if not bed.lifting.is_set():
        await KINDS[fault.kind].inject(bed, fault)


async def _asks(bed: SoakBed) -> None:
    for number, at_s in enumerate(bed.schedule.ask_at_s):
        await bed.until(at_s)
        bed.ask(number, bed.draw.randint(4, 24))


async def _lift(bed: SoakBed) -> None:
    await bed.until(bed.schedule.life_s + bed.schedule.lift_s)
    bed.lifting.set()


async def _answered(bed: SoakBed) -> None:
    """Every request has ended, or has had the time for it."""
    until_s = time.monotonic() + ENDS_S
    while time.monotonic() < until_s and bed.unanswered():
        await asyncio.sleep(LOOK_S)


async def _stop(bed: SoakBed) -> None:
    """The gateway ends as it was drawn; from then on its lease is lost, or soon."""
    bed.observer.ending = True
    gateway, stop = bed.gateway, bed.schedule.stop
    bed.evidence.stopped_s = now_s = time.monotonic()
    match stop:
        case Stop.TERM:
            gateway.send(signal.SIGTERM)
            with suppress(TimeoutError):
                await asyncio.wait_for(gateway.dead.wait(), ENDS_S)
            if gateway.alive:
                bed.evidence.troubles.append(f"the gateway did not end on SIGTERM within {ENDS_S:g} s")
                await gateway.killed()
        case Stop.KILL:
            await gateway.killed()
        case Stop.FREEZE:
            gateway.send(signal.SIGSTOP)
            at_s = now_s + bed.schedule.ttl_s
            loss = Loss(at_s=at_s, from_s=now_s, why="the gateway was stopped", gpus=bed.held)
            bed.evidence.losses.append(loss)
        case Stop.INHERIT:
            await inherited(bed)
            await gateway.dead.wait()
    if bed.observer.rivals:  # the last of them had it
        now_s, heirs = time.monotonic(), bool(bed.observer.heirs)
        at_s = now_s + bed.schedule.ttl_s * heirs
        bed.evidence.losses.append(Loss(at_s=at_s, from_s=now_s, why="the gateways ended", gpus=bed.held))


async def _settle(bed: SoakBed) -> None:
    """All is restored, in time; then a fresh client has its lease, and all is restored again."""
    evidence = bed.evidence
    evidence.writes = tuple(bed.machine.writes())
    bed.waited_s = waited_s()
    while time.monotonic() < (until_s := min(due_s(evidence) + WITHIN_S, evidence.stopped_s + MOST_S)):
        if _restored(bed):
            evidence.restored_s = time.monotonic()
            break
        await asyncio.sleep(min(LOOK_S, max(0.0, until_s - time.monotonic())))
    evidence.base_s = due_s(evidence)
    evidence.left = tuple(gpu.lock for gpu in bed.machine.gpus)
    if evidence.restored_s is not None:
        await nothing_is_held(bed)
        await fresh_lease(bed)


def _restored(bed: SoakBed) -> bool:
    return bed.keeper.alive and all(fits(bed.evidence, index, bed.machine.gpus[index].lock) for index in bed.opted)


async def _log_stacks(bed: SoakBed) -> None:
    """Something is wrong: every process logs its stacks."""
    for child in bed.children:
        if child.alive:
            child.send(signal.SIGUSR1)
    status = await bed.answers(0.5)
    await asyncio.sleep(0.1)
    with (bed.sandbox.folder / "keeper.log").open("a") as log:
        alive = [f"{child.role} {child.pid}" for child in bed.children if child.alive]
        log.write(f"{bed.now():.3f} s: alive are {alive}; the keeper's status is {status}\n")


def _look_back(bed: SoakBed) -> None:
    """What the GPUs and the logs show at the end."""
    evidence, machine, folder = bed.evidence, bed.machine, bed.sandbox.folder
    evidence.writes = tuple(machine.writes())
    evidence.write_count = int(machine._state.layout.write_count)
    evidence.attempted = tuple(gpu.attempted for gpu in machine.gpus)
    evidence.effective = tuple(gpu.effective for gpu in machine.gpus)
    evidence.idle = [kind for kind, waits in bed.waiting if waits()]
    evidence.gaps = bed.sandbox.pulse.gaps(evidence.began_s)
    evidence.waited_s = waited_s() - bed.waited_s
    logs = [f"--- {path.name}\n{path.read_text(errors='replace')}" for path in sorted(folder.glob("*.log"))]
    evidence.logs = "".join(logs)
