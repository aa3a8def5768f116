"""What can happen to the gateway and to the engine behind it."""

from __future__ import annotations

import asyncio
import signal
import time
from functools import partial

from tools.soak.bed import SoakBed
from tools.soak.evidence import Loss
from tools.soak.faults.kind import Hurts, Kind, becomes, lasting
from tools.soak.schedule import Fault, Stop

_SPARE_BYTES = 1 << 18
_ALIVE_S = 0.5


def _silent(bed: SoakBed, since_s: float, lasts_s: float, why: str) -> None:
    """No heartbeat comes for so long: if that is too long, the lease is lost."""
    if lasts_s > bed.schedule.ttl_s and not bed.observer.rivals:
        at_s = since_s + bed.schedule.ttl_s
        bed.evidence.losses.append(Loss(at_s=at_s, from_s=since_s, why=why, gpus=bed.held))


async def _killed(bed: SoakBed, fault: Fault, number: signal.Signals = signal.SIGKILL) -> None:
    if await becomes(bed, lambda: bed.gateway.alive, _ALIVE_S):
        bed.gateway.send(number)


async def _storm(bed: SoakBed, fault: Fault) -> None:
    for _ in range(fault.count):
        await _killed(bed, fault)
        await asyncio.sleep(bed.draw.uniform(0.1, 0.3))


async def _stopped(bed: SoakBed, fault: Fault) -> None:
    """`which`: shorter or longer than the lease lasts."""
    gateway, ttl_s, began_s = bed.gateway, bed.schedule.ttl_s, time.monotonic()
    lasts_s = fault.for_s * ttl_s * (0.5 if fault.which == "short" else 1.5)
    gateway.send(signal.SIGSTOP)
    await asyncio.sleep(lasts_s)
    if not (bed.observer.ending and bed.schedule.stop is Stop.FREEZE):
        gateway.send(signal.SIGCONT)
    if gateway.alive:
        _silent(bed, began_s, time.monotonic() - began_s, fault.kind)


async def _blocked(bed: SoakBed, fault: Fault) -> None:
    """Its event loop stands still: no heartbeat, no token."""
    bed.gateway.send_line(do="block", for_s=fault.for_s)
    began_s = time.monotonic()
    await asyncio.sleep(fault.for_s)
    if bed.gateway.alive:
        _silent(bed, began_s + 0.1, fault.for_s - 0.1, fault.kind)


async def _out_of_memory(bed: SoakBed, fault: Fault) -> None:
    gateway = bed.gateway
    gateway.limit_memory(_SPARE_BYTES)
    await lasting(bed, fault)
    if fault.which == "killed":
        gateway.send(signal.SIGKILL)
    gateway.limit_memory(None)


async def inherited(bed: SoakBed) -> None:
    """A child of the gateway keeps its sockets open, and the gateway dies."""
    gateway, heirs = bed.gateway, len(bed.observer.heirs)
    gateway.send_line(do="child")
    await becomes(bed, lambda: len(bed.observer.heirs) > heirs, _ALIVE_S)
    gateway.send(signal.SIGKILL)


async def _inherited(bed: SoakBed, fault: Fault) -> None:
    await inherited(bed)


async def _rival(bed: SoakBed, fault: Fault) -> None:
    rival = bed.start_gateway(rival=True)
    await lasting(bed, fault)
    rival.send(signal.SIGKILL if fault.which == "killed" else signal.SIGTERM)
    await rival.dead.wait()


async def _engine_gone(bed: SoakBed, fault: Fault) -> None:
    """`which`: killed, or out of memory first."""
    if fault.which == "no memory":
        bed.engine.limit_memory(0)
        await asyncio.sleep(0.02)
    bed.engine.send(signal.SIGKILL)
    await bed.engine.dead.wait()
    await lasting(bed, fault)
    bed.start_engine()


async def _engine_stopped(bed: SoakBed, fault: Fault) -> None:
    engine = bed.engine
    engine.send(signal.SIGSTOP)
    await lasting(bed, fault)
    engine.send(signal.SIGCONT)


_GATEWAY, _ENGINE = Hurts.GATEWAY, Hurts.ENGINE

KINDS = (
    Kind(name="gateway: SIGKILL", inject=_killed, hurts=_GATEWAY),
    Kind(name="gateway: SIGTERM", inject=partial(_killed, number=signal.SIGTERM), hurts=_GATEWAY),
    Kind(name="gateway: killed again and again", inject=_storm, counts=(2, 4), hurts=_GATEWAY),
    Kind(
        name="gateway: stopped for less than its lease",
        runs_out=True,
        inject=_stopped,
        lasts_s=(0.5, 1.5),
        which=("short",),
    ),
    Kind(
        name="gateway: stopped for longer than its lease",
        runs_out=True,
        inject=_stopped,
        lasts_s=(0.8, 1.3),
        which=("long",),
        hurts=_GATEWAY,
    ),
    Kind(name="gateway: loop hangs", runs_out=True, inject=_blocked, lasts_s=(0.2, 0.9), hurts=_GATEWAY),
    Kind(name="gateway: no memory", inject=_out_of_memory, ends_gateway=True, lasts_s=(0.2, 0.6), hurts=_GATEWAY),
    Kind(
        name="gateway: killed for its memory",
        inject=_out_of_memory,
        ends_gateway=True,
        lasts_s=(0.05, 0.2),
        which=("killed",),
        hurts=_GATEWAY,
    ),
    Kind(name="gateway: dies, a child keeps its sockets", runs_out=True, inject=_inherited, hurts=_GATEWAY),
    Kind(name="gateway: a second one wants the GPUs", inject=_rival, lasts_s=(0.2, 0.9), which=("killed", "")),
    Kind(name="engine: SIGKILL", inject=_engine_gone, lasts_s=(0.1, 0.5), hurts=_ENGINE),
    Kind(name="engine: stopped", inject=_engine_stopped, lasts_s=(0.1, 0.6), hurts=_ENGINE),
    Kind(name="engine: no memory", inject=_engine_gone, lasts_s=(0.1, 0.5), which=("no memory",), hurts=_ENGINE),
)
