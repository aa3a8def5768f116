"""The table of a law is close to the law at every point of the grid, and knows what it rests on."""

import numpy as np
import pytest
from engines.live import spec

from throttllem.core.forecast.performance_table import Calibrated
from throttllem.physics.catalogue import Catalogue
from throttllem.physics.engine import EnginePhysics
from throttllem.profiling.tabulate import cell_errors, tabulate

CATALOGUE = Catalogue.load()
ENGINE = spec(
    max_batch=64, kv_blocks=8000, max_context_tokens=4096, prefill_budget_tokens=4096, clocks_mhz=(705, 1410), tp=1
)
BASIS = Calibrated(clocks_mhz=(705, 1410), seconds_error=0.03, watts_error=0.05)


def test_a_table_is_its_law():
    law = EnginePhysics(CATALOGUE.gpus["a100-40gb-sxm"], CATALOGUE.models["llama-3-8b"], 1)
    table = tabulate(law, ENGINE, BASIS)
    assert (table.clocks_mhz, table.calibrated, table.clocks_measured) == ((705, 1410), BASIS, True)
    assert table.inside(64, 8000, 4096) and not table.inside(65, 1, 0)
    rng, off = np.random.default_rng(0), []
    for _ in range(300):
        clock, batch = int(rng.choice((705, 1410))), int(rng.integers(2, 65))
        blocks = int(rng.integers(batch * 20, 8001))
        prefill = int(rng.integers(1, 4097)) if rng.random() < 0.5 else 0
        decode, own = batch - (prefill > 0), -(-prefill // 16)
        held = (max(blocks - own, decode)) * 16 - decode * 7
        true = law.iteration(clock, decode, held, prefill, prefill**2 / 2)
        off.append(np.abs(np.array(table.at(clock, batch, blocks, prefill)) / true - 1))
    assert np.median(off, axis=0) == pytest.approx([0, 0], abs=0.02)
    assert np.quantile(off, 0.95, axis=0) == pytest.approx([0, 0], abs=0.08)
    own = np.quantile(np.abs(cell_errors(table, law, ENGINE)), 0.9, axis=0)
    assert 0 < own[0] < 0.06 and 0 < own[1] < 0.03
