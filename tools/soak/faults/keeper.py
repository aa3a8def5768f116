"""What can happen to the keeper's process: killed at a time or at a step, stopped, out of memory, hung."""

from __future__ import annotations

import asyncio
import signal
from functools import partial

from tools.soak.bed import SoakBed
from tools.soak.faults.kind import Kind, becomes, lasting, obstacle
from tools.soak.schedule import Fault

_DAY_S = 86_400.0
_SPARE_BYTES = 1 << 17
_ALIVE_S = 0.5
_SET, _RESET = "nvmlDeviceSetGpuLockedClocks", "nvmlDeviceResetGpuLockedClocks"


async def _killed(bed: SoakBed, fault: Fault, number: signal.Signals = signal.SIGKILL) -> None:
    if await becomes(bed, lambda: bed.keeper.alive, _ALIVE_S):
        bed.keeper.send(number)


async def _storm(bed: SoakBed, fault: Fault) -> None:
    for _ in range(fault.count):
        await _killed(bed, fault)
        await asyncio.sleep(bed.draw.uniform(0.02, 0.2))


async def _stopped(bed: SoakBed, fault: Fault) -> None:
    keeper = bed.keeper
    with obstacle(bed, fault.kind):
        keeper.send(signal.SIGSTOP)
        await lasting(bed, fault)
        keeper.send(signal.SIGCONT)


async def _stopped_in_write(bed: SoakBed, fault: Fault) -> None:
    """In the midst of the next change that it makes to a GPU."""
    keeper = bed.keeper
    with obstacle(bed, fault.kind):
        bed.machine.stop_inside(keeper.pid)
        await lasting(bed, fault)
        if fault.which == "killed":
            keeper.send(signal.SIGKILL)
        bed.machine.stop_inside(0)
        keeper.send(signal.SIGCONT)


async def _out_of_memory(bed: SoakBed, fault: Fault) -> None:
    keeper = bed.keeper
    with obstacle(bed, fault.kind):
        keeper.limit_memory(_SPARE_BYTES)
        bed.board.hoard = 1
        await lasting(bed, fault)
        bed.board.hoard = 0
        if fault.which == "killed":
            keeper.send(signal.SIGKILL)
        keeper.limit_memory(None)


async def _hung(bed: SoakBed, fault: Fault) -> None:
    """Its event loop stands still; the threads of its calls go on."""
    bed.board.block_s = fault.for_s
    with obstacle(bed, fault.kind, after_s=fault.for_s):
        await becomes(bed, lambda: bed.board.block_s == 0, 1.0)
        bed.board.block_s = 0


async def _clock(bed: SoakBed, fault: Fault) -> None:
    """The host's clock jumps."""
    bed.board.shift_s = _DAY_S if fault.which == "ahead" else -_DAY_S
    await lasting(bed, fault)
    bed.board.shift_s = 0.0


async def _dies_at(bed: SoakBed, fault: Fault, point: str) -> None:
    """Whichever keeper passes there for the `count`th time from now on dies."""
    trap = bed.board.arm(point.format(which=fault.which, copy=fault.copy), fault.count)
    bed.waiting.append((fault.kind, lambda: bed.board.traps[trap] != 0))
    if point.startswith("recover"):
        await _killed(bed, fault)


async def _dies_in_call(bed: SoakBed, fault: Fault, call: str = _SET) -> None:
    """In the midst of NVML, before or after the effect."""
    number = bed.nvml_fault(call, kill=fault.which, nth=fault.count, times=1)
    bed.waiting.append((fault.kind, lambda: bed.nvml_calls(number) < fault.count))


_AROUND = ("before", "after")


def _crash(name: str, point: str, which: tuple[str, ...] = _AROUND, most: int = 3) -> Kind:
    inject = partial(_dies_at, point=point)
    return Kind(name=name, inject=inject, which=which, counts=(1, most), ends_keeper=True)


KINDS = (
    Kind(name="keeper: SIGKILL", inject=_killed),
    Kind(name="keeper: SIGTERM", inject=partial(_killed, number=signal.SIGTERM)),
    Kind(name="keeper: killed again and again", inject=_storm, counts=(2, 5)),
    Kind(name="keeper: stopped", inject=_stopped, lasts_s=(0.1, 0.9)),
    Kind(name="keeper: stopped within a write", inject=_stopped_in_write, lasts_s=(0.15, 0.6), which=("", "killed")),
    Kind(name="keeper: no memory", inject=_out_of_memory, lasts_s=(0.2, 0.8), ends_keeper=True),
    Kind(
        name="keeper: killed for its memory",
        inject=_out_of_memory,
        lasts_s=(0.05, 0.3),
        which=("killed",),
        ends_keeper=True,
    ),
    Kind(name="keeper: loop hangs", inject=_hung, lasts_s=(0.1, 0.9)),
    Kind(name="keeper: clock jumps a day", inject=_clock, lasts_s=(0.1, 0.6), which=("ahead", "back")),
    _crash("keeper: dies opening the journal", "open.{which}.{copy}"),
    _crash("keeper: dies writing the journal", "write.{which}.{copy}", ("before", "half", "after")),
    _crash("keeper: dies replacing the journal", "replace.{which}.{copy}"),
    _crash("keeper: dies checking a GPU", "note.{which}", most=4),
    _crash("keeper: dies around a lock", "lock.{which}", most=12),
    _crash("keeper: dies around restoring", "restore.{which}", most=4),
    _crash("keeper: dies around an answer", "reply.{which}", most=20),
    _crash("keeper: dies around taking an entry out", "entry.{which}", most=2),
    _crash("keeper: dies while it recovers", "recover.{which}", most=1),
    Kind(
        name="keeper: dies in NVML's lock",
        inject=_dies_in_call,
        which=_AROUND,
        counts=(1, 12),
        ends_keeper=True,
    ),
    Kind(
        name="keeper: dies in NVML's unlock",
        inject=partial(_dies_in_call, call=_RESET),
        which=_AROUND,
        counts=(1, 4),
        ends_keeper=True,
    ),
)
