"""A cell as a scenario: the load that it names, its own requests by seed, one window for every policy."""

from dataclasses import replace

import pytest

from throttllem.arena.cell_run import cell_options, cell_run
from throttllem.arena.cells import TUNING, Workload
from throttllem.core.clocks.policy import parse_policy
from throttllem.physics.catalogue import Catalogue

CELL = next(cell for cell in TUNING.cells if cell.workload is Workload.CODE)


def test_options_are_the_cells_own(monkeypatch):
    monkeypatch.setenv("THROTTLLEM_THROTTLE__DWELL_S", "9")
    options = cell_options(replace(CELL, length_error=0.2, switch_latency_s=0.01))
    assert (options.throttle.switch_latency_s, options.length.error) == (0.01, 0.2)
    assert options.throttle.dwell_s == 0.5
    assert cell_options(CELL).length.predictor == "online"


@pytest.mark.slow
def test_load_and_window(tmp_path):
    catalogue = Catalogue.load(None)
    found, other = (cell_run(CELL, seed, catalogue, tmp_path) for seed in (1, 2))
    scenario = found.scenario
    capacity = scenario.capacities[CELL.engine.tp]
    assert scenario.trace.peak_rps == pytest.approx(CELL.load * capacity.max_rps, abs=1 / 60)
    assert 300 < scenario.trace.duration_s < 1200
    assert (scenario.slo.e2e_s, scenario.slo.tbt_s) == (capacity.e2e_p99_s, CELL.slo_tbt_s)
    assert other.scenario.slo == scenario.slo
    assert other.scenario.trace.sha256 != scenario.trace.sha256
    run = scenario.run(parse_policy("triton", scenario.fleet.clocks_mhz, scenario.fleet.sizes))
    rest_s = found.window_s - run.duration_s
    assert rest_s > 0
    idle_w = scenario.fleet.specs[CELL.engine.tp].idle_w
    assert found.energy_j(run) == pytest.approx(run.energy_j + rest_s * idle_w)
    late = replace(run, duration_s=found.window_s + 1)
    assert found.energy_j(late) == run.energy_j
