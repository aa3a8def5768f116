"""Watts and joules: exact inside, every 100 ms outside."""

import math
import time
from itertools import pairwise

import pytest

from tests.nvml.caller import FailedError
from tools.nvml.machine import a100


def watts(part, clock, util):
    return part.idle_w + util * (part.busy_w[part.clocks_mhz.index(clock)] - part.idle_w)


@pytest.mark.parametrize(("clock", "util"), [(210, 1.0), (900, 0.25), (1410, 0.8), (600, 1.5), (600, 0.0)])
def test_power_is_idle_plus_a_share(clock, util, quick, quick_caller):
    (part, _), gpu = a100(2), quick.gpus[0]
    gpu.lock_by_other(clock, clock)
    gpu.work(util, 10)
    assert gpu.watts == pytest.approx(watts(part, clock, util))
    assert quick_caller("nvmlDeviceGetPowerUsage(gpu)") == pytest.approx(gpu.watts * 1000, abs=1)


def test_energy_is_the_integral_of_power(machine):
    """Locks, loads and a load that ends by itself, against the sum over their measured times."""
    (part, _), gpu = a100(2), machine.gpus[0]
    gpu.lock_by_other(900, 900)
    time.sleep(0.03)
    changes = [(0.5, 900), (1.0, 900), (1.0, 600), (0.2, 600)]
    unsure_s, moments, before_j = 0.0, [], gpu.energy_j
    for util, clock in changes:
        moments.append(time.monotonic())
        gpu.lock_by_other(clock, clock)
        gpu.work(util, 10)
        unsure_s += time.monotonic() - moments[-1]
        time.sleep(0.04)
    moments.append(time.monotonic())
    gpu.work(0.2, 0.01)
    unsure_s += time.monotonic() - moments[-1]
    time.sleep(0.03)
    ends = time.monotonic()
    got = gpu.energy_j - before_j
    unsure_s += time.monotonic() - ends
    expected = sum(
        watts(part, clock, util) * (after - before)
        for (util, clock), (before, after) in zip(changes, pairwise(moments), strict=True)
    )
    expected += part.switch_s(600) * (watts(part, 900, 1) - watts(part, 600, 1))  # until the switch, 900 MHz draws
    expected += 0.01 * watts(part, 600, 0.2) + (ends - moments[-1] - 0.01) * part.idle_w
    # A busy machine may take this process off its core between a change and its time.
    assert got == pytest.approx(expected, abs=0.01 * expected + unsure_s * part.busy_w[-1])


def test_the_counter_moves_every_100_ms(quick, quick_caller):
    (part,), gpu = a100(1), quick.gpus[0]
    gpu.work(1, 10)
    quick_caller("seen, ends = {}, time.monotonic() + 0.23")
    quick_caller(
        "while time.monotonic() < ends: seen.setdefault(nvmlDeviceGetTotalEnergyConsumption(gpu), time.monotonic())"
    )
    seen = quick_caller("seen")
    assert 2 <= len(seen) <= 4
    _, first, *others = seen
    for value in others:
        steps = (value - first) / (part.busy_w[-1] * 100)  # mJ in 100 ms
        assert steps == pytest.approx(round(steps), abs=1e-3)
        assert steps == pytest.approx((seen[value] - seen[first]) / 0.1, abs=0.9)
    assert max(seen) / 1000 <= gpu.energy_j


def test_the_period_is_a_parameter(make_gpus, caller_of):
    machine = make_gpus(*a100(1, refresh_s=0))
    caller = caller_of(machine)
    first = caller("nvmlDeviceGetTotalEnergyConsumption(gpu)")
    time.sleep(0.01)
    assert first < caller("nvmlDeviceGetTotalEnergyConsumption(gpu)") <= machine.gpus[0].energy_j * 1000


def test_a_counter_can_begin_again(make_gpus, caller_of):
    machine = make_gpus(*a100(1, refresh_s=0))
    caller, gpu = caller_of(machine), machine.gpus[0]
    gpu.work(1, 10)
    time.sleep(0.05)
    before = gpu.energy_j
    gpu.reset_energy_counter()
    assert caller("nvmlDeviceGetTotalEnergyConsumption(gpu)") < before * 1000
    assert gpu.energy_j >= before


def test_average_power_follows_within_a_second(quick):
    (part,), gpu = a100(1), quick.gpus[0]
    gpu.work(1, 10)
    began = time.monotonic()
    time.sleep(0.1)
    share = 1 - math.exp(began - time.monotonic())
    assert gpu.truth.average_w == pytest.approx(part.idle_w + (part.busy_w[-1] - part.idle_w) * share, rel=0.1)


def test_who_says_no_more_is_idle(quick, quick_caller):
    caller, gpu = quick_caller, quick.gpus[0]
    assert caller("work(0, 0.7, 0.2)") == 0
    assert caller("clock(0)") == gpu.clock_mhz == 1410
    assert gpu.truth.util == 0.7
    time.sleep(0.2)
    assert (gpu.truth.util, gpu.clock_mhz, gpu.watts) == (0, 210, a100(1)[0].idle_w)


def test_an_engine_needs_no_nvml_and_is_told_off(quick, caller_of):
    caller = caller_of(quick, init=False)
    assert caller("clock(0), clock(2)") == (210, 0)
    assert caller("work(1, 1, 10)") == 0
    assert quick.gpus[1].clock_mhz == 1410
    assert [caller(f"work({said})") for said in ("2, 1, 1", "0, 1.6, 1", "0, -1, 1", "0, float('nan'), 1")] == [2] * 4
    quick.gpus[0].lost(True)
    assert caller("work(0, 1, 10)") == 15
    quick.driver(False)
    assert caller("work(0, 1, 10)") == 9


@pytest.mark.parametrize(
    ("hide", "call"),
    [("energy_counter", "nvmlDeviceGetTotalEnergyConsumption"), ("power_reading", "nvmlDeviceGetPowerUsage")],
)
def test_a_gpu_may_lack_it(hide, call, machine, caller):
    getattr(machine.gpus[0], hide)(False)
    with pytest.raises(FailedError, match="NotSupported"):
        caller(f"{call}(gpu)")
    caller("found = nvmlDeviceGetFieldValues(gpu, [83, 186])")
    assert caller("[each.nvmlReturn for each in found]") == ([3, 0] if hide == "energy_counter" else [0, 3])
    assert isinstance(caller(f"{call}(others[0])"), int)
