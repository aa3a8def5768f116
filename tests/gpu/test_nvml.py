"""GPUs through nvidia-ml-py, on the fake library: readings, what is refused, locks that are set and reset."""

import time

import pytest

from throttllem.gpu.hardware import found_gpu
from throttllem.gpu.locks import LockableGpu
from throttllem.gpu.nvml import Brake, Lock, Nvml, NvmlError, NvmlGpu, Trouble, Use


@pytest.fixture
def gpu(machine):
    with Nvml() as nvml:
        yield NvmlGpu(nvml, machine.gpus[0].uuid)


def test_what_a_gpu_says(machine, gpu):
    assert gpu.nvml.gpus() == {number: one.uuid for number, one in enumerate(machine.gpus)}
    assert (gpu.index(), gpu.name()) == (0, "NVIDIA A100-SXM4-40GB")
    clocks = gpu.clocks_mhz()
    assert (clocks[0], clocks[-1], len(clocks)) == (210, 1410, 81)
    sample = gpu.sample()
    assert (sample.clock_mhz, sample.brake) == (1410, Brake.NONE)
    assert sample.watts == pytest.approx(machine.gpus[0].watts, rel=0.01)
    assert sample.energy_j is not None and gpu.limit_w() == 400.0
    assert gpu.processes() == () and gpu.use() is None


def test_reading_offers_no_way_to_set():
    assert not {name for name in dir(NvmlGpu) if "lock" in name.lower() and name not in ("clock_mhz", "clocks_mhz")}
    assert {"lock", "restore"} <= set(dir(LockableGpu))


def test_no_counter_is_no_error(machine, gpu):
    machine.gpus[0].energy_counter(False)
    assert gpu.sample().energy_j is None


@pytest.mark.parametrize(
    ("break_it", "trouble", "words"),
    [
        (lambda machine: machine.gpus[0].lost(True), Trouble.LOST, "dmesg"),
        (lambda machine: machine.driver(False), Trouble.NO_DRIVER, "load the NVIDIA driver"),
    ],
)
def test_what_fails_says_what_and_how_to_mend_it(machine, gpu, break_it, trouble, words):
    gpu.sample()
    break_it(machine)
    with pytest.raises(NvmlError, match=words) as failed:
        gpu.sample()
    assert failed.value.trouble is trouble and (gpu.uuid in str(failed.value) or trouble is Trouble.NO_DRIVER)


def test_what_comes_back_is_read_again(machine, gpu):
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


def test_shared_gpus_are_not_to_be_set(machine, gpu):
    lockable = LockableGpu(gpu.nvml, gpu.uuid)
    machine.gpus[0].mig(True)
    assert gpu.use() is Use.MIG
    with pytest.raises(NvmlError, match="MIG is on"):
        lockable.lock(Lock(900, 900))
    machine.gpus[0].mig(False)
    machine.gpus[0].mps([4711])
    assert gpu.use() is Use.MPS
    with pytest.raises(NvmlError, match="MPS shares it"):
        lockable.check()
    assert machine.gpus[0].attempted == 0


def test_a_lock_is_set_and_a_baseline_restored(machine, gpu):
    lockable = LockableGpu(gpu.nvml, gpu.uuid)
    lockable.lock(Lock(900, 900))
    assert (machine.gpus[0].lock, gpu.clock_mhz()) == ((900, 900), 900)
    lockable.restore(Lock(600, 1200))
    assert machine.gpus[0].lock == (600, 1200)
    lockable.restore(None)
    assert machine.gpus[0].lock is None


def test_permission_is_asked_of_the_driver(machine, gpu):
    machine.gpus[0].permission(False)
    with pytest.raises(NvmlError, match="needs root") as denied:
        LockableGpu(gpu.nvml, gpu.uuid).lock(Lock(900, 900))
    assert denied.value.trouble is Trouble.DENIED and machine.gpus[0].lock is None


def test_a_range_is_two_clocks_in_order():
    for low, high in ((900, 600), (0, 900), (-1, 5)):
        with pytest.raises(ValueError, match="the lower one first"):
            Lock(low, high)


def test_times_of_samples_are_of_the_monotonic_clock(gpu):
    before = time.monotonic()
    assert before <= gpu.sample().at_s <= time.monotonic()


def test_a_lost_gpu_does_not_take_anothers_number(machine, gpu):
    machine.gpus[0].lost(True)
    lost, here = gpu.nvml.gpus().values()
    assert (lost.trouble, here) == (Trouble.LOST, machine.gpus[1].uuid)
    assert found_gpu(gpu.nvml, "1").uuid == machine.gpus[1].uuid
    with pytest.raises(ValueError, match=r"0 is not here; here are 1 = GPU-.*; GPU 0: GPU is lost"):
        found_gpu(gpu.nvml, "0")
