"""Files that are replaced whole, and folders, as any user and as root."""

import errno
import os
from pathlib import Path

import pytest

from throttllem import files
from throttllem.files import WriteError, ensure_writable_dir, write_aside

LINUX = Path("/proc/self/status").exists()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_replaces_whole_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with write_aside(path) as aside:
        assert aside.parent == tmp_path
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["result.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", ["old", None])
def test_an_interrupted_write_changes_nothing(tmp_path, error, before):
    path = tmp_path / "result.json"
    if before is not None:
        path.write_text(before)
    with pytest.raises(error), write_aside(path) as aside:
        aside.write_text("half")
        raise error
    assert names(tmp_path) == ([] if before is None else ["result.json"])
    assert before is None or path.read_text() == before


def test_contents_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    seen = []
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append(path.exists()))
    with write_aside(path) as aside:
        aside.write_text("new")
    assert seen == [False, True]


def test_a_full_disk_is_an_error_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    path.write_text("old")

    def full(handle):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="No space left on device; free some space"), write_aside(path) as aside:
        aside.write_text("new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["result.json"]


def test_a_folder_that_cannot_be_flushed_does_not_spoil_the_write(tmp_path, monkeypatch):
    path, flush = tmp_path / "result.json", files._flush

    def files_only(what):
        if what.is_dir():
            raise OSError(errno.EINVAL, "no folders here")
        flush(what)

    monkeypatch.setattr(files, "_flush", files_only)
    with write_aside(path) as aside:
        aside.write_text("new")
    assert path.read_text() == "new"


def test_permissions_are_those_of_a_plain_open(tmp_path):
    (tmp_path / "plain").touch()
    with write_aside(tmp_path / "aside"):
        pass
    assert (tmp_path / "aside").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_stays_a_link(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    link.symlink_to(real)
    with write_aside(link) as aside:
        aside.write_text("new")
    assert link.is_symlink()
    assert real.read_text() == "new"


def test_a_pipe_is_written_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with write_aside(pipe) as aside:
        assert aside == pipe
    assert pipe.is_fifo()


def test_a_long_name_is_cut_for_the_file_beside_it(tmp_path):
    path = tmp_path / ("é" * 120 + ".json")
    with write_aside(path) as aside:
        aside.write_text("new")
    assert path.read_text() == "new"


def test_errors_name_path_and_remedy(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    cases = [
        (tmp_path, "it is a directory; name a file"),
        (tmp_path / "absent" / "x", f"No such file or directory; make the folder {tmp_path / 'absent'} first"),
        (plain / "x", "Not a directory; a file stands where a folder is needed"),
        (tmp_path / ("x" * 300), "File name too long; choose another path"),
    ]
    for path, message in cases:
        with pytest.raises(WriteError) as caught, write_aside(path):
            raise AssertionError("the block must not run")
        assert str(caught.value).startswith(f"cannot write {path}: ")
        assert message in str(caught.value)


def test_makes_a_folder_and_leaves_it_empty(tmp_path):
    path = tmp_path / "a" / "b"
    assert ensure_writable_dir(path) == path
    assert ensure_writable_dir(path) == path
    assert names(path) == []


def test_a_folder_with_the_name_of_a_file(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    for path in (plain, plain / "below"):
        with pytest.raises(WriteError, match="a file stands where a folder is needed") as caught:
            ensure_writable_dir(path)
        assert str(path) in str(caught.value)


@pytest.mark.skipif(not LINUX, reason="/proc is there on Linux only")
@pytest.mark.parametrize("path", [Path("/proc"), Path("/proc/self"), Path("/proc/throttllem")])
def test_a_folder_that_not_even_root_can_write(path):
    with pytest.raises(WriteError, match=f"cannot write {path}: .+; .*choose another path"):
        ensure_writable_dir(path)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EACCES, "allow this user to write there"), (errno.EROFS, "the file system is read-only")],
)
def test_errors_that_root_never_gets(tmp_path, monkeypatch, number, remedy):
    def refuse(self, *_, **__):
        raise OSError(number, "no")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(WriteError, match=remedy):
        ensure_writable_dir(tmp_path)
    with pytest.raises(WriteError, match=remedy), write_aside(tmp_path / "x"):
        pass


def test_a_folder_is_locked_once(tmp_path):
    first = files.hold_dir(tmp_path / "state")
    assert first is not None
    assert files.hold_dir(tmp_path / "state") is None
    os.close(first)
    again = files.hold_dir(tmp_path / "state")
    assert again is not None
    os.close(again)
