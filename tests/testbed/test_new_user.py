"""The way of a new user, from an unknown GPU to clocks that are set: every command of it ends well."""

import re

import pytest

from throttllem.physics.catalogue import Catalogue
from throttllem.profiling.live.run import quick_clocks
from tools.evaluation.new_user import KIND, section
from tools.testbed.report import ROOT, Workspace


@pytest.mark.slow
def test_every_step_of_the_way(tmp_path):
    found = section(Workspace(engines=ROOT / ".engines", folder=tmp_path, report=print, quick=True))
    doctor, dry_run, profile, train, check, serve = found.results["steps"]
    assert "its kind is l40s-48gb" in doctor.output
    assert "has no performance table" in dry_run.output
    assert "rows in quick.csv" in profile.output
    assert "verdict, tp 1: sound" in train.output
    clocks = quick_clocks(Catalogue.load().gpu(KIND))
    assert f"calibrated on a quick profile at {', '.join(map(str, clocks))} MHz" in check.output
    assert "!!" not in check.output
    lowest = re.search(r"clocks seen: (\d+) to", serve.output)
    assert lowest and clocks[0] <= int(lowest[1]) < clocks[-1]
