"""What can happen to the GPUs, to the driver and to calls of NVML."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from tools.nvml.machine import FakeGpu
from tools.soak.bed import SoakBed
from tools.soak.evidence import Other
from tools.soak.faults.kind import Kind, lasting, obstacle
from tools.soak.schedule import Fault

_SET, _RESET = "nvmlDeviceSetGpuLockedClocks", "nvmlDeviceResetGpuLockedClocks"
_READS = ("nvmlDeviceGetClockInfo", "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetCurrentClocksEventReasons")
_UNKNOWN = 999
_HANGS_S, _SLOW_S = 1.5, 0.2

On = Callable[[FakeGpu, bool], None]


def _while(on: On, *, hinders: bool = False) -> Callable[[SoakBed, Fault], Awaitable[None]]:
    """One GPU is so for some time."""

    async def inject(bed: SoakBed, fault: Fault) -> None:
        gpu = bed.machine.gpus[fault.gpu]
        if hinders:
            with obstacle(bed, fault.kind):
                await held(bed, fault, gpu)
        else:
            await held(bed, fault, gpu)

    async def held(bed: SoakBed, fault: Fault, gpu: FakeGpu) -> None:
        on(gpu, True)
        await lasting(bed, fault)
        on(gpu, False)

    return inject


def _unlocked(bed: SoakBed) -> None:
    """A driver that is reloaded has forgotten every lock."""
    now_s = time.monotonic()
    bed.evidence.others += [Other(at_s=now_s, gpu=gpu.index, lock=None) for gpu in bed.machine.gpus]


async def _driver(bed: SoakBed, fault: Fault) -> None:
    with obstacle(bed, fault.kind):
        bed.machine.driver(False)
        _unlocked(bed)
        await lasting(bed, fault)
        bed.machine.driver(True)
        _unlocked(bed)


async def _other(bed: SoakBed, fault: Fault) -> None:
    """Another controller locks it, during a lease or not."""
    lock = 300 + 15 * fault.count, 300 + 15 * fault.count
    bed.machine.gpus[fault.gpu].lock_by_other(*lock)
    bed.evidence.others.append(Other(at_s=time.monotonic(), gpu=fault.gpu, lock=lock))


async def _counter(bed: SoakBed, fault: Fault) -> None:
    bed.machine.gpus[fault.gpu].reset_energy_counter()


async def _slow(bed: SoakBed, fault: Fault, calls: tuple[str, ...], sleep_s: float) -> None:
    """A call that has begun goes on sleeping when the fault is lifted."""
    with obstacle(bed, fault.kind, after_s=sleep_s):
        await _faulty(bed, fault, calls, sleep_s=sleep_s)


async def _fails(bed: SoakBed, fault: Fault, calls: tuple[str, ...], times: int | None = None) -> None:
    """`which`: on one GPU only, or on any."""
    gpu = fault.gpu if fault.which == "one" else None
    with obstacle(bed, fault.kind):
        await _faulty(bed, fault, calls, error=_UNKNOWN, times=times, nth=fault.count, gpu=gpu)


async def _faulty(bed: SoakBed, fault: Fault, calls: tuple[str, ...], **how: Any) -> None:
    faults = [bed.nvml_fault(call, **how) for call in calls]
    await lasting(bed, fault)
    for one in faults:
        bed.nvml_again(one)


KINDS = (
    Kind(name="GPU: driver reloaded", inject=_driver, ends_gateway=True, lasts_s=(0.02, 0.4), ends_keeper=True),
    Kind(name="GPU: lost and back", inject=_while(FakeGpu.lost, hinders=True), ends_gateway=True, lasts_s=(0.05, 0.8)),
    Kind(
        name="GPU: permission withdrawn",
        inject=_while(lambda gpu, on: gpu.permission(not on), hinders=True),
        lasts_s=(0.05, 0.8),
    ),
    Kind(
        name="GPU: power cap",
        inject=_while(lambda gpu, on: gpu.limit_w(120.0 if on else None)),
        lasts_s=(0.1, 0.8),
    ),
    Kind(
        name="GPU: too hot",
        inject=_while(lambda gpu, on: gpu.thermal(510 if on else None)),
        lasts_s=(0.1, 0.8),
    ),
    Kind(name="GPU: another controller locks it", inject=_other, counts=(1, 15)),
    Kind(name="GPU: MIG turned on", inject=_while(FakeGpu.mig), ends_gateway=True, lasts_s=(0.1, 0.8)),
    Kind(
        name="GPU: MPS clients",
        inject=_while(lambda gpu, on: gpu.mps([1] if on else [])),
        ends_gateway=True,
        lasts_s=(0.1, 0.8),
    ),
    Kind(name="GPU: energy counter reset", inject=_counter),
    Kind(
        name="NVML: sets are slow",
        inject=partial(_slow, calls=(_SET, _RESET), sleep_s=_SLOW_S),
        lasts_s=(0.2, 0.8),
    ),
    Kind(
        name="NVML: sets hang",
        inject=partial(_slow, calls=(_SET, _RESET), sleep_s=_HANGS_S),
        lasts_s=(0.05, 0.3),
    ),
    Kind(
        name="NVML: a set fails",
        inject=partial(_fails, calls=(_SET,), times=1),
        lasts_s=(0.3, 0.6),
        counts=(1, 12),
    ),
    Kind(
        name="NVML: sets fail on one GPU of the group",
        inject=partial(_fails, calls=(_SET,)),
        lasts_s=(0.1, 0.6),
        which=("one",),
    ),
    Kind(name="NVML: no set and no unlock works", inject=partial(_fails, calls=(_SET, _RESET)), lasts_s=(0.1, 0.6)),
    Kind(name="NVML: reads fail", inject=partial(_fails, calls=_READS), ends_gateway=True, lasts_s=(0.1, 0.6)),
    Kind(name="NVML: reads hang", inject=partial(_slow, calls=_READS[:1], sleep_s=_HANGS_S), lasts_s=(0.05, 0.2)),
)
