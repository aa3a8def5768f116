"""What goes wrong when a test says so, and what goes on."""

import os
import signal
import time

import pytest

from tests.nvml.caller import FailedError
from tools.nvml.machine import MachineError

SET = "nvmlDeviceSetGpuLockedClocks(gpu, 900, 900)"
NAME = "nvmlDeviceSetGpuLockedClocks"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can stop being root")
@pytest.mark.parametrize(
    "call",
    [
        SET,
        "nvmlDeviceResetGpuLockedClocks(gpu)",
        "nvmlDeviceSetPowerManagementLimit(gpu, 200_000)",
        "nvmlDeviceSetPersistenceMode(gpu, 0)",
    ],
)
def test_writes_need_permission_or_root(call, machine, caller):
    gpu = machine.gpus[0]
    gpu.permission(False)
    with pytest.raises(FailedError, match="NoPermission"):
        caller(call)
    gpu.permission(True)
    caller("os.seteuid(65534)")
    with pytest.raises(FailedError, match="NoPermission"):
        caller(call)
    assert caller("nvmlDeviceGetPowerUsage(gpu)")
    gpu.root_only(False)
    caller(call)
    caller("os.seteuid(0)")
    assert (gpu.attempted, gpu.effective) == (3, 1)
    assert [write.result for write in machine.writes()] == [4, 4, 0]


def test_a_lost_gpu_answers_nothing_and_comes_back(machine, caller):
    machine.gpus[0].lost(True)
    for call in (SET, "nvmlDeviceGetName(gpu)", "nvmlDeviceGetPowerUsage(gpu)", "nvmlDeviceGetHandleByIndex(0)"):
        with pytest.raises(FailedError, match="GpuIsLost"):
            caller(call)
    assert caller("nvmlDeviceGetCount(), nvmlDeviceGetIndex(others[0])") == (2, 1)
    machine.gpus[0].lost(False)
    assert caller("nvmlDeviceGetIndex(gpu)") == 0


def test_a_driver_that_goes_takes_the_locks_along(machine, caller_of):
    caller = caller_of(machine)
    caller(f"{SET}; nvmlDeviceSetPowerManagementLimit(gpu, 200_000)")
    machine.gpus[1].work(1, 10)
    machine.driver(False)
    for call in ("nvmlDeviceGetName(gpu)", "nvmlDeviceGetCount()", "nvmlInit()", SET):
        with pytest.raises(FailedError, match="DriverNotLoaded"):
            caller(call)
    machine.driver(True)
    assert machine.gpus[0].lock is None
    for call in ("nvmlDeviceGetName(gpu)", SET, "nvmlDeviceGetCount()"):
        with pytest.raises(FailedError, match="Uninitialized"):
            caller(call)
    caller("nvmlInit()")
    assert caller("nvmlDeviceGetPowerManagementLimit(gpu), nvmlDeviceGetPersistenceMode(gpu)") == (400_000, 0)
    caller(SET)
    caller("nvmlShutdown()")
    with pytest.raises(FailedError, match="Uninitialized"):
        caller("nvmlDeviceGetCount()")


def test_mig(machine, caller):
    machine.gpus[0].mig(True)
    assert caller("nvmlDeviceGetMigMode(gpu)") == [1, 1]
    with pytest.raises(FailedError, match="NotSupported"):
        caller("nvmlDeviceGetUtilizationRates(gpu)")


def test_a_call_fails_as_often_as_told(machine, caller):
    machine.fault("nvmlDeviceGetPowerUsage", error=999, nth=2, times=2)
    answers = []
    for _ in range(5):
        try:
            answers.append(caller("nvmlDeviceGetPowerUsage(gpu) > 0"))
        except FailedError as error:
            answers.append(str(error))
    assert answers == [True, "Unknown", "Unknown", True, True]


def test_only_on_one_gpu_and_in_one_process(machine, caller, caller_of):
    other = caller_of(machine)
    machine.fault("nvmlDeviceGetName", error=10, gpu=1, pid=caller.pid)
    assert caller("nvmlDeviceGetName(gpu)") == other("nvmlDeviceGetName(others[0])")
    for _ in range(3):
        with pytest.raises(FailedError, match="Timeout"):
            caller("nvmlDeviceGetName(others[0])")
    machine.clear_faults()
    assert caller("nvmlDeviceGetName(others[0])")


def test_init_can_fail_too(machine, caller_of):
    machine.fault("nvmlInitWithFlags", error=999, times=1)
    caller = caller_of(machine, init=False)
    with pytest.raises(FailedError, match="Unknown"):
        caller("nvmlInit()")
    caller("nvmlInit()")


def test_a_slow_call_keeps_nobody_else_waiting(machine, caller, caller_of):
    other = caller_of(machine)
    machine.fault(NAME, sleep_s=0.15, pid=caller.pid)
    began = time.monotonic()
    caller.send(SET)
    other("nvmlDeviceSetGpuLockedClocks(gpu, 600, 600)")
    if time.monotonic() - began < 0.1:
        assert machine.gpus[0].lock == (600, 600)
    caller.answer()
    assert time.monotonic() - began >= 0.15
    assert machine.gpus[0].lock == (900, 900)


def test_a_call_that_hangs_can_be_killed(machine, caller_of):
    caller = caller_of(machine)
    machine.fault(NAME, sleep_s=1e6)
    caller.send(SET)
    while not machine.gpus[0].attempted:
        time.sleep(0.001)
    caller.process.kill()
    assert caller.process.wait(5) == -signal.SIGKILL
    machine.clear_faults()
    caller_of(machine)("nvmlDeviceSetGpuLockedClocks(gpu, 600, 600)")
    assert (machine.gpus[0].lock, machine.gpus[0].attempted) == ((600, 600), 2)


def test_a_gpu_may_be_lost_while_a_call_sleeps(machine, caller):
    machine.fault(NAME, sleep_s=0.1)
    caller.send(SET)
    while not machine.gpus[0].attempted:
        time.sleep(0.001)
    machine.gpus[0].lost(True)
    with pytest.raises(FailedError, match="GpuIsLost"):
        caller.answer()
    assert machine.gpus[0].lock is None


@pytest.mark.parametrize(("kill", "lock"), [("before", None), ("after", (900, 900))])
def test_killed_on_either_side_of_the_effect(kill, lock, machine, caller_of):
    caller = caller_of(machine)
    machine.fault(NAME, kill=kill, nth=2, pid=caller.pid)
    caller("nvmlDeviceSetGpuLockedClocks(others[0], 600, 600)")
    assert caller.dies(SET) == signal.SIGKILL
    gpu = machine.gpus[0]
    assert (gpu.lock, gpu.attempted, gpu.effective) == (lock, 1, int(lock is not None))
    assert [write.gpu for write in machine.writes()] == ([1] if lock is None else [1, 0])


def test_a_call_that_there_is_not_cannot_fail(machine):
    for call in ("nvmlInit", "nvmlDeviceGetFanSpeed", "fake_nvml_work", "nvmlErrorString"):
        with pytest.raises(MachineError, match="name in C"):
            machine.fault(call, error=3)
    with pytest.raises(MachineError, match="give sleep_s"):
        machine.fault(NAME)
    for _ in range(64):
        machine.fault(NAME, error=3)
    with pytest.raises(MachineError, match="64 faults"):
        machine.fault(NAME, error=3)


def test_a_change_that_no_gpu_can_make_is_refused(machine):
    with pytest.raises(MachineError, match="NVML error 2"):
        machine.gpus[0].work(7, 1)
    with pytest.raises(MachineError, match="16 at most"):
        machine.gpus[0].mps(range(17))
