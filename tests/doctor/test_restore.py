"""`doctor --restore`: what a dead keeper left is restored; what others locked only where it is named; nothing else."""

import json
import zlib
from contextlib import closing

import pytest

from tests.keeper.rig import BOOT, NOBODY, locks, needs_root, until
from throttllem.doctor.rights import sets_clocks
from throttllem.files import hold_dir
from throttllem.keeper.journal import Journal

pytestmark = pytest.mark.skipif(not sets_clocks(), reason="needs the rights that NVML wants")


@pytest.fixture
def restored(ward, machine):
    """Exit code, and the findings about restoring."""

    def ask(*options, uid=None):
        code, said = ward.doctor("--restore", "--json", "--no-measure", *options, machine=machine, uid=uid)
        told = json.loads(said)["findings"]
        return code, [f"{one['mark']} {one['text']}" for one in told if one["subject"] == "restore"]

    return ask


@pytest.fixture
def dead(keepers, machine):
    """A keeper that left both GPUs locked, and has a baseline for one of them."""
    keeper = keepers(normally={1: (705, 705)})
    with keeper.holds(mhz=900):
        keeper.kill()
    assert locks(machine) == [(900, 900)] * 2
    return keeper


def test_what_a_dead_keeper_left_is_restored(dead, restored, machine):
    first, second = dead.uuids
    _, told = restored()
    assert told == [f"ok {first} is unlocked", f"ok {second} is at its baseline again, 705 to 705 MHz"]
    assert locks(machine) == [None, (705, 705)]
    assert dead.journal == {}
    assert restored()[1] == ["ok no keeper left anything locked"]


def test_locks_that_an_older_version_inferred_are_reset(dead, restored, machine):
    body = json.dumps([99, BOOT, {uuid: [705, 705] for uuid in dead.uuids}]).encode()
    dead.copies[0].write_bytes(b"%08x %s\n" % (zlib.crc32(body), body))
    _, told = restored()
    assert told == [f"ok {uuid} is unlocked" for uuid in dead.uuids]
    assert locks(machine) == [None, None]


def test_what_others_locked_stays(restored, machine):
    machine.gpus[0].lock_by_other(1005, 1005)
    code, told = restored()
    assert (code, told) == (0, ["ok no keeper left anything locked"])
    assert locks(machine) == [(1005, 1005), None]
    assert machine.writes() == []


def test_what_is_named_is_reset_and_nothing_else(dead, restored, machine):
    first, second = dead.uuids
    _, told = restored("--gpu", second)
    assert told == [f"-- resetting {second}, no matter what locked it", f"ok {second} is not locked any more"]
    assert locks(machine) == [(900, 900), None]
    assert dead.journal == {first: None}


def test_what_others_locked_is_reset_where_it_is_named(restored, machine):
    machine.gpus[0].lock_by_other(1005, 1005)
    machine.gpus[1].lock_by_other(1005, 1005)
    _, told = restored("--gpu", machine.gpus[0].uuid)
    assert told[-1] == f"ok {machine.gpus[0].uuid} is not locked any more"
    assert locks(machine) == [None, (1005, 1005)]


def test_a_keeper_that_runs_does_it_itself(keeper, restored, machine):
    with keeper.holds(mhz=900):
        _, told = restored()
        assert [line.split(":")[0] for line in told] == ["-- a keeper runs on /run/throttllem"]
        assert locks(machine) == [(900, 900)] * 2


def test_what_a_keeper_holds_is_left_alone(keeper, restored, machine):
    with keeper.holds(0, mhz=900):
        machine.gpus[1].lock_by_other(1005, 1005)
        code, told = restored("--gpu", keeper.uuids[0], "--gpu", keeper.uuids[1])
        assert code == 1
        assert told[0].startswith(f"!! {keeper.uuids[0]} is left alone: the keeper holds it for process ")
        assert told[-1] == f"ok {keeper.uuids[1]} is not locked any more"
        assert locks(machine) == [(900, 900), None]


def test_a_keeper_that_starts_meanwhile_is_kept_out(dead, restored, machine):
    hold = hold_dir(dead.socket.parent)
    assert hold is not None
    with closing(open(hold)):  # noqa: PTH123  what another doctor, or a keeper that has no socket yet, holds
        assert restored()[1][0].startswith("-- a keeper runs on")
        assert restored("--gpu", dead.uuids[0])[1][0].startswith(f"!! {dead.uuids[0]} is left alone")
    assert locks(machine) == [(900, 900)] * 2


def test_what_does_not_work_stays_in_the_journal(dead, restored, machine):
    machine.fault("nvmlDeviceResetGpuLockedClocks", error=999)
    code, told = restored()
    assert code == 1
    assert told[0].startswith("!! not restored: unlocking of")
    assert dead.journal == {dead.uuids[0]: None}
    machine.clear_faults()
    assert restored()[1] == [f"ok {dead.uuids[0]} is unlocked"]


def test_what_cannot_be_reset_is_told(dead, restored, machine):
    machine.fault("nvmlDeviceResetGpuLockedClocks", error=999, times=1)
    _, told = restored("--gpu", dead.uuids[0], "--gpu", dead.uuids[1])
    assert told[1].startswith("!! not reset: unlocking of")
    assert told[-1] == f"ok {dead.uuids[1]} is not locked any more"
    assert dead.journal == {dead.uuids[0]: None}


def test_a_journal_of_another_boot_is_nothing_to_restore(keepers, restored, machine):
    keeper = keepers()
    keeper.kill()
    Journal(keeper.copies, "another boot").write({keeper.uuids[0]: None})
    machine.gpus[0].lock_by_other(900, 900)
    assert restored()[1] == ["ok no keeper left anything locked"]
    assert machine.writes() == []


def test_a_keeper_starts_again_after_it(dead, restored, keepers, machine):
    restored()
    again = keepers(normally={1: (705, 705)})
    with again.holds(0, mhz=1005):
        assert again.journal == {again.uuids[0]: None}
    until(lambda: locks(machine) == [None, (705, 705)])
    until(lambda: again.journal == {})


@needs_root
def test_who_may_not_restore_is_told_so(dead, restored, machine):
    code, told = restored(uid=NOBODY)
    assert code == 1
    assert told[0].startswith(f"!! user {NOBODY}")
    assert locks(machine) == [(900, 900)] * 2


def test_a_gpu_that_is_not_here(ward, machine):
    code, said = ward.doctor("--restore", "--gpu", "GPU-x", machine=machine)
    assert code == 1
    assert f"ValueError: --gpu GPU-x: is not here; here are {machine.gpus[0].uuid}, " in said


def test_without_a_driver_it_is_said(ward, machine):
    machine.driver(loaded=False)
    code, said = ward.doctor("--restore", machine=machine)
    assert code == 1
    assert said.startswith("!! restore: not done: NVML: Driver Not Loaded")


@pytest.mark.slow
def test_a_gpu_that_hangs_holds_no_other_up(dead, restored, machine):
    machine.fault("nvmlDeviceResetGpuLockedClocks", sleep_s=30, gpu=0)
    _, told = restored()
    assert told[0] == "!! not restored: a call of the driver has not come back for 3 s"
    assert machine.gpus[1].lock == (705, 705)
    assert dead.journal == {dead.uuids[0]: None}
