"""GPUs through nvidia-ml-py, on the fake library: readings, failures, locks."""

import time

import pynvml
import pytest

from throttllem.gpu.boards.facts import read_board
from throttllem.gpu.clock_range import ClockRange
from throttllem.gpu.hardware import found_gpu
from throttllem.gpu.locks import LockableGpu
from throttllem.gpu.nvml import Nvml, NvmlError, NvmlGpu, Sharing, ThrottleReason, Trouble
from throttllem.physics.catalogue import Catalogue
from throttllem.physics.recognition import recognise
from tools.nvml.machine import a100, h100, rtx4090


@pytest.fixture
def gpu(machine):
    with Nvml() as nvml:
        yield NvmlGpu(nvml, machine.gpus[0].uuid)


def test_what_is_read_of_a_gpu(machine, gpu):
    assert gpu.nvml.gpus() == {number: one.uuid for number, one in enumerate(machine.gpus)}
    assert (gpu.index(), gpu.name()) == (0, "NVIDIA A100-SXM4-40GB")
    clocks = gpu.clocks_mhz()
    assert (clocks[0], clocks[-1], len(clocks)) == (210, 1410, 81)
    sample = gpu.sample()
    assert (sample.clock_mhz, sample.throttle) == (1410, ThrottleReason.NONE)
    assert sample.watts == pytest.approx(machine.gpus[0].watts, rel=0.01)
    assert sample.energy_j is not None and gpu.limit_w() == 400.0
    assert gpu.processes() == () and gpu.sharing() is None


def test_a_gpu_for_reading_cannot_be_set():
    assert not {name for name in dir(NvmlGpu) if "lock" in name.lower() and name not in ("clock_mhz", "clocks_mhz")}
    assert {"lock", "restore"} <= set(dir(LockableGpu))


def test_a_missing_counter_is_no_error(machine, gpu):
    machine.gpus[0].energy_counter(False)
    assert gpu.sample().energy_j is None


@pytest.mark.parametrize(
    ("break_it", "trouble", "text"),
    [
        (lambda machine: machine.gpus[0].lost(True), Trouble.LOST, "dmesg"),
        (lambda machine: machine.driver(False), Trouble.NO_DRIVER, "load the NVIDIA driver"),
    ],
)
def test_an_error_names_the_gpu_and_the_remedy(machine, gpu, break_it, trouble, text):
    gpu.sample()
    break_it(machine)
    with pytest.raises(NvmlError, match=text) as failed:
        gpu.sample()
    assert failed.value.trouble is trouble and (gpu.uuid in str(failed.value) or trouble is Trouble.NO_DRIVER)


def test_a_gpu_that_comes_back_is_read_again(machine, gpu):
    machine.gpus[0].lost(True)
    with pytest.raises(NvmlError):
        gpu.sample()
    machine.gpus[0].lost(False)
    assert gpu.sample().clock_mhz
    machine.driver(False)
    with pytest.raises(NvmlError):
        gpu.sample()
    machine.driver(True)
    assert gpu.sample().clock_mhz


def test_an_unknown_gpu_is_named(machine, gpu):
    with pytest.raises(NvmlError, match=r"GPU-nobody.*doctor"):
        NvmlGpu(gpu.nvml, "GPU-nobody").sample()


def test_a_shared_gpu_is_not_locked(machine, gpu):
    lockable = LockableGpu(gpu.nvml, gpu.uuid)
    machine.gpus[0].mig(True)
    assert gpu.sharing() is Sharing.MIG
    with pytest.raises(NvmlError, match="MIG is on"):
        lockable.lock(ClockRange(900, 900))
    machine.gpus[0].mig(False)
    machine.gpus[0].mps([4711])
    assert gpu.sharing() is Sharing.MPS
    with pytest.raises(NvmlError, match="MPS shares it"):
        lockable.check()
    assert machine.gpus[0].attempted == 0


def test_a_lock_is_set_and_a_baseline_restored(machine, gpu):
    lockable = LockableGpu(gpu.nvml, gpu.uuid)
    lockable.lock(ClockRange(900, 900))
    assert (machine.gpus[0].lock, gpu.clock_mhz()) == ((900, 900), 900)
    lockable.restore(ClockRange(600, 1200))
    assert machine.gpus[0].lock == (600, 1200)
    lockable.restore(None)
    assert machine.gpus[0].lock is None


def test_the_driver_checks_the_permission(machine, gpu):
    machine.gpus[0].permission(False)
    with pytest.raises(NvmlError, match="needs root") as denied:
        LockableGpu(gpu.nvml, gpu.uuid).lock(ClockRange(900, 900))
    assert denied.value.trouble is Trouble.DENIED and machine.gpus[0].lock is None


def test_samples_have_monotonic_times(gpu):
    before = time.monotonic()
    assert before <= gpu.sample().at_s <= time.monotonic()


def test_a_lost_gpu_keeps_its_number(machine, gpu):
    machine.gpus[0].lost(True)
    lost, here = gpu.nvml.gpus().values()
    assert (lost.trouble, here) == (Trouble.LOST, machine.gpus[1].uuid)
    assert found_gpu(gpu.nvml, "1").uuid == machine.gpus[1].uuid
    with pytest.raises(ValueError, match=r"0 is not here; here are 1 = GPU-.*; GPU 0: GPU is lost"):
        found_gpu(gpu.nvml, "0")


MISSING = pynvml.NVML_ERROR_FUNCTION_NOT_FOUND
OPTIONAL = (
    "nvmlDeviceGetCurrentClocksEventReasons",
    "nvmlDeviceGetCurrentClocksThrottleReasons",
    "nvmlDeviceGetTotalEnergyConsumption",
    "nvmlDeviceGetEnforcedPowerLimit",
    "nvmlDeviceGetPowerManagementLimit",
    "nvmlDeviceGetPowerManagementDefaultLimit",
    "nvmlDeviceGetMigMode",
    "nvmlDeviceGetMPSComputeRunningProcesses_v3",
    "nvmlDeviceGetMPSComputeRunningProcesses_v2",
    "nvmlDeviceGetComputeRunningProcesses_v3",
    "nvmlDeviceGetComputeRunningProcesses_v2",
    "nvmlDeviceGetUtilizationRates",
    "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetCudaComputeCapability",
    "nvmlDeviceGetNumGpuCores",
    "nvmlDeviceGetMemoryBusWidth",
)


def test_a_driver_before_r535_has_the_older_name_of_the_reasons(machine, gpu):
    machine.fault("nvmlDeviceGetCurrentClocksEventReasons", error=MISSING)
    machine.gpus[0].thermal(705)
    assert gpu.throttle() == ThrottleReason.THERMAL and gpu.sample().clock_mhz == 705


@pytest.mark.parametrize("error", [MISSING, pynvml.NVML_ERROR_NOT_SUPPORTED])
def test_calls_that_a_driver_lacks_hide_no_gpu(machine, gpu, error):
    for call in OPTIONAL:
        machine.fault(call, error=error)
    assert gpu.nvml.gpus() == {number: one.uuid for number, one in enumerate(machine.gpus)}
    sample = gpu.sample()
    assert (sample.clock_mhz, sample.energy_j, sample.throttle) == (1410, None, ThrottleReason.NONE)
    assert sample.watts == pytest.approx(machine.gpus[0].watts, rel=0.01)
    assert (gpu.limit_w(), gpu.sharing(), gpu.processes()) == (None, None, None)
    board = read_board(gpu)
    assert (board.name, board.memory_bytes, board.limit_w) == ("NVIDIA A100-SXM4-40GB", None, None)
    assert recognise(board, Catalogue.load()).gpu.name == "a100-40gb-sxm"


def test_an_older_driver_lists_processes_by_the_older_name(machine, gpu):
    machine.fault("nvmlDeviceGetComputeRunningProcesses_v3", error=MISSING)
    machine.fault("nvmlDeviceGetMPSComputeRunningProcesses_v3", error=MISSING)
    machine.gpus[0].processes([7])
    machine.gpus[0].mps([8])
    assert gpu.processes() == (7,) and gpu.sharing() is Sharing.MPS


def test_the_limit_that_is_set_stands_in_for_the_enforced_one(machine, gpu):
    machine.fault("nvmlDeviceGetEnforcedPowerLimit", error=pynvml.NVML_ERROR_NOT_SUPPORTED)
    assert gpu.limit_w() == 400.0


def test_without_power_reading_and_counter_it_says_so(machine, gpu):
    machine.gpus[0].energy_counter(False)
    machine.gpus[0].power_reading(False)
    with pytest.raises(NvmlError, match="neither a power reading nor a counter"):
        gpu.sample()


def test_a_library_that_does_not_fit_the_driver_has_its_own_remedy(machine):
    machine.fault("nvmlInitWithFlags", error=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
    with pytest.raises(NvmlError, match="old kernel module stays loaded: reboot") as caught, Nvml():
        pass
    assert caught.value.trouble is Trouble.MISMATCH


@pytest.mark.parametrize("part", [a100, h100, rtx4090])
def test_facts_of_a_board_are_read(make_gpus_here, part):
    (made,) = make_gpus_here(*part(1)).gpus
    with Nvml() as nvml:
        board = read_board(NvmlGpu(nvml, made.uuid))
    found = recognise(board, Catalogue.load())
    assert found.listed and board.multiprocessors == found.gpu.multiprocessors
    assert board.bandwidth_bytes_per_s == pytest.approx(found.gpu.bandwidth_bytes_per_s, rel=0.01)
    assert board.limit_w == found.gpu.power.limit_w
