"""The journal alone: two copies, each whole or not there; what is torn, old or cannot be written."""

import errno
import itertools
import json
import os
import resource
import zlib

import pytest

from throttllem.gpu.nvml import Lock
from throttllem.keeper.journal import Journal

BEFORE = {"GPU-a": None, "GPU-b": Lock(600, 1410)}


@pytest.fixture
def paths(tmp_path):
    return tmp_path / "one.journal", tmp_path / "two.journal"


def read(paths, boot="now"):
    return Journal(paths, boot).read()


@pytest.fixture
def said(caplog):
    """What it said, and nothing older."""

    def take():
        messages = list(caplog.messages)
        caplog.clear()
        return messages

    return take


def lines(body):
    return b"%08x %s\n" % (zlib.crc32(body), body)


def test_what_is_written_is_read(paths, said):
    Journal(paths, "now").write(BEFORE)
    assert read(paths) == BEFORE
    assert said() == []
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert {path.name for path in paths[0].parent.iterdir()} == {"one.journal", "two.journal"}


def test_of_an_older_version_only_the_gpus_count(paths, said):
    """It inferred locks from steady clocks, and its entries have no mark."""
    paths[0].write_bytes(lines(b'[1, "now", {"GPU-a": null, "GPU-b": [2730, 2730]}]'))
    assert read(paths) == {"GPU-a": None, "GPU-b": None}
    assert said() == []


def test_nothing_there_is_nothing_left(paths):
    assert read(paths) == {}


def test_either_copy_is_enough(paths):
    Journal(paths, "now").write(BEFORE)
    paths[0].unlink()
    assert read(paths) == BEFORE


def test_the_newer_copy_counts_wherever_it_is(paths):
    for older, newer in (paths, paths[::-1]):
        Journal(paths, "now").write({"GPU-old": None})
        kept = older.read_bytes()
        journal = Journal(paths, "now")
        journal.read()
        journal.write(BEFORE)
        older.write_bytes(kept)
        assert read(paths) == BEFORE
        newer.unlink()


def test_numbers_go_on_after_a_start(paths):
    for expected in range(1, 4):
        journal = Journal(paths, "now")
        journal.read()
        journal.write(BEFORE)
        assert json.loads(paths[0].read_bytes().split(b" ", 1)[1])[0] == expected


def test_another_boot_left_nothing_but_its_number(paths):
    first = Journal(paths, "then")
    first.write({})
    first.write(BEFORE)
    later = Journal(paths, "now")
    assert later.read() == {}
    later.write({"GPU-c": None})
    assert read(paths) == {"GPU-c": None}


@pytest.mark.parametrize("keep", [0, 1, 8, 9, 20, -2])
def test_half_a_copy_is_none(paths, said, keep):
    Journal(paths, "now").write(BEFORE)
    paths[0].write_bytes(paths[0].read_bytes()[:keep])
    assert read(paths) == BEFORE
    (trouble,) = said()
    assert trouble.startswith(f"journal {paths[0]} is not used: ")


def test_a_flipped_bit_is_never_believed(paths):
    Journal(paths[:1], "now").write(BEFORE)
    whole = paths[0].read_bytes()
    for place, bit in itertools.product(range(len(whole) - 1), (0, 5)):
        content = bytearray(whole)
        content[place] ^= 1 << bit
        paths[0].write_bytes(content)
        found = read(paths)
        assert found == {} or (found == BEFORE and place < 8), "the case of a digit of the checksum changes nothing"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[1]",
        b'["x", "now", {}]',
        b'[1, "now", []]',
        b'[1, "now", {"GPU-a": [0, 5]}, true]',
        b'[1, "now", 5]',
    ],
)
def test_a_whole_copy_that_means_nothing_is_not_used(paths, said, body):
    paths[0].write_bytes(lines(body))
    Journal(paths[1:], "now").write(BEFORE)
    assert read(paths) == BEFORE
    assert len(said()) == 1


def test_a_folder_in_its_place_is_said(paths, said):
    paths[0].mkdir()
    journal = Journal(paths, "now")
    journal.read()
    assert "one.journal is not used" in "".join(said())
    journal.write(BEFORE)
    assert "one.journal is not written" in "".join(said())
    assert read(paths) == BEFORE


def full(path):
    """A disk with no space for this copy."""
    path.with_suffix(".part").symlink_to("/dev/full")


def test_a_full_disk_leaves_the_other_copy(paths, said):
    Journal(paths, "now").write({})
    full(paths[0])
    journal = Journal(paths, "now")
    journal.read()
    journal.write(BEFORE)
    assert os.strerror(errno.ENOSPC) in "".join(said())
    assert read(paths) == BEFORE


def test_no_space_at_all_is_an_error_and_what_was_there_stays(paths):
    journal = Journal(paths, "now")
    journal.write(BEFORE)
    for path in paths:
        full(path)
    with pytest.raises(OSError, match="no lock without a journal"):
        journal.write({})
    assert read(paths) == BEFORE


def test_a_copy_of_which_only_half_was_taken_is_not_put_in_place(paths):
    journal = Journal(paths, "now")
    journal.write(BEFORE)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            journal.write({})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert paths[0].with_suffix(".part").stat().st_size == 10
    assert read(paths) == BEFORE
