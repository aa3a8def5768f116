"""Schedules with everything that is real about them: what holds, and that a broken keeper is found out."""

import asyncio
import os
from dataclasses import replace

import pytest

from tools.soak.draw import drawn
from tools.soak.pool import WorkerPool
from tools.soak.sandbox import sandboxes
from tools.soak.schedule import Fault, GpuPlan, Stop

pytestmark = pytest.mark.slow
"""Real processes against the clock: beside the default tests they would be starved."""
OPTED = GpuPlan(allowed=(510, 1200), held=True, before=None, declared=False)
UNLISTED = GpuPlan(allowed=None, held=False, before=(960, 960), declared=False)
UNDECLARED = replace(OPTED, before=(855, 855))
DECLARED = replace(OPTED, before=(645, 1365), declared=True)
CALM = replace(
    drawn(0),
    gpus=(OPTED, UNLISTED, UNDECLARED, DECLARED, OPTED),
    early=False,
    ttl_s=4.0,
    life_s=0.4,
    stop=Stop.KILL,
    lift_s=-0.05,
    ask_at_s=(0.05, 0.2),
    faults=(),
)
KILLED = replace(CALM, faults=(Fault(kind="keeper: SIGKILL", at_s=0.2),))
ABANDONED = replace(CALM, life_s=0.9, faults=(Fault(kind="keeper: SIGKILL", at_s=0.8),))
"""The gateway dies before it has found the new keeper, so nobody but its journal tells what is locked."""
OTHER_USER = replace(CALM, faults=(Fault(kind="socket: another user", at_s=0.1),))


@pytest.fixture
def played(nvml_library):
    def play(schedule, sabotage="sound"):
        with sandboxes(
            1, roles="tests.soak.sabotaged", library=nvml_library, mounts=False, SABOTAGE=sabotage
        ) as places:
            (outcome,) = asyncio.run(WorkerPool(places).played([schedule]))
        print(outcome.logs)
        return outcome

    return play


@pytest.mark.parametrize(("schedule", "fewest"), [(CALM, 0), (KILLED, 1)], ids=["calm", "killed"])
def test_the_keeper_passes(played, schedule, fewest):
    """A gateway that ends in calm may have restored everything itself: then the keeper restores nothing."""
    outcome = played(schedule)
    assert outcome.violations == ()
    assert (outcome.complete >= 2, outcome.errors, len(outcome.restorings_s) >= fewest) == (True, 0, True)


@pytest.mark.parametrize(
    ("sabotage", "schedule", "words"),
    [
        ("no_journal", ABANDONED, ("was locked when the keeper died", "2 s after it was due")),
        ("no_end", CALM, ("2 s after it was due",)),
        ("no_undo", CALM, ("a set failed on one GPU",)),
        ("infers", CALM, ("is locked (855, 855)",)),
        pytest.param(
            *("all_users", OTHER_USER, ("user 65534 was answered",)),
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_keeper_is_found_out(played, sabotage, schedule, words):
    violations = played(schedule, sabotage).violations
    for each in words:
        assert any(each in text for text in violations), violations
