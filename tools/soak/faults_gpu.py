"""What can happen to the GPUs, to the driver and to calls of NVML."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from tools.nvml.machine import FakeGpu
from tools.soak.evidence import Other
from tools.soak.house import House
from tools.soak.kind import Kind, lasting, obstacle
from tools.soak.schedule import Fault

_SET, _RESET = "nvmlDeviceSetGpuLockedClocks", "nvmlDeviceResetGpuLockedClocks"
_READS = ("nvmlDeviceGetClockInfo", "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetCurrentClocksEventReasons")
_UNKNOWN = 999
_HANGS_S, _SLOW_S = 1.5, 0.2

On = Callable[[FakeGpu, bool], None]


def _while(on: On, *, hinders: bool = False) -> Callable[[House, Fault], Awaitable[None]]:
    """One GPU is so for some time."""

    async def inject(house: House, fault: Fault) -> None:
        gpu = house.machine.gpus[fault.gpu]
        if hinders:
            with obstacle(house, fault.kind):
                await held(house, fault, gpu)
        else:
            await held(house, fault, gpu)

    async def held(house: House, fault: Fault, gpu: FakeGpu) -> None:
        on(gpu, True)
        await lasting(house, fault)
        on(gpu, False)

    return inject


def _unlocked(house: House) -> None:
    """A driver that is loaded anew has forgotten every lock."""
    now_s = time.monotonic()
    house.evidence.others += [Other(at_s=now_s, gpu=gpu.index, lock=None) for gpu in house.machine.gpus]


async def _driver(house: House, fault: Fault) -> None:
    with obstacle(house, fault.kind):
        house.machine.driver(False)
        _unlocked(house)
        await lasting(house, fault)
        house.machine.driver(True)
        _unlocked(house)


async def _other(house: House, fault: Fault) -> None:
    """Somebody else's tool locks it, in the midst of a lease or not."""
    lock = 300 + 15 * fault.count, 300 + 15 * fault.count
    house.machine.gpus[fault.gpu].lock_by_other(*lock)
    house.evidence.others.append(Other(at_s=time.monotonic(), gpu=fault.gpu, lock=lock))


async def _counter(house: House, fault: Fault) -> None:
    house.machine.gpus[fault.gpu].reset_energy_counter()


async def _slow(house: House, fault: Fault, calls: tuple[str, ...], sleep_s: float) -> None:
    """A call that has begun goes on sleeping when the fault is lifted."""
    with obstacle(house, fault.kind, after_s=sleep_s):
        await _faulty(house, fault, calls, sleep_s=sleep_s)


async def _fails(house: House, fault: Fault, calls: tuple[str, ...], times: int | None = None) -> None:
    """`which`: on one GPU only, or on any."""
    gpu = fault.gpu if fault.which == "one" else None
    with obstacle(house, fault.kind):
        await _faulty(house, fault, calls, error=_UNKNOWN, times=times, nth=fault.count, gpu=gpu)


async def _faulty(house: House, fault: Fault, calls: tuple[str, ...], **how: Any) -> None:
    faults = [house.nvml_fault(call, **how) for call in calls]
    await lasting(house, fault)
    for one in faults:
        house.nvml_again(one)


KINDS = (
    Kind(name="GPU: driver loaded anew", inject=_driver, ends_gateway=True, lasts_s=(0.02, 0.4), ends_keeper=True),
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
    Kind(name="GPU: energy counter begins anew", inject=_counter),
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
