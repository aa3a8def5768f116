"""Schedules with everything that is real about them: what holds, and that a broken keeper is found out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.nvml import build

ROOT = Path(__file__).parents[2]
LIMIT_S = 180
pytestmark = pytest.mark.slow
"""Real processes against the clock: beside the default tests they would be starved."""


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    return build.library((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "libnvidia-ml")


@pytest.fixture(scope="module")
def played(library):
    """Violations, and requests complete, told and cut, and restorings."""
    whats = [
        "sound:calm",
        "sound:killed",
        "no_journal:killed",
        "no_end:calm",
        "no_undo:calm",
        "infers:calm",
        "all_users:stranger",
    ]
    command = [sys.executable, "-m", "tests.soak.played", str(library), *whats]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    rows = [line.split("|") for line in done.stdout.splitlines()]
    assert len(rows) == len(whats), done.stderr
    return {
        what: (violations, *map(int, counts)) for what, *counts, violations in ((*row[:5], row[5:]) for row in rows)
    }


@pytest.mark.parametrize(("what", "fewest"), [("sound:calm", 0), ("sound:killed", 1)])
def test_the_keeper_passes(played, what, fewest):
    """A gateway that ends in calm may have given back all by itself: then nothing is restored."""
    violations, complete, told, _, restorings = played[what]
    assert violations == []
    assert (complete >= 2, told, restorings >= fewest) == (True, 0, True)


def test_a_keeper_without_a_journal_is_found_out(played):
    violations = played["no_journal:killed"][0]
    assert any("was locked when the keeper died" in text for text in violations)
    assert any("2 s after it was due" in text for text in violations)


def test_a_keeper_that_does_not_mind_who_hangs_up_is_found_out(played):
    assert any("2 s after it was due" in text for text in played["no_end:calm"][0])


def test_a_keeper_that_restores_a_lock_that_no_option_states_is_found_out(played):
    assert any("is locked (855, 855)" in text for text in played["infers:calm"][0])


def test_a_keeper_that_leaves_half_a_group_is_found_out(played):
    assert any("a set failed on one GPU" in text for text in played["no_undo:calm"][0])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_keeper_that_answers_everybody_is_found_out(played):
    assert any("user 65534 was answered" in text for text in played["all_users:stranger"][0])
