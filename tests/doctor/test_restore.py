"""`doctor --restore`: restores what a dead keeper left locked; other programs' locks only where a GPU is named."""

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

    def run(*options, uid=None):
        code, output = ward.doctor("--restore", "--json", "--no-measure", *options, machine=machine, uid=uid)
        report = json.loads(output)["findings"]
        return code, [f"{one['mark']} {one['text']}" for one in report if one["subject"] == "restore"]

    return run


@pytest.fixture
def dead(keepers, machine):
    """A keeper that left both GPUs locked, and has a baseline for one of them."""
    keeper = keepers(baselines={1: (705, 705)})
    with keeper.holds(mhz=900):
        keeper.kill()
    assert locks(machine) == [(900, 900)] * 2
    return keeper


def test_gpus_of_a_dead_keeper_are_restored(dead, restored, machine):
    first, second = dead.uuids
    _, report = restored()
    assert report == [f"ok {first} is unlocked", f"ok {second} is restored to its baseline, 705 to 705 MHz"]
    assert locks(machine) == [None, (705, 705)]
    assert dead.journal == {}
    assert restored()[1] == ["ok no keeper left anything locked"]


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_a_folder_that_others_can_write_to_is_not_used(dead, restored, machine, mode):
    (dead.run / ".lock").unlink()
    dead.run.chmod(mode)
    code, (line,) = restored()
    assert code == 1 and f"has mode {mode:04o}: other users can write there" in line
    assert not (dead.run / ".lock").exists()
    assert locks(machine) == [(900, 900)] * 2


def test_a_damaged_journal_is_said_and_kept(dead, restored, ward, machine):
    for path in dead.copies:
        path.write_bytes(b"torn")
    code, report = restored()
    assert (code, report) == (1, ["!! the journal was damaged: a GPU that it named may still be locked"])
    assert restored() == (0, ["ok no keeper left anything locked"])
    assert ward.doctor("--no-measure", machine=machine)[1].count("a damaged journal is kept as") == 2


def test_baselines_of_an_older_journal_are_ignored(dead, restored, machine):
    body = json.dumps([99, BOOT, {uuid: [705, 705] for uuid in dead.uuids}]).encode()
    dead.copies[0].write_bytes(b"%08x %s\n" % (zlib.crc32(body), body))
    _, report = restored()
    assert report == [f"ok {uuid} is unlocked" for uuid in dead.uuids]
    assert locks(machine) == [None, None]


def test_locks_of_other_programs_stay(restored, machine):
    machine.gpus[0].lock_by_other(1005, 1005)
    code, report = restored()
    assert (code, report) == (0, ["ok no keeper left anything locked"])
    assert locks(machine) == [(1005, 1005), None]
    assert machine.writes() == []


def test_only_the_named_gpu_is_reset(dead, restored, machine):
    first, second = dead.uuids
    _, report = restored("--gpu", second)
    assert report == [f"-- resetting {second}, whatever locked it", f"ok {second} is unlocked"]
    assert locks(machine) == [(900, 900), None]
    assert dead.journal == {first: None}


def test_a_lock_of_another_program_is_reset_on_a_named_gpu(restored, machine):
    machine.gpus[0].lock_by_other(1005, 1005)
    machine.gpus[1].lock_by_other(1005, 1005)
    _, report = restored("--gpu", machine.gpus[0].uuid)
    assert report[-1] == f"ok {machine.gpus[0].uuid} is unlocked"
    assert locks(machine) == [None, (1005, 1005)]


def test_a_running_keeper_restores_by_itself(keeper, restored, machine):
    with keeper.holds(mhz=900):
        _, report = restored()
        assert [line.split(":")[0] for line in report] == ["-- a keeper runs on /run/throttllem"]
        assert locks(machine) == [(900, 900)] * 2


def test_a_leased_gpu_is_not_touched(keeper, restored, machine):
    with keeper.holds(0, mhz=900):
        machine.gpus[1].lock_by_other(1005, 1005)
        code, report = restored("--gpu", keeper.uuids[0], "--gpu", keeper.uuids[1])
        assert code == 1
        assert report[0].startswith(f"!! {keeper.uuids[0]} is not touched: the keeper holds it for process ")
        assert report[-1] == f"ok {keeper.uuids[1]} is unlocked"
        assert locks(machine) == [(900, 900), None]


def test_a_keeper_that_starts_meanwhile_is_respected(dead, restored, machine):
    hold = hold_dir(dead.socket.parent)
    assert hold is not None
    with closing(open(hold)):  # noqa: PTH123  another doctor, or a keeper without a socket yet
        assert restored()[1][0].startswith("-- a keeper runs on")
        assert restored("--gpu", dead.uuids[0])[1][0].startswith(f"!! {dead.uuids[0]} is not touched")
    assert locks(machine) == [(900, 900)] * 2


def test_a_gpu_that_fails_stays_in_the_journal(dead, restored, machine):
    machine.fault("nvmlDeviceResetGpuLockedClocks", error=999)
    code, report = restored()
    assert code == 1
    assert report[0].startswith("!! not restored: unlocking of")
    assert dead.journal == {dead.uuids[0]: None}
    machine.clear_faults()
    assert restored()[1] == [f"ok {dead.uuids[0]} is unlocked"]


def test_a_failed_reset_is_reported(dead, restored, machine):
    machine.fault("nvmlDeviceResetGpuLockedClocks", error=999, times=1)
    _, report = restored("--gpu", dead.uuids[0], "--gpu", dead.uuids[1])
    assert report[1].startswith("!! not reset: unlocking of")
    assert report[-1] == f"ok {dead.uuids[1]} is unlocked"
    assert dead.journal == {dead.uuids[0]: None}


def test_a_journal_of_another_boot_is_ignored(keepers, restored, machine):
    keeper = keepers()
    keeper.kill()
    Journal(keeper.copies, "another boot").write({keeper.uuids[0]: None})
    machine.gpus[0].lock_by_other(900, 900)
    assert restored()[1] == ["ok no keeper left anything locked"]
    assert machine.writes() == []


def test_a_keeper_starts_after_it(dead, restored, keepers, machine):
    restored()
    again = keepers(baselines={1: (705, 705)})
    with again.holds(0, mhz=1005):
        assert again.journal == {again.uuids[0]: None}
    until(lambda: locks(machine) == [None, (705, 705)])
    until(lambda: again.journal == {})


@needs_root
def test_a_user_without_rights_restores_nothing(dead, restored, machine):
    code, report = restored(uid=NOBODY)
    assert code == 1
    assert report[0].startswith(f"!! user {NOBODY}")
    assert locks(machine) == [(900, 900)] * 2


def test_a_gpu_that_is_not_here(ward, machine):
    code, output = ward.doctor("--restore", "--gpu", "GPU-x", machine=machine)
    assert code == 1
    assert f"ValueError: --gpu GPU-x: is not here; here are {machine.gpus[0].uuid}, " in output


def test_without_a_driver(ward, machine):
    machine.driver(loaded=False)
    code, output = ward.doctor("--restore", machine=machine)
    assert code == 1
    assert output.startswith("!! restore: not done: NVML: Driver Not Loaded")


@pytest.mark.slow
def test_a_gpu_that_hangs_delays_no_other(dead, restored, machine):
    machine.fault("nvmlDeviceResetGpuLockedClocks", sleep_s=30, gpu=0)
    _, report = restored()
    assert report[0] == "!! not restored: a call of the driver has not returned for 3 s"
    assert machine.gpus[1].lock == (705, 705)
    assert dead.journal == {dead.uuids[0]: None}
