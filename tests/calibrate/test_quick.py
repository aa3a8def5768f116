"""A quick profile of an unknown GPU: its table predicts what was never measured, and states errors that hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import run

from throttllem.config import BatchingOptions
from throttllem.engines.simulated.fleet import build_fleet
from throttllem.physics.engine import EnginePhysics
from throttllem.profiling.profile import write_profile
from throttllem.profiling.storage import load_table
from tools.evaluation.quick import quick_profile, table_errors

from .synthetic import CATALOGUE, LIKE, MODEL, changed_gpu

CLOCKS = (510, 960, 1110, 1410)
SPEC = replace(
    build_fleet(CATALOGUE, LIKE.name, MODEL.name, (1,), BatchingOptions()).specs[1], clocks_mhz=LIKE.clocks_mhz
)


@pytest.mark.slow
def test_train_recognises_it_and_the_stated_errors_hold(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.chdir(tmp_path)
    true = EnginePhysics(changed_gpu(4)[0], MODEL, 1)
    write_profile(quick_profile(true, SPEC, CLOCKS, seed=1), Path("quick.csv"))
    assert run(monkeypatch, "train", "quick.csv", "--out", "engine") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "clocks between the ends" in said and "batch sizes between the ends" in said
    assert "calibrated at 510, 960, 1110, 1410 MHz, not measured at every clock" in said
    table = load_table(Path("engine/table-tp1.npz"))
    assert table.clocks_mhz == tuple(range(510, 1411, 15)) and table.calibrated is not None
    off = np.abs(table_errors(table, true, SPEC, seed=2))
    assert np.median(off, axis=0) == pytest.approx([0, 0], abs=0.03)
    assert np.mean(off[:, 0] < table.calibrated.seconds_error + 0.05) > 0.9
    assert np.mean(off[:, 1] < table.calibrated.watts_error + 0.05) > 0.9


def test_two_clocks_are_too_few(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    write_profile(quick_profile(EnginePhysics(LIKE, MODEL, 1), SPEC, CLOCKS[2:], seed=1), Path("quick.csv"))
    assert run(monkeypatch, "train", "quick.csv", "--out", "engine") == 2
    assert "2 of the 3 distinct clocks that a fit needs" in " ".join(capsys.readouterr().err.split())
    assert not list(Path("engine").iterdir())
