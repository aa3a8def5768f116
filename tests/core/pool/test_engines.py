"""The engines that are known: what a new one begins with."""

from dataclasses import replace

from core.toy import SPEC, flat_table
from throttllem.core.forecast.switch_latency import FEWEST, ProfiledSwitches
from throttllem.core.pool.engines import Engines


def test_an_engine_begins_with_the_switches_that_its_profile_timed():
    top = SPEC.clocks_mhz[-1]
    timed = ProfiledSwitches(mhz=top, count=FEWEST, within_s=0.012)
    for switches, expected_s in (((timed,), 0.012), ((), 0.2)):
        table = replace(flat_table((16, 12, 9, 8, 7)), switches=switches)
        engines = Engines({SPEC.tp: SPEC}, {SPEC.tp: table})
        state = engines.ready(0, SPEC)
        assert state.switch_latency.to_s(SPEC.clocks_mhz, top, 0.2) == expected_s
