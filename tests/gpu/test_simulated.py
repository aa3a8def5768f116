"""The simulated GPU: its clock switches after the latency, the last one set stays, its counter adds up."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.gpu.device import ClockError, Gpu, Work
from throttllem.gpu.simulated import SimulatedGpu

CLOCKS = (600, 900, 1410)


class Clock:
    """A time source that stands still until it is moved."""

    def __init__(self):
        self.now_s = 5.0

    def __call__(self):
        return self.now_s


def gpu(*, latency_s=0.0, now=None):
    return SimulatedGpu(
        CLOCKS,
        switch_latency_s=latency_s,
        watts=lambda mhz, work: mhz / 10 + work.decode_sequences,
        idle_w=50.0,
        now=now or Clock(),
    )


def work(seconds, joules=None):
    return Work(seconds=seconds, decode_sequences=4, kv_tokens=100, prefill_tokens=0, prefill_pairs=0.0, joules=joules)


def test_it_starts_at_the_highest_clock_and_idle():
    device: Gpu = gpu()
    reading = device.read()
    assert (reading.clock_mhz, reading.watts, reading.energy_j) == (1410, 50.0, 0.0)


def test_a_clock_is_in_force_after_the_switch():
    async def run():
        now = Clock()
        device = gpu(latency_s=0.001, now=now)
        switching = asyncio.ensure_future(device.set_clock(900))
        await asyncio.sleep(0)
        before = device.read().clock_mhz
        return before, await switching, device.read().clock_mhz

    assert asyncio.run(run()) == (1410, 900, 900)


def test_a_switch_whose_wait_is_cancelled_happens():
    async def run():
        now = Clock()
        device = gpu(latency_s=0.25, now=now)
        switching = asyncio.ensure_future(device.set_clock(600))
        await asyncio.sleep(0)
        switching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await switching
        now.now_s += 0.2
        early = device.read().clock_mhz
        now.now_s += 0.1
        return early, device.read().clock_mhz

    assert asyncio.run(run()) == (1410, 600)


@given(st.lists(st.sampled_from(CLOCKS), min_size=1, max_size=20))
def test_of_many_at_once_the_last_stays(clocks):
    async def run():
        device = gpu(latency_s=0.0005)
        answers = await asyncio.gather(*map(device.set_clock, clocks))
        return answers, device.read().clock_mhz

    answers, in_force = asyncio.run(run())
    assert in_force == answers[-1] == clocks[-1]
    assert set(answers) <= set(CLOCKS)


def test_an_unknown_clock_is_rejected_with_the_nearest_one():
    device = gpu()
    with pytest.raises(ClockError, match=r"1000 MHz: .* is 900") as refused:
        asyncio.run(device.set_clock(1000))
    assert isinstance(refused.value, OSError)
    assert device.read().clock_mhz == 1410


def test_energy_is_the_sum_of_work_and_idling():
    device = gpu()
    device.worked(work(0.5))
    assert (device.read().watts, device.read().energy_j) == (145.0, 72.5)
    device.worked(work(0.5, joules=100.0))
    assert (device.read().watts, device.read().energy_j) == (200.0, 172.5)
    device.idled(2.0)
    assert (device.read().watts, device.read().energy_j) == (50.0, 272.5)
    device.worked(work(0.0, joules=0.0))
    assert device.read().energy_j == 272.5


def test_work_takes_the_power_of_the_clock_in_force():
    device = gpu()
    asyncio.run(device.set_clock(600))
    device.worked(work(1.0))
    assert device.read().watts == 64.0
