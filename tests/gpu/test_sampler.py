"""The thread that reads GPUs, also when a call of NVML does not return."""

import asyncio
import itertools
import time

import pynvml
import pytest

from tests.gpu.test_hardware import hardware, locks
from throttllem.gpu.hardware import Mode
from throttllem.gpu.nvml import Nvml, NvmlGpu
from throttllem.gpu.sampler import Sampler


def test_there_is_no_reading_before_the_first(machine):
    with Nvml() as nvml:
        sampler = Sampler([NvmlGpu(nvml, machine.gpus[0].uuid)])
        with pytest.raises(OSError, match="has not been read yet"):
            sampler.last()
        assert sampler.joules() == 0.0 and not sampler.newer_than(-1.0)
        assert sampler.read() == sampler.last()


def test_a_reading_that_hangs_delays_no_clock_and_no_end(testbed):
    """The sampler's thread is abandoned; clocks are set and restored all the same."""

    async def run():
        async with testbed.keeper():
            async with hardware(testbed) as gpu:
                await gpu.set_clock(900)
                testbed.machine.fault("nvmlDeviceGetClockInfo", sleep_s=1.0, times=1)
                await asyncio.sleep(0.1)
                began_s = time.monotonic()
                asking = asyncio.gather(gpu.set_clock(600), return_exceptions=True)
                await asyncio.sleep(0)
                await asyncio.gather(gpu.set_clock(1410), return_exceptions=True)
                at_once_s, set_to = time.monotonic() - began_s, locks(testbed)
                await asking
            return at_once_s, set_to, locks(testbed)

    at_once_s, set_to, after = asyncio.run(run())
    assert at_once_s < 0.9 and set_to == [(1410, 1410)] * 2 and after == [None, None]


def test_a_reading_that_hangs_at_the_end_is_abandoned_and_nvml_stays_open(testbed, caplog, monkeypatch):
    """The event loop runs meanwhile; closing NVML would wait for the call that hangs."""
    closed, close = [], pynvml.nvmlShutdown
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: closed.append(time.monotonic()))
    monkeypatch.setattr("throttllem.gpu.sampler.END_S", 0.3)
    ticks_s = []

    async def tick():
        while True:
            ticks_s.append(time.monotonic())
            await asyncio.sleep(0.01)

    async def run():
        async with hardware(testbed, Mode.OFF) as gpu:
            testbed.machine.fault("nvmlDeviceGetClockInfo", sleep_s=1.5, times=1)
            await asyncio.sleep(0.1)
            ticking, began_s = asyncio.create_task(tick()), time.monotonic()
            await asyncio.sleep(0)
        took_s = time.monotonic() - began_s
        ticking.cancel()
        return took_s, gpu._sampler._thread

    took_s, thread = asyncio.run(run())
    assert 0.3 <= took_s < 1.0 and thread.is_alive() and closed == []
    assert max(after - before for before, after in itertools.pairwise(ticks_s)) < 0.2
    assert f"a reading of {testbed.machine.gpus[0].uuid} has not returned" in caplog.text
    thread.join()
    close()
