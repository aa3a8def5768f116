"""The journal: two copies, each intact or ignored; torn and old copies, and disks that cannot be written."""

import errno
import itertools
import json
import os
import resource
import zlib

import pytest

from tests.keeper.rig import NOBODY, needs_root
from throttllem.gpu.clock_range import ClockRange
from throttllem.keeper.journal import Journal
from tools.testbed.private import private_folder

BASELINES = {"GPU-a": None, "GPU-b": ClockRange(600, 1410)}


@pytest.fixture
def paths():
    with private_folder("journal-") as folder:
        yield folder / "one.journal", folder / "two.journal"


def read(paths, boot="now"):
    return Journal(paths, boot).read()


@pytest.fixture
def logged(caplog):
    """Messages since the last call."""

    def take():
        messages = list(caplog.messages)
        caplog.clear()
        return messages

    return take


def lines(body):
    return b"%08x %s\n" % (zlib.crc32(body), body)


def test_what_is_written_is_read(paths, logged):
    Journal(paths, "now").write(BASELINES)
    assert read(paths) == BASELINES
    assert logged() == []
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert {path.name for path in paths[0].parent.iterdir()} == {"one.journal", "two.journal"}


def test_an_older_format_is_read_without_its_baselines(paths, logged):
    """An older version inferred them from steady clocks."""
    paths[0].write_bytes(lines(b'[1, "now", {"GPU-a": null, "GPU-b": [2730, 2730]}]'))
    assert read(paths) == {"GPU-a": None, "GPU-b": None}
    assert logged() == []


def test_without_files_it_is_empty(paths):
    assert read(paths) == {}


def test_either_copy_is_enough(paths):
    Journal(paths, "now").write(BASELINES)
    paths[0].unlink()
    assert read(paths) == BASELINES


def test_the_newer_copy_counts_wherever_it_is(paths):
    for older, newer in (paths, paths[::-1]):
        Journal(paths, "now").write({"GPU-old": None})
        kept = older.read_bytes()
        journal = Journal(paths, "now")
        journal.read()
        journal.write(BASELINES)
        older.write_bytes(kept)
        assert read(paths) == BASELINES
        newer.unlink()


def test_numbers_continue_after_a_restart(paths):
    for expected in range(1, 4):
        journal = Journal(paths, "now")
        journal.read()
        journal.write(BASELINES)
        assert json.loads(paths[0].read_bytes().split(b" ", 1)[1])[0] == expected


def test_of_another_boot_only_the_number_counts(paths):
    first = Journal(paths, "then")
    first.write({})
    first.write(BASELINES)
    later = Journal(paths, "now")
    assert later.read() == {}
    later.write({"GPU-c": None})
    assert read(paths) == {"GPU-c": None}


@pytest.mark.parametrize("keep", [0, 1, 8, 9, 20, -2])
def test_a_truncated_copy_is_ignored(paths, logged, keep):
    Journal(paths, "now").write(BASELINES)
    paths[0].write_bytes(paths[0].read_bytes()[:keep])
    assert read(paths) == BASELINES
    (trouble,) = logged()
    assert trouble.startswith(f"journal {paths[0]} is not used: ")


def test_a_flipped_bit_is_detected(paths):
    Journal(paths[:1], "now").write(BASELINES)
    whole = paths[0].read_bytes()
    for place, bit in itertools.product(range(len(whole) - 1), (0, 5)):
        content = bytearray(whole)
        content[place] ^= 1 << bit
        paths[0].write_bytes(content)
        found = read(paths)
        assert found == {} or (found == BASELINES and place < 8), "the case of a digit of the checksum changes nothing"


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
        b'[1, "now", {}, true, "later"]',
        b'[true, "now", {}, true]',
        b'[4294967297, "now", {}, true]',
        b'[1, "now", {"GPU-a": [true, 5]}, true]',
        b'[1, "now", {"GPU-a": [1.5, 5]}, true]',
        b'[1, "now", {"\\u001b[2J": null}, true]',
        b'[1, "now", ' + json.dumps(dict.fromkeys(map(str, range(33)))).encode() + b", true]",
        b"[" * 40_000,
        b" " * 70_000,
    ],
    ids=lambda body: repr(body[:40]),
)
def test_an_intact_copy_with_wrong_content_is_ignored(paths, logged, body):
    paths[0].write_bytes(lines(body))
    Journal(paths[1:], "now").write(BASELINES)
    assert read(paths) == BASELINES
    assert len(logged()) == 1


def test_a_folder_at_its_path_is_logged(paths, logged):
    paths[0].mkdir()
    journal = Journal(paths, "now")
    journal.read()
    assert "one.journal is not used" in "".join(logged())
    journal.write(BASELINES)
    assert "one.journal is not written" in "".join(logged())
    assert read(paths) == BASELINES


def full(path):
    """A disk to which this copy cannot be written."""
    path.with_suffix(".part").mkdir()


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775], ids=oct)
@pytest.mark.parametrize("level", [0, 1])
def test_a_folder_that_others_can_write_to_is_not_used(paths, logged, mode, level):
    """Whether it is the journal's own folder or one above, sticky or not."""
    folder = paths[0].parent / "above" / "own"
    folder.mkdir(parents=True)
    journal = folder / "keeper.journal"
    Journal((journal,), "now").write(BASELINES)
    journal.parents[level].chmod(mode)
    assert read((journal,)) == {}
    assert "other users can write there" in "".join(logged())
    with pytest.raises(OSError, match="no lock without a journal"):
        Journal((journal,), "now").write({})


@needs_root
@pytest.mark.parametrize("case", ["owner", "mode", "link", "second name", "pipe", "folder's link", "folder's owner"])
def test_a_copy_that_is_not_roots_alone_is_not_used(paths, logged, case):
    folder = paths[0].parent / "own"
    folder.mkdir()
    journal, other = folder / "keeper.journal", paths[1]
    Journal((journal,), "now").write(BASELINES)
    match case:
        case "owner":
            os.chown(journal, NOBODY, NOBODY)
        case "mode":
            journal.chmod(0o666)
        case "link":
            journal.symlink_to(journal.replace(other))
        case "second name":
            other.hardlink_to(journal)
        case "pipe":
            journal.unlink()
            os.mkfifo(journal)
        case "folder's link":
            folder.symlink_to(folder.rename(paths[0].parent / "real"))
        case "folder's owner":
            os.chown(folder, NOBODY, NOBODY)
    assert read((journal,)) == {}
    assert len(logged()) == 1


def test_a_journal_is_written_with_the_same_mode_under_any_umask(paths):
    before = os.umask(0)
    try:
        Journal(paths, "now").write(BASELINES)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o644}


def test_a_damaged_copy_is_kept_beside_its_replacement(paths):
    paths[0].write_bytes(b"torn")
    journal = Journal(paths, "now")
    assert journal.read() == {}
    journal.replace_damaged(BASELINES)
    assert read(paths) == BASELINES
    (kept,) = paths[0].parent.glob("one.journal.damaged-*")
    assert kept.read_bytes() == b"torn"


def test_a_full_disk_leaves_the_other_copy(paths, logged):
    Journal(paths, "now").write({})
    full(paths[0])
    journal = Journal(paths, "now")
    journal.read()
    journal.write(BASELINES)
    assert os.strerror(errno.EISDIR) in "".join(logged())
    assert read(paths) == BASELINES


def test_without_any_space_it_raises_and_the_old_copies_stay(paths):
    journal = Journal(paths, "now")
    journal.write(BASELINES)
    for path in paths:
        full(path)
    with pytest.raises(OSError, match="no lock without a journal"):
        journal.write({})
    assert read(paths) == BASELINES


def test_a_copy_that_was_written_in_part_replaces_nothing(paths):
    journal = Journal(paths, "now")
    journal.write(BASELINES)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            journal.write({})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert paths[0].with_suffix(".part").stat().st_size == 10
    assert read(paths) == BASELINES
