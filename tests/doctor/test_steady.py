"""A steady clock, the doctor's hint at a lock: which clocks are steady, and that a boost clock is, too."""

import itertools

import pytest

from tests.gpu.conftest import machine
from throttllem.doctor.steady import steady_mhz
from throttllem.gpu.nvml import Nvml, NvmlGpu
from tools.nvml.machine import Machine, rtx4090

__all__ = ["machine"]


@pytest.fixture
def gpu(machine):
    with Nvml() as nvml:
        yield NvmlGpu(nvml, machine.gpus[0].uuid)


@pytest.mark.parametrize("load", [0.0, 0.5])
@pytest.mark.parametrize("mhz", [1005, 510, 1395])
def test_a_locked_clock_is_steady_busy_or_idle(machine, gpu, load, mhz):
    machine.gpus[0].work(load, 3600.0)
    machine.gpus[0].lock_by_other(mhz, mhz)
    assert steady_mhz(gpu) == mhz


@pytest.mark.parametrize("load", [0.0, 0.5])
def test_without_a_lock_an_a100_is_at_one_of_its_ends(machine, gpu, load):
    machine.gpus[0].work(load, 3600.0)
    assert steady_mhz(gpu) is None


def test_a_throttled_clock_is_no_hint(machine, gpu):
    machine.gpus[0].thermal(900)
    assert gpu.clock_mhz() == 900 and steady_mhz(gpu) is None


def test_a_clock_that_moves_is_no_hint(machine, gpu):
    moves = itertools.cycle((900, 915))
    machine.gpus[0].lock_by_other(900, 900)
    assert steady_mhz(gpu, sleep=lambda _: machine.gpus[0].lock_by_other(*[next(moves)] * 2)) is None


def test_a_clock_that_still_switches_is_waited_for(machine, gpu):
    """At the first readings the clock is at the highest, then on its way."""
    looks = iter((1200, 1005))

    def sleep(_):
        mhz = next(looks, None)
        if mhz is not None:
            machine.gpus[0].lock_by_other(mhz, mhz)

    assert steady_mhz(gpu, sleep=sleep) == 1005


def test_a_locked_range_shows_the_end_in_force(machine, gpu):
    machine.gpus[0].lock_by_other(600, 1200)
    assert steady_mhz(gpu) == 1200


def test_a_boost_clock_below_the_highest_is_steady_without_any_lock(nvml_library, tmp_path, monkeypatch):
    """This is why nothing is restored because of a steady clock."""
    monkeypatch.setenv("FAKE_NVML_STATE", str(tmp_path / "cards"))
    with Machine.create(tmp_path / "cards", rtx4090(switch_ms=(0, 0)), library=nvml_library) as cards, Nvml() as nvml:
        cards.gpus[0].work(0.9, 3600.0)
        assert steady_mhz(NvmlGpu(nvml, cards.gpus[0].uuid)) == 2730
        assert cards.gpus[0].lock is None
