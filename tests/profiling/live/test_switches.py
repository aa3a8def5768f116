"""Switches timed through a real keeper, which takes no more than so many a second."""

import asyncio

import pytest

from throttllem.core.forecast.switch_latency import FEWEST
from throttllem.gpu.hardware import HardwareGpu, Mode
from throttllem.gpu.setters import clock_setter
from throttllem.profiling.live.switches import timed_switches

CLOCKS_MHZ = (600, 900, 1410)


async def at_work():
    """The fake GPUs are under load."""


@pytest.mark.slow
@pytest.mark.parametrize("machine", [5.0], indirect=True)
def test_the_keeper_carries_out_every_switch(testbed, caplog):
    async def run():
        setter = clock_setter(keeper=testbed.socket)
        async with (
            testbed.keeper(),
            HardwareGpu(("0", "1"), mode=Mode.ON, setter=setter, clocks_mhz=CLOCKS_MHZ) as gpu,
        ):
            return await timed_switches(gpu, CLOCKS_MHZ, at_work, seed=0)

    found = asyncio.run(run())
    assert [(each.mhz, each.count) for each in found] == [(mhz, FEWEST) for mhz in CLOCKS_MHZ]
    assert all(0.005 <= each.within_s < 0.5 for each in found)
    assert "clocks are not set" not in caplog.text


def test_gpus_that_cannot_be_set_are_left_to_the_first_point(testbed):
    async def run():
        setter = clock_setter(keeper=testbed.socket)
        async with HardwareGpu(("0",), mode=Mode.ON, setter=setter, clocks_mhz=CLOCKS_MHZ) as gpu:
            await gpu.set_clock(900)
            return await timed_switches(gpu, CLOCKS_MHZ, at_work, seed=0)

    assert asyncio.run(run()) == ()
