"""Switch latencies: configured until enough were seen, then what few switches exceed; by the band of the target."""

import pytest

from throttllem.core.forecast.switch_latency import FEWEST, ProfiledSwitches, SwitchLatency, within

CLOCKS_MHZ = (200, 400, 600, 800, 1000, 1200, 1300, 1400)
CONFIGURED_S = 0.2


def after(mhz, *seconds):
    latency = SwitchLatency()
    for each in seconds:
        latency.took(CLOCKS_MHZ, mhz, each)
    return latency


def to_s(latency, mhz):
    return latency.to_s(CLOCKS_MHZ, mhz, CONFIGURED_S)


def test_a_few_switches_raise_what_was_configured_and_never_lower_it():
    assert to_s(SwitchLatency(), 1400) == CONFIGURED_S
    assert to_s(after(1400, *[0.01] * (FEWEST - 1)), 1400) == CONFIGURED_S
    assert to_s(after(1400, 0.3), 1400) == 0.3


def test_enough_switches_count_and_few_of_them_are_longer():
    assert to_s(after(1400, *[0.01] * FEWEST), 1400) == 0.01
    among_few = after(1400, *[0.01] * (FEWEST - 1), 0.05)
    assert to_s(among_few, 1400) == 0.05, "one of twenty may be the next one's"
    among_many = after(1400, *[0.01] * 62, 0.05, 0.06)
    assert to_s(among_many, 1400) == 0.01, "the third longest of 64: 62 / 65 = 0.954 are within it"
    assert to_s(after(1400, *[0.01] * 61, 0.05, 0.06, 0.07), 1400) == 0.05


def test_a_slower_driver_is_learned_and_an_old_one_forgotten():
    latency = after(1400, *[0.01] * 200, *[0.03] * 4)
    assert to_s(latency, 1400) == 0.03
    for _ in range(64):
        latency.took(CLOCKS_MHZ, 1400, 0.005)
    assert to_s(latency, 1400) == 0.005
    assert len(latency.bands[-1].recent_s) == 64, "what is kept does not grow"


def test_a_profile_is_begun_with_and_forgotten_as_any_switch_is():
    profiled = (
        ProfiledSwitches(mhz=1400, count=FEWEST, within_s=0.012),
        ProfiledSwitches(mhz=200, count=3, within_s=0.3),
        ProfiledSwitches(mhz=1350, count=FEWEST, within_s=9.0),
    )
    latency = SwitchLatency.profiled(CLOCKS_MHZ, profiled)
    assert [to_s(latency, mhz) for mhz in (200, 600, 1000, 1400)] == [0.3, 0.2, 0.2, 0.012], "1350 MHz is no clock here"
    for _ in range(64):
        latency.took(CLOCKS_MHZ, 1400, 0.005)
    assert to_s(latency, 1400) == 0.005
    assert within([0.01] * 62 + [0.05, 0.06]) == 0.01
    assert SwitchLatency.profiled(CLOCKS_MHZ, ()) == SwitchLatency()


def test_bands_are_apart_and_a_clock_of_another_gpu_tells_nothing():
    latency = after(1400, *[0.01] * FEWEST)
    assert latency.to_each_s(CLOCKS_MHZ, CONFIGURED_S).tolist() == [0.2] * 6 + [0.01] * 2
    assert [to_s(latency, mhz) for mhz in CLOCKS_MHZ] == [0.2] * 6 + [0.01] * 2
    latency.took(CLOCKS_MHZ, 1350, 9.0)
    assert to_s(latency, 1400) == 0.01
    one = SwitchLatency()
    for _ in range(FEWEST):
        one.took((1400,), 1400, 0.02)
    assert one.to_s((1400,), 1400, CONFIGURED_S) == 0.02


def test_the_view_shows_every_band_with_what_is_assumed():
    assert SwitchLatency().view(CLOCKS_MHZ, CONFIGURED_S) == ()
    low, *_, high = after(1300, *[0.01] * (FEWEST - 1), 0.03).view(CLOCKS_MHZ, CONFIGURED_S)
    assert (low.low_mhz, low.high_mhz, low.switches, low.median_s, low.assumed_s) == (200, 400, 0, None, 0.2)
    assert (high.low_mhz, high.high_mhz, high.switches) == (1300, 1400, FEWEST)
    assert (high.median_s, high.assumed_s) == (pytest.approx(0.01), 0.03)
