"""The law of the clock: what is set, when it takes effect, and what heat and power leave of it."""

import statistics
import time

import pynvml
import pytest

from tests.nvml.caller import FailedError
from tools.nvml.machine import Op, a100, h100


def reasons(caller):
    found = caller("nvmlDeviceGetCurrentClocksEventReasons(gpu)")
    assert found == caller("nvmlDeviceGetCurrentClocksThrottleReasons(gpu)")
    assert found & ~caller("nvmlDeviceGetSupportedClocksEventReasons(gpu)") == 0
    return found


def clock(caller):
    return caller("nvmlDeviceGetClockInfo(gpu, NVML_CLOCK_SM)")


def test_busy_at_the_top_and_idle_at_the_bottom(quick, quick_caller):
    caller, gpu = quick_caller, quick.gpus[0]
    assert (clock(caller), reasons(caller)) == (210, pynvml.nvmlClocksEventReasonGpuIdle)
    gpu.work(0.5, 10)
    assert (clock(caller), reasons(caller)) == (1410, 0)
    assert quick.gpus[1].clock_mhz == 210


def test_a_context_may_keep_the_clock_up(make_gpus):
    gpu = make_gpus(*h100(switch_ms=(0, 0))).gpus[0]
    assert gpu.clock_mhz == 1980
    gpu.context(False)
    assert gpu.clock_mhz == 345


def test_a_lock_holds_busy_high_and_idle_low(quick, quick_caller):
    caller, gpu = quick_caller, quick.gpus[0]
    caller("nvmlDeviceSetGpuLockedClocks(gpu, 600, 900)")
    assert (clock(caller), gpu.lock) == (600, (600, 900))
    gpu.work(1, 10)
    assert clock(caller) == 900
    caller("nvmlDeviceResetGpuLockedClocks(gpu)")
    assert (clock(caller), gpu.lock) == (1410, None)


@pytest.mark.parametrize(
    ("asked", "got"),
    [((1000, 1000), (1005, 1005)), ((997, 997), (990, 990)), ((1, 5000), (210, 1410)), ((211, 1403), (210, 1410))],
)
def test_the_nearest_supported_clocks_are_taken(asked, got, quick, quick_caller):
    quick_caller(f"nvmlDeviceSetGpuLockedClocks(gpu, {asked[0]}, {asked[1]})")
    assert quick.gpus[0].lock == got


@pytest.mark.parametrize("asked", [(900, 600), (0, 900), (0, 0), (900, pynvml.NVML_CLOCK_LIMIT_ID_TDP)])
def test_a_range_that_makes_no_sense_changes_nothing(asked, quick, quick_caller):
    caller = quick_caller
    caller("nvmlDeviceSetGpuLockedClocks(gpu, 900, 900)")
    with pytest.raises(FailedError, match="InvalidArgument"):
        caller(f"nvmlDeviceSetGpuLockedClocks(gpu, {asked[0]}, {asked[1]})")
    assert quick.gpus[0].lock == (900, 900)


def test_symbolic_limits(quick, quick_caller):
    caller = quick_caller
    caller("nvmlDeviceSetGpuLockedClocks(gpu, 900, 900)")
    caller("nvmlDeviceSetGpuLockedClocks(gpu, NVML_CLOCK_LIMIT_ID_UNLIMITED, NVML_CLOCK_LIMIT_ID_UNLIMITED)")
    assert quick.gpus[0].lock is None
    with pytest.raises(FailedError, match="NotSupported"):
        caller("nvmlDeviceSetGpuLockedClocks(gpu, NVML_CLOCK_LIMIT_ID_TDP, NVML_CLOCK_LIMIT_ID_TDP)")


def test_how_long_a_switch_takes_depends_on_the_target():
    (part,) = a100()
    lasts = [part.switch_s(clock) for clock in part.clocks_mhz]
    assert statistics.median(lasts) == pytest.approx(0.0045, rel=0.2)
    assert 0.010 < max(lasts) <= 0.013
    assert len(set(lasts)) == len(lasts)
    assert a100()[0].switch_s(1005) == part.switch_s(1005)


def test_a_switch_takes_effect_when_its_time_has_come(machine, caller_of):
    (part, _), gpu = a100(2), machine.gpus[0]
    gpu.work(1, 10)
    time.sleep(0.015)
    assert gpu.clock_mhz == 1410
    slow = max(part.clocks_mhz[:-1], key=part.switch_s)
    began = time.monotonic()
    gpu.lock_by_other(slow, slow)
    seen = gpu.clock_mhz
    if time.monotonic() - began < part.switch_s(slow):  # this machine may have been away for longer
        assert seen == 1410
    assert gpu.lock == (slow, slow)
    assert gpu.truth.target_mhz == slow
    while gpu.clock_mhz != slow:
        assert time.monotonic() - began < 1
    assert time.monotonic() - began >= part.switch_s(slow)


def test_the_last_of_two_switches_counts(machine):
    gpu = machine.gpus[0]
    gpu.lock_by_other(900, 900)
    gpu.lock_by_other(600, 600)
    time.sleep(0.02)
    assert gpu.clock_mhz == 600
    gpu.lock_by_other(900, 900)
    gpu.lock_by_other(600, 600)  # where it still is
    assert (gpu.clock_mhz, gpu.truth.target_mhz) == (600, 600)


@pytest.mark.parametrize(
    ("hardware", "reason"),
    [
        (False, pynvml.nvmlClocksEventReasonSwThermalSlowdown),
        (True, pynvml.nvmlClocksEventReasonHwThermalSlowdown | pynvml.nvmlClocksEventReasonHwSlowdown),
    ],
)
def test_heat_takes_the_clock_down_at_once(hardware, reason, machine, caller):
    gpu = machine.gpus[0]
    gpu.work(0.5, 10)
    time.sleep(0.015)
    gpu.thermal(1001, hardware=hardware)
    assert (clock(caller), reasons(caller)) == (990, reason)
    time.sleep(0.01)
    assert caller("nvmlDeviceGetViolationStatus(gpu, NVML_PERF_POLICY_THERMAL).violationTime") > 9e6
    assert caller("nvmlDeviceGetViolationStatus(gpu, NVML_PERF_POLICY_POWER).violationTime") == 0
    gpu.thermal(None)
    assert (clock(caller), reasons(caller)) == (1410, 0)


def test_heat_above_the_set_clock_is_no_reason(quick, quick_caller):
    caller, gpu = quick_caller, quick.gpus[0]
    gpu.work(0.5, 10)
    gpu.lock_by_other(900, 900)
    gpu.thermal(1200)
    assert (clock(caller), reasons(caller)) == (900, 0)


def test_power_takes_the_clock_down_to_the_highest_that_fits(quick, quick_caller):
    (part, _), caller, gpu = a100(2), quick_caller, quick.gpus[0]
    gpu.work(1, 10)
    gpu.limit_w(300)
    fits = max(clock for clock, watts in zip(part.clocks_mhz, part.busy_w, strict=True) if watts <= 300)
    assert (clock(caller), reasons(caller)) == (fits, pynvml.nvmlClocksEventReasonSwPowerCap)
    assert 290 < gpu.watts <= 300
    gpu.work(0.5, 10)
    assert (clock(caller), reasons(caller)) == (1410, 0)


def test_below_all_clocks_power_is_what_it_is(quick):
    gpu = quick.gpus[0]
    gpu.work(1.5, 10)
    gpu.limit_w(100)
    assert gpu.clock_mhz == 210
    assert gpu.watts > 100


def test_the_log_tells_who_wrote_what(quick, quick_caller):
    caller, gpu = quick_caller, quick.gpus[0]
    before = time.monotonic()
    caller("nvmlDeviceSetGpuLockedClocks(gpu, 1001, 1002)")
    with pytest.raises(FailedError):
        caller("nvmlDeviceSetGpuLockedClocks(gpu, 2, 1)")
    caller("nvmlDeviceSetPowerManagementLimit(gpu, 200_000)")
    caller("nvmlDeviceSetPersistenceMode(gpu, 1)")
    caller("nvmlDeviceResetGpuLockedClocks(gpu)")
    gpu.lock_by_other(900, 900)  # not through NVML
    found = quick.writes()
    assert [(write.op, write.low, write.high, write.result) for write in found] == [
        (Op.LOCK, 1001, 1002, 0),
        (Op.LOCK, 2, 1, pynvml.NVML_ERROR_INVALID_ARGUMENT),
        (Op.POWER_LIMIT, 200_000, 0, 0),
        (Op.PERSISTENCE, 1, 0, 0),
        (Op.UNLOCK, 0, 0, 0),
    ]
    assert {(write.pid, write.gpu) for write in found} == {(caller.pid, 0)}
    assert before <= found[0].at_s <= found[-1].at_s <= time.monotonic()
    assert (gpu.attempted, gpu.effective) == (5, 4)
    assert (quick.gpus[1].attempted, quick.gpus[1].effective) == (0, 0)


def test_the_log_keeps_the_last_1024(quick, quick_caller):
    caller = quick_caller
    caller("for n in range(1100): nvmlDeviceSetGpuLockedClocks(gpu, 300 + n, 1400)")
    found = quick.writes()
    assert [write.low for write in found] == list(range(300 + 76, 300 + 1100))
    assert quick.gpus[0].effective == 1100


def test_a_reset_makes_it_new(quick, quick_caller):
    caller, gpu = quick_caller, quick.gpus[0]
    caller("nvmlDeviceSetGpuLockedClocks(gpu, 900, 900); nvmlDeviceSetPowerManagementLimit(gpu, 200_000)")
    gpu.work(1, 10)
    gpu.lost(True)
    gpu.mps([1])
    quick.fault("nvmlDeviceGetName", error=3)
    quick.reset()
    assert (gpu.lock, gpu.clock_mhz, gpu.attempted, gpu.effective, quick.writes()) == (None, 210, 0, 0, [])
    assert gpu.energy_j < 1
    assert caller("nvmlDeviceGetName(gpu)")
    assert caller("nvmlDeviceGetPowerManagementLimit(gpu)") == 400_000
    assert caller("nvmlDeviceGetMPSComputeRunningProcesses(gpu)") == []
    lasts = []
    for _ in range(50):
        began = time.perf_counter()
        quick.reset()
        lasts.append(time.perf_counter() - began)
    assert min(lasts) < 0.002  # measured: 25 us
