"""What a GPU is restored to after a lease: the baseline that `--normally` states, or unlocked. Nothing is inferred."""

import json
import zlib

import pytest

from tests.keeper.rig import BOOT, locks, until
from throttllem.keeper.journal import Journal
from tools.nvml.machine import Machine, rtx4090

CLOCKS = ((210, 3105), (210, 3105))


@pytest.fixture
def machine(library, folder):
    """Two GeForce cards under load: their clocks stand still without a lock, at 2730 of 3105 MHz."""
    with Machine.create(folder / "gpus", rtx4090(2, switch_ms=(0, 0)), library=library) as made:
        (folder / "gpus").chmod(0o666)
        for gpu in made.gpus:
            gpu.root_only(False)
            gpu.work(0.9, 3600.0)
        yield made


def write_old_format(paths, baselines):
    """A journal of an older version, which inferred locks from steady clocks."""
    body = json.dumps([1, BOOT, baselines]).encode()
    for path in paths:
        path.write_bytes(b"%08x %s\n" % (zlib.crc32(body), body))


def test_a_steady_boost_clock_is_not_taken_for_a_lock(keepers, machine):
    keeper = keepers(clocks=CLOCKS)
    assert [gpu.clock_mhz for gpu in machine.gpus] == [2730, 2730]
    keeper.holds(mhz=1500).ok("release")
    assert locks(machine) == [None, None]
    assert [gpu.clock_mhz for gpu in machine.gpus] == [2730, 2730]


def test_the_stated_baseline_is_restored_and_every_other_gpu_reset(keepers, machine):
    machine.gpus[1].lock_by_other(705, 705)
    keeper = keepers(clocks=CLOCKS, baselines={0: (300, 1200)})
    client = keeper.holds(mhz=900)
    assert keeper.status()["before"] == {keeper.uuids[0]: [300, 1200], keeper.uuids[1]: None}
    client.ok("release")
    assert locks(machine) == [(300, 1200), None]


def test_the_options_of_the_next_keeper_count_for_its_own_gpus(keepers, machine):
    first = keepers(clocks=CLOCKS, baselines={0: (300, 1200)})
    with first.holds(mhz=900):
        first.kill()
    keepers(clocks=CLOCKS, baselines={1: (600, 1500)})
    until(lambda: locks(machine) == [None, (600, 1500)])


def test_a_gpu_that_the_next_keeper_may_not_set_has_its_baseline_from_the_journal(keepers, machine):
    first = keepers(clocks=CLOCKS, baselines={1: (300, 1200)})
    with first.holds(mhz=900):
        first.kill()
    keepers(clocks=CLOCKS[:1])
    until(lambda: locks(machine) == [None, (300, 1200)])


@pytest.mark.parametrize("may_set", [2, 1])
def test_an_older_journal_is_read_and_its_inferred_locks_are_reset(keepers, machine, may_set):
    first = keepers(clocks=CLOCKS)
    first.kill()
    write_old_format(first.copies, {first.uuids[0]: None, first.uuids[1]: [2730, 2730]})
    for gpu in machine.gpus:
        gpu.lock_by_other(900, 900)
    second = keepers(clocks=CLOCKS[:may_set])
    until(lambda: locks(machine) == [None, None])
    until(lambda: second.journal == {} and not second.status()["returning"])


def test_an_older_journal_and_a_stated_baseline(keepers, machine):
    first = keepers(clocks=CLOCKS)
    first.kill()
    write_old_format(first.copies, {uuid: [2730, 2730] for uuid in first.uuids})
    keepers(clocks=CLOCKS, baselines={1: (300, 1200)})
    until(lambda: locks(machine) == [None, (300, 1200)])


def test_a_stated_baseline_is_in_the_journal(keepers, machine):
    keeper = keepers(clocks=CLOCKS, baselines={0: (300, 1200)})
    with keeper.holds(mhz=900):
        assert Journal(keeper.copies, BOOT).read() == {keeper.uuids[0]: (300, 1200), keeper.uuids[1]: None}
