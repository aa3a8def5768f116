"""A keeper that dies, at the worst moments, and the next one: nothing is locked that the journal does not know."""

import signal
import time

import pytest

from tests.keeper.rig import BOOT, LONG_S, TTL_S, locks, until
from throttllem.keeper.journal import Journal

LOCK, RESET = "nvmlDeviceSetGpuLockedClocks", "nvmlDeviceResetGpuLockedClocks"


def full(*journals):
    """No space for these copies."""
    for path in journals:
        path.with_suffix(".part").unlink(missing_ok=True)
        path.with_suffix(".part").symlink_to("/dev/full")


def test_the_next_one_restores_the_baseline_and_resets_the_others(keepers, machine):
    first = keepers(normally={0: (705, 705)})
    with first.holds(mhz=900):
        first.kill()
    assert locks(machine) == [(900, 900)] * 2, "a lock outlives whoever set it"
    second = keepers(normally={0: (705, 705)})
    until(lambda: locks(machine) == [(705, 705), None])
    until(lambda: second.journal == {} and not second.status()["returning"])


def test_also_gpus_that_the_next_one_may_not_set(keepers, machine):
    first = keepers()
    with first.holds(mhz=900):
        first.kill()
    second = keepers(clocks=[(210, 1410)])
    until(lambda: locks(machine) == [None, None])
    assert second.status()["allowed"].keys() == set(second.uuids[:1])


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", [0, 1])
def test_killed_while_it_locks(keepers, machine, moment, number):
    first = keepers(normally={1: (705, 705)})
    talk = first.holds()
    machine.fault(LOCK, kill=moment, gpu=number, times=1)
    talk.say({"op": "set", "mhz": 900})
    assert first.wait() == -signal.SIGKILL
    assert first.journal == {first.uuids[0]: None, first.uuids[1]: (705, 705)}, "on disk before the first lock"
    machine.clear_faults()
    keepers(normally={1: (705, 705)})
    until(lambda: locks(machine) == [None, (705, 705)])
    talk.close()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_while_it_restores(keepers, machine, moment):
    first = keepers()
    with first.holds(mhz=900):
        machine.fault(RESET, kill=moment, gpu=0, times=1)
    assert first.wait() == -signal.SIGKILL
    machine.clear_faults()
    second = keepers()
    until(lambda: locks(machine) == [None, None] and second.journal == {})


def test_killed_again_and_again_the_baseline_is_still_restored(keepers, machine):
    first = keepers(normally={0: (705, 705)})
    with first.holds(mhz=900):
        first.kill()
    for _ in range(3):
        machine.fault(LOCK, kill="before", gpu=0, times=1)
        assert keepers(wait=False, normally={0: (705, 705)}).wait() == -signal.SIGKILL
        machine.clear_faults()
    keepers(normally={0: (705, 705)})
    until(lambda: locks(machine) == [(705, 705), None])


@pytest.mark.parametrize("copy", [0, 1])
@pytest.mark.parametrize("torn", [False, True])
def test_a_lock_is_known_after_one_copy_is_gone_or_torn(keepers, machine, copy, torn):
    first = keepers()
    with first.holds(mhz=900):
        first.kill()
    if torn:
        first.copies[copy].write_bytes(first.copies[copy].read_bytes()[:20])
    else:
        first.copies[copy].unlink()
    second = keepers()
    until(lambda: locks(machine) == [None, None])
    assert ("is not used" in second.said) is torn


def test_nothing_is_locked_without_a_journal(keeper, talk, machine):
    talk.done("lease", gpus=keeper.uuids, ttl_s=LONG_S)
    full(*keeper.copies)
    answer = talk.ask("set", mhz=900)
    assert (answer["code"], "no lock without a journal" in answer["error"]) == ("gpu", True)
    assert machine.writes() == []
    assert keeper.status()["before"] == {}
    for path in keeper.copies:
        path.with_suffix(".part").unlink()
    talk.done("set", mhz=900)


@pytest.mark.parametrize("copy", [0, 1])
def test_one_copy_is_enough_to_lock_and_it_is_said(keepers, machine, copy):
    first = keepers()
    full(first.copies[copy])
    with first.holds(mhz=900):
        assert "No space left" in first.said
        first.kill()
    keepers()
    until(lambda: locks(machine) == [None, None])


def test_what_was_restored_stays_noted_while_that_cannot_be_written(keepers, machine):
    first = keepers()
    with first.holds(0, mhz=900):
        full(*first.copies)
    until(lambda: machine.gpus[0].lock is None)
    until(lambda: all(f"journal {path} is not written: " in first.said for path in first.copies))
    assert first.journal == {first.uuids[0]: None}
    with first.talk() as talk:
        talk.done("lease", gpus=first.uuids[1:], ttl_s=1)
    assert first.stop() == 0


def test_another_boot_is_no_business_of_ours(keepers, machine):
    first = keepers()
    first.kill()
    Journal(first.copies, "another boot").write({first.uuids[0]: (705, 705)})
    second = keepers()
    assert second.journal == second.status()["before"] == {}
    assert machine.writes() == []


def test_a_gpu_that_is_not_here_any_more_stays_noted(keepers, machine):
    first = keepers()
    first.kill()
    Journal(first.copies, BOOT).write({"GPU-gone": None, first.uuids[0]: None})
    machine.gpus[0].lock_by_other(900, 900)
    second = keepers()
    until(lambda: second.status()["returning"] == ["GPU-gone"])
    assert machine.gpus[0].lock is None
    with second.holds(mhz=900):
        assert locks(machine) == [(900, 900)] * 2
    until(lambda: second.journal == {"GPU-gone": None})


def test_a_holder_notices_and_leases_anew(keepers, machine):
    first = keepers()
    talk = first.holds(mhz=900, ttl_s=TTL_S)
    first.kill()
    assert talk.hung_up()
    second = keepers()
    until(lambda: not second.status()["returning"])
    with second.holds(mhz=1005):
        time.sleep(0.05)
        assert locks(machine) == [(1005, 1005)] * 2, "what the first left was restored before, not after"
