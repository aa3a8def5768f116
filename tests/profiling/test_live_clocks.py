"""The clocks of a profile: which ones, and that every row is of the clock that it names."""

import dataclasses

import pytest

from throttllem.profiling.live.plan import LivePlan
from throttllem.profiling.live.run import LiveProfileError, chosen_clocks, profile_live
from throttllem.profiling.live.run_profile import Device

from .live_house import CLOCKS, house, virtually


def test_clocks_are_those_of_the_gpu_with_the_top_one():
    assert chosen_clocks(CLOCKS, None) == CLOCKS
    ladder = tuple(range(210, 1411, 15))
    assert len(chosen_clocks(ladder, None)) == 8
    assert chosen_clocks(ladder, None)[-1] == 1410
    assert chosen_clocks(CLOCKS, (1400, 700)) == (700, 1400)
    with pytest.raises(ValueError, match="no such clock; the nearest is 1050"):
        chosen_clocks(CLOCKS, (1400, 1000))
    with pytest.raises(ValueError, match="the top clock, 1400, must be among them"):
        chosen_clocks(CLOCKS, (700, 1050))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"clock_mhz": 1050}, "700 MHz, at 1050 MHz: may the keeper set it"),
        ({"clock_mhz": 1050, "held": "power cap"}, "700 MHz, at 1050 MHz: power cap"),
        ({"trouble": "the GPU is lost"}, "the GPU is lost"),
    ],
)
def test_a_clock_that_does_not_come_ends_it_and_is_named(tmp_path, monkeypatch, changes, why):
    async def run():
        engine, gpu = house()
        read = gpu.read

        def reading():
            found = read()
            return dataclasses.replace(found, **changes) if found.clock_mhz == 700 else found

        monkeypatch.setattr(gpu, "read", reading)
        device = Device(gpu=gpu, clocks_mhz=CLOCKS)
        await profile_live(engine, device, LivePlan(points=2, steps=3, bursts=3), tmp_path / "p.csv")

    with pytest.raises(LiveProfileError, match=why):
        virtually(run())
