"""A steady clock, the doctor's hint at a lock: what is one, what is none, and that it may be a boost clock."""

import itertools

import pytest

from tests.gpu.conftest import library, machine
from throttllem.doctor.steady import steady_mhz
from throttllem.gpu.nvml import Nvml, NvmlGpu
from tools.nvml.machine import Machine, rtx4090

__all__ = ["library", "machine"]


@pytest.fixture
def gpu(machine):
    with Nvml() as nvml:
        yield NvmlGpu(nvml, machine.gpus[0].uuid)


@pytest.mark.parametrize("load", [0.0, 0.5])
@pytest.mark.parametrize("mhz", [1005, 510, 1395])
def test_a_lock_by_others_is_steady_busy_or_idle(machine, gpu, load, mhz):
    machine.gpus[0].work(load, 3600.0)
    machine.gpus[0].lock_by_other(mhz, mhz)
    assert steady_mhz(gpu) == mhz


@pytest.mark.parametrize("load", [0.0, 0.5])
def test_without_a_lock_an_a100_is_at_one_of_its_ends(machine, gpu, load):
    machine.gpus[0].work(load, 3600.0)
    assert steady_mhz(gpu) is None


def test_a_clock_with_a_reason_is_no_hint(machine, gpu):
    machine.gpus[0].thermal(900)
    assert gpu.clock_mhz() == 900 and steady_mhz(gpu) is None


def test_a_clock_that_never_stands_still_is_no_hint(machine, gpu):
    moves = itertools.cycle((900, 915))
    machine.gpus[0].lock_by_other(900, 900)
    assert steady_mhz(gpu, sleep=lambda _: machine.gpus[0].lock_by_other(*[next(moves)] * 2)) is None


def test_a_lock_of_a_moment_ago_is_waited_for(machine, gpu):
    """The clock has not followed yet at the first looks: at the top, then on its way."""
    looks = iter((1200, 1005))

    def sleep(_):
        mhz = next(looks, None)
        if mhz is not None:
            machine.gpus[0].lock_by_other(mhz, mhz)

    assert steady_mhz(gpu, sleep=sleep) == 1005


def test_of_a_range_the_end_in_force_shows(machine, gpu):
    machine.gpus[0].lock_by_other(600, 1200)
    assert steady_mhz(gpu) == 1200


def test_a_boost_clock_below_the_highest_is_steady_without_any_lock(library, tmp_path, monkeypatch):
    """This is why nothing is ever restored by it."""
    monkeypatch.setenv("FAKE_NVML_STATE", str(tmp_path / "cards"))
    with Machine.create(tmp_path / "cards", rtx4090(switch_ms=(0, 0)), library=library) as cards, Nvml() as nvml:
        cards.gpus[0].work(0.9, 3600.0)
        assert steady_mhz(NvmlGpu(nvml, cards.gpus[0].uuid)) == 2730
        assert cards.gpus[0].lock is None
