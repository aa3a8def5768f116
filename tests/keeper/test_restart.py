"""A keeper that dies at the worst moments, and the next one: every lock is in the journal, and is restored."""

import signal
import time

import pytest

from tests.keeper.rig import BOOT, LONG_S, TTL_S, locks, until
from throttllem.keeper.journal import Journal

LOCK, RESET = "nvmlDeviceSetGpuLockedClocks", "nvmlDeviceResetGpuLockedClocks"


def full(*journals):
    """These copies cannot be written."""
    for path in journals:
        path.with_suffix(".part").mkdir()


def test_the_next_keeper_restores_the_baseline_and_resets_other_gpus(keepers, machine):
    first = keepers(baselines={0: (705, 705)})
    with first.holds(mhz=900):
        first.kill()
    assert locks(machine) == [(900, 900)] * 2, "a lock outlives the process that set it"
    second = keepers(baselines={0: (705, 705)})
    until(lambda: locks(machine) == [(705, 705), None])
    until(lambda: second.journal == {} and not second.status()["returning"])


def test_the_next_keeper_restores_gpus_that_it_may_not_set(keepers, machine):
    first = keepers()
    with first.holds(mhz=900):
        first.kill()
    second = keepers(clocks=[(210, 1410)])
    until(lambda: locks(machine) == [None, None])
    assert second.status()["allowed"].keys() == set(second.uuids[:1])


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", [0, 1])
def test_killed_while_it_locks(keepers, machine, moment, number):
    first = keepers(baselines={1: (705, 705)})
    client = first.holds()
    machine.fault(LOCK, kill=moment, gpu=number, times=1)
    client.send({"op": "set", "mhz": 900})
    assert first.wait() == -signal.SIGKILL
    assert first.journal == {first.uuids[0]: None, first.uuids[1]: (705, 705)}, "on disk before the first lock"
    machine.clear_faults()
    keepers(baselines={1: (705, 705)})
    until(lambda: locks(machine) == [None, (705, 705)])
    client.close()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_while_it_restores(keepers, machine, moment):
    first = keepers()
    with first.holds(mhz=900):
        machine.fault(RESET, kill=moment, gpu=0, times=1)
    assert first.wait() == -signal.SIGKILL
    machine.clear_faults()
    second = keepers()
    until(lambda: locks(machine) == [None, None] and second.journal == {})


def test_the_baseline_is_restored_after_repeated_kills(keepers, machine):
    first = keepers(baselines={0: (705, 705)})
    with first.holds(mhz=900):
        first.kill()
    for _ in range(3):
        machine.fault(LOCK, kill="before", gpu=0, times=1)
        assert keepers(wait=False, baselines={0: (705, 705)}).wait() == -signal.SIGKILL
        machine.clear_faults()
    keepers(baselines={0: (705, 705)})
    until(lambda: locks(machine) == [(705, 705), None])


@pytest.mark.parametrize("copy", [0, 1])
@pytest.mark.parametrize("torn", [False, True])
def test_one_missing_or_torn_copy_loses_no_lock(keepers, machine, copy, torn):
    first = keepers()
    with first.holds(mhz=900):
        first.kill()
    if torn:
        first.copies[copy].write_bytes(first.copies[copy].read_bytes()[:20])
    else:
        first.copies[copy].unlink()
    second = keepers()
    until(lambda: locks(machine) == [None, None])
    assert ("is not used" in second.logged) is torn


def test_what_a_damaged_journal_named_is_restored_and_the_copies_are_kept(keepers, machine):
    first = keepers(baselines={1: (705, 705)})
    with first.holds(mhz=900):
        first.kill()
    for path in first.copies:
        path.write_bytes(b"\0" * 100)
    second = keepers(baselines={1: (705, 705)})
    until(lambda: locks(machine) == [None, (705, 705)] and second.journal == {})
    assert second.logged.count("is kept as") == 2
    assert all([*path.parent.glob(f"{path.name}.damaged-*")] for path in first.copies)
    second.kill()
    assert "is not used" not in keepers(baselines={1: (705, 705)}).logged[len(second.logged) :], "once is enough"


def test_a_folder_that_others_can_write_to_is_refused(keepers, folder):
    (folder / "state").mkdir()
    (folder / "state").chmod(0o1777)
    refused = keepers(wait=False)
    assert refused.wait() == 1
    assert "has mode 1777: other users can write there" in refused.logged


def test_nothing_is_locked_without_a_journal(keeper, client, machine):
    client.ok("lease", gpus=keeper.uuids, ttl_s=LONG_S)
    full(*keeper.copies)
    answer = client.request("set", mhz=900)
    assert (answer["code"], "no lock without a journal" in answer["error"]) == ("gpu", True)
    assert machine.writes() == []
    assert keeper.status()["before"] == {}
    for path in keeper.copies:
        path.with_suffix(".part").rmdir()
    client.ok("set", mhz=900)


@pytest.mark.parametrize("copy", [0, 1])
def test_one_copy_is_enough_to_lock_and_the_failure_is_logged(keepers, machine, copy):
    first = keepers()
    full(first.copies[copy])
    with first.holds(mhz=900):
        assert "Is a directory" in first.logged
        first.kill()
    keepers()
    until(lambda: locks(machine) == [None, None])


def test_a_restored_gpu_stays_in_a_journal_that_cannot_be_written(keepers, machine):
    first = keepers()
    with first.holds(0, mhz=900):
        full(*first.copies)
    until(lambda: machine.gpus[0].lock is None)
    until(lambda: all(f"journal {path} is not written: " in first.logged for path in first.copies))
    assert first.journal == {first.uuids[0]: None}
    with first.client() as client:
        client.ok("lease", gpus=first.uuids[1:], ttl_s=1)
    assert first.stop() == 0


def test_a_journal_of_another_boot_is_ignored(keepers, machine):
    first = keepers()
    first.kill()
    Journal(first.copies, "another boot").write({first.uuids[0]: (705, 705)})
    second = keepers()
    assert second.journal == second.status()["before"] == {}
    assert machine.writes() == []


def test_a_gpu_that_is_not_here_stays_in_the_journal(keepers, machine):
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


def test_a_client_is_disconnected_and_leases_again(keepers, machine):
    first = keepers()
    client = first.holds(mhz=900, ttl_s=TTL_S)
    first.kill()
    assert client.disconnected()
    second = keepers()
    until(lambda: not second.status()["returning"])
    with second.holds(mhz=1005):
        time.sleep(0.05)
        assert locks(machine) == [(1005, 1005)] * 2, "the restore after the kill came before this lease, not after"
