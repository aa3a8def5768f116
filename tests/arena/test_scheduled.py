"""Static clocks are those of the simulation."""

import pytest

from throttllem.arena.cell_run import cell_run
from throttllem.arena.cells import TUNING
from throttllem.arena.outcome import simulated
from throttllem.arena.scheduled import ScheduledRuns
from throttllem.physics.catalogue import Catalogue
from throttllem.sim.own_policy import named_policy


@pytest.mark.slow
@pytest.mark.parametrize("group", ["code", "Mooncake", "TTFT 1.5 s"])
def test_a_static_clock_is_the_fixed_policy(tmp_path, group):
    cell = next(cell for cell in TUNING.cells if cell.group == group)
    prepared = cell_run(cell, 1, Catalogue.load(None), tmp_path)
    fleet = prepared.scenario.fleet
    for mhz in (fleet.clocks_mhz[-1], fleet.clocks_mhz[len(fleet.clocks_mhz) // 2]):
        policy = named_policy(f"fixed:{mhz}", fleet.clocks_mhz, fleet.sizes)
        expected = simulated(prepared, policy, 0.0, prepared.scenario.run(policy))
        found = ScheduledRuns(prepared).at(mhz)
        assert found.energy_j == pytest.approx(expected.energy_j, rel=1e-4)
        assert found.attainment == pytest.approx(expected.attainment, abs=1.5 / expected.requests)
        assert found.mean_clock_mhz == pytest.approx(expected.mean_clock_mhz, rel=0.01)
        for name in ("ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "e2e_p99_s"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=0.01)
