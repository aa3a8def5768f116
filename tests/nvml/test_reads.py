"""What the unmodified nvidia-ml-py reads."""

import os

import pynvml
import pytest

from tests.nvml.caller import FailedError
from tools.nvml.machine import a100


def test_what_a_gpu_is(machine, caller):
    assert caller("nvmlDeviceGetCount()") == 2
    assert caller("nvmlDeviceGetName(gpu)") == "NVIDIA A100-SXM4-40GB"
    assert caller("nvmlDeviceGetUUID(gpu)") == machine.gpus[0].uuid
    assert caller(f"nvmlDeviceGetIndex(nvmlDeviceGetHandleByUUID('{machine.gpus[1].uuid}'))") == 1
    for bus_id in ("00000000:02:00.0", "0000:02:00.0", "02:00.0"):
        assert caller(f"nvmlDeviceGetIndex(nvmlDeviceGetHandleByPciBusId('{bus_id}'))") == 1
    assert caller("nvmlDeviceGetPciInfo(gpu).busId") == "00000000:01:00.0"
    assert caller("nvmlDeviceGetPciInfo(gpu).busIdLegacy") == "0000:01:00.0"
    assert caller("nvmlDeviceGetMinorNumber(others[0])") == 1
    assert caller("nvmlDeviceGetSerial(gpu) != nvmlDeviceGetSerial(others[0])")
    assert caller("nvmlDeviceGetCudaComputeCapability(gpu)") == (8, 0)
    assert caller("nvmlDeviceGetArchitecture(gpu)") == pynvml.NVML_DEVICE_ARCH_AMPERE
    assert caller("nvmlDeviceGetBrand(gpu)") == pynvml.NVML_BRAND_NVIDIA
    assert caller("nvmlDeviceGetMigMode(gpu)") == [0, 0]
    assert caller("[nvmlDeviceGetComputeMode(gpu), nvmlDeviceGetPerformanceState(gpu)]") == [0, 0]
    assert caller("nvmlDeviceGetPowerState(gpu)") == 0


def test_an_extended_bus_record(caller):
    caller("info = nvmlPciInfoExt_v1_t(); info.version = nvmlPciInfoExt_v1")
    caller("nvmlDeviceGetPciInfoExt(others[0], byref(info))")
    assert caller("info.busId, info.bus, info.baseClass") == ("00000000:02:00.0", 2, 3)
    with pytest.raises(FailedError, match="ArgumentVersionMismatch"):
        caller("info.version = 7; nvmlDeviceGetPciInfoExt(gpu, byref(info))")


def test_clocks_are_listed_as_nvml_does(caller):
    assert caller("nvmlDeviceGetSupportedMemoryClocks(gpu)") == [1215]
    clocks = caller("nvmlDeviceGetSupportedGraphicsClocks(gpu, 1215)")
    assert clocks == list(range(1410, 209, -15))
    with pytest.raises(FailedError, match="NotFound"):
        caller("nvmlDeviceGetSupportedGraphicsClocks(gpu, 1214)")
    assert caller("[nvmlDeviceGetMaxClockInfo(gpu, type) for type in (0, 1, 2)]") == [1410, 1410, 1215]
    assert caller("[nvmlDeviceGetClockInfo(gpu, type) for type in (0, 1, 2)]") == [210, 210, 1215]
    assert caller("nvmlDeviceGetClock(gpu, NVML_CLOCK_SM, NVML_CLOCK_ID_CURRENT)") == 210


def test_the_system(caller):
    assert caller("nvmlSystemGetDriverVersion()") == "580.95.05"
    assert caller("nvmlSystemGetNVMLVersion()").startswith("13.")
    assert caller("nvmlSystemGetCudaDriverVersion(), nvmlSystemGetCudaDriverVersion_v2()") == (13000, 13000)
    assert "python" in caller(f"nvmlSystemGetProcessName({os.getpid()})")
    with pytest.raises(FailedError, match="NotFound"):
        caller(f"nvmlSystemGetProcessName({2**31 - 1})")
    assert caller("nvmlErrorString(NVML_ERROR_GPU_IS_LOST)") == "GPU is lost"


def test_power_and_its_limits(machine, caller):
    assert caller("nvmlDeviceGetPowerUsage(gpu)") == a100(1)[0].idle_w * 1000
    assert caller("nvmlDeviceGetPowerManagementLimitConstraints(gpu)") == [100_000, 400_000]
    assert caller("nvmlDeviceGetPowerManagementLimit(gpu)") == 400_000
    caller("nvmlDeviceSetPowerManagementLimit(gpu, 300_000)")
    assert caller("nvmlDeviceGetPowerManagementLimit(gpu)") == 300_000
    assert caller("nvmlDeviceGetPowerManagementDefaultLimit(gpu)") == 400_000
    machine.gpus[0].limit_w(250)
    assert caller("nvmlDeviceGetEnforcedPowerLimit(gpu)") == 250_000
    machine.gpus[0].limit_w(None)
    assert caller("nvmlDeviceGetEnforcedPowerLimit(gpu)") == 300_000
    with pytest.raises(FailedError, match="InvalidArgument"):
        caller("nvmlDeviceSetPowerManagementLimit(gpu, 99_999)")


def test_field_values(machine, caller):
    asked = "NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION, NVML_FI_DEV_POWER_INSTANT, NVML_FI_DEV_POWER_AVERAGE"
    caller(f"found = nvmlDeviceGetFieldValues(gpu, [{asked}, NVML_FI_DEV_NVLINK_GET_STATE])")
    assert caller("[each.nvmlReturn for each in found]") == [0, 0, 0, pynvml.NVML_ERROR_NOT_SUPPORTED]
    assert caller("found[1].value.uiVal, found[2].value.uiVal") == (a100(1)[0].idle_w * 1000,) * 2
    assert caller("abs(found[0].timestamp - time.time() * 1e6)") < 5e6
    caller("found = nvmlDeviceGetFieldValues(gpu, [(NVML_FI_DEV_POWER_INSTANT, NVML_POWER_SCOPE_MEMORY)])")
    assert caller("found[0].nvmlReturn") == pynvml.NVML_ERROR_NOT_SUPPORTED


def test_load_memory_heat_and_processes(machine, caller):
    gpu = machine.gpus[0]
    gpu.work(0.4, 10)
    gpu.temperature(61)
    gpu.memory_used(2**30)
    gpu.processes([11, 12])
    gpu.mps([13])
    assert caller("fields(nvmlDeviceGetUtilizationRates(gpu))") == {"gpu": 40, "memory": 40}
    memory = {"total": 42_500_000_000, "used": 2**30, "free": 42_500_000_000 - 2**30}
    assert caller("fields(nvmlDeviceGetMemoryInfo(gpu))") == memory
    assert memory.items() < caller("fields(nvmlDeviceGetMemoryInfo(gpu, nvmlMemory_v2))").items()
    assert caller("nvmlDeviceGetTemperature(gpu, 0), nvmlDeviceGetTemperatureV(gpu, 0)") == (61, 61)
    assert caller("[each.pid for each in nvmlDeviceGetComputeRunningProcesses(gpu)]") == [11, 12]
    assert caller("[each.usedGpuMemory for each in nvmlDeviceGetMPSComputeRunningProcesses(gpu)]") == [None]
    assert caller("nvmlDeviceGetGraphicsRunningProcesses(gpu)") == []
    assert caller("nvmlDeviceGetComputeRunningProcesses(others[0])") == []
    assert caller("nvmlDeviceGetEncoderUtilization(gpu)[0], nvmlDeviceGetDecoderUtilization(gpu)[0]") == (0, 0)


def test_persistence_is_kept(caller):
    assert caller("nvmlDeviceGetPersistenceMode(gpu)") == 1
    caller("nvmlDeviceSetPersistenceMode(gpu, 0)")
    assert caller("nvmlDeviceGetPersistenceMode(gpu)") == 0


@pytest.mark.parametrize(
    "call",
    [
        "nvmlDeviceGetTotalEccErrors(gpu, 0, 0)",
        "nvmlDeviceGetPcieThroughput(gpu, 0)",
        "nvmlDeviceGetC2cModeInfoV(gpu)",
        "nvmlDeviceGetJpgUtilization(gpu)",
        "nvmlDeviceGetProcessesUtilizationInfo(gpu, 0)",
        "nvmlDeviceGetViolationStatus(gpu, NVML_PERF_POLICY_SYNC_BOOST)",
        "nvmlDeviceGetClockInfo(gpu, NVML_CLOCK_VIDEO)",
        "nvmlDeviceGetClock(gpu, NVML_CLOCK_SM, NVML_CLOCK_ID_APP_CLOCK_TARGET)",
    ],
)
def test_what_these_gpus_have_not_is_said_so(call, caller):
    with pytest.raises(FailedError, match="NotSupported"):
        caller(call)


@pytest.mark.parametrize(
    "call",
    [
        "nvmlDeviceGetApplicationsClock(gpu, 0)",
        "nvmlDeviceSetMemoryLockedClocks(gpu, 1215, 1215)",
        "nvmlDeviceGetFanSpeed(gpu)",
        "nvmlSystemGetHicVersion()",
    ],
)
def test_what_the_library_does_not_know_is_no_symbol(call, caller):
    with pytest.raises(FailedError, match="FunctionNotFound"):
        caller(call)


@pytest.mark.parametrize(
    "call",
    [
        "nvmlDeviceGetHandleByIndex(2)",
        "nvmlDeviceGetName(None)",
        "nvmlDeviceGetName(cast(12345, c_nvmlDevice_t))",
        "nvmlDeviceGetClockInfo(gpu, 9)",
        "nvmlDeviceGetTemperature(gpu, 5)",
    ],
)
def test_what_makes_no_sense_is_an_invalid_argument(call, caller):
    caller("from ctypes import cast")
    with pytest.raises(FailedError, match="InvalidArgument"):
        caller(call)


def test_gpus_that_are_not_there(caller):
    for call in ("UUID('GPU-0')", "PciBusId('00000000:09:00.0')"):
        with pytest.raises(FailedError, match="NotFound"):
            caller(f"nvmlDeviceGetHandleBy{call}")


def test_only_between_init_and_shutdown(machine, caller_of):
    caller = caller_of(machine)
    caller("nvmlInit(); nvmlShutdown(); nvmlDeviceGetCount()")  # twice in, once out
    caller("nvmlShutdown()")
    for call in ("nvmlDeviceGetCount()", "nvmlDeviceGetName(gpu)", "nvmlShutdown()", "nvmlSystemGetDriverVersion()"):
        with pytest.raises(FailedError, match="Uninitialized"):
            caller(call)
    caller("nvmlInit()")
    assert caller("nvmlDeviceGetIndex(gpu)") == 0
