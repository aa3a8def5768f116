"""What reads GPUs in a thread of its own, where a call does not come back."""

import asyncio
import itertools
import time

import pynvml

from tests.gpu.test_hardware import hardware
from throttllem.gpu.hardware import Mode


def test_a_reading_that_hangs_at_the_end_is_left_behind_and_said_and_nvml_stays_open(house, caplog, monkeypatch):
    """The loop goes on meanwhile; to close NVML would wait for the call that hangs."""
    closed, close = [], pynvml.nvmlShutdown
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: closed.append(time.monotonic()))
    monkeypatch.setattr("throttllem.gpu.sampler.END_S", 0.3)
    ticks_s = []

    async def tick():
        while True:
            ticks_s.append(time.monotonic())
            await asyncio.sleep(0.01)

    async def run():
        async with hardware(house, Mode.OFF) as gpu:
            house.machine.fault("nvmlDeviceGetClockInfo", sleep_s=1.5, times=1)
            await asyncio.sleep(0.1)
            ticking, began_s = asyncio.create_task(tick()), time.monotonic()
            await asyncio.sleep(0)
        took_s = time.monotonic() - began_s
        ticking.cancel()
        return took_s, gpu._sampler._thread

    took_s, thread = asyncio.run(run())
    assert 0.3 <= took_s < 1.0 and thread.is_alive() and closed == []
    assert max(after - before for before, after in itertools.pairwise(ticks_s)) < 0.2
    assert f"a reading of {house.machine.gpus[0].uuid} has not come back" in caplog.text
    thread.join()
    close()
