"""Writing a file so that a reader never sees half of it, and checking a folder before work starts.

Knows nothing of what is written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


class WriteError(OSError):
    """A path cannot be written; the message names the path, the cause and the remedy."""


@contextlib.contextmanager
def write_aside(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield an empty file beside `path` to write to; it replaces `path` when the block ends.

    On any exception, KeyboardInterrupt included, it is removed and `path` stays as it was. The contents reach the
    disk before the name does. A device or pipe (/dev/null) is yielded itself: it must not be replaced by a file.
    `private`: no other user can read the file, and a link at `path` is replaced, not followed.
    Raises WriteError where the folder is missing or cannot be written; an error of the block itself passes unchanged.
    """
    target = path if private and path.is_symlink() else _target(path)
    if target is None:
        yield path
        return
    aside = _open_aside(path, target, mode=0o600 if private else 0o666)
    try:
        yield aside
        try:
            _flush(aside)
            aside.replace(target)
        except OSError as error:
            raise _refusal(path, error) from error
        # The file is whole and has its name; some file systems cannot flush a folder.
        with contextlib.suppress(OSError):
            _flush(target.parent)
    finally:
        aside.unlink(missing_ok=True)


def writable_dir(path: Path) -> None:
    """Raise WriteError if `ensure_writable_dir` could not make or use this folder. Makes nothing."""
    try:
        there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    except OSError as error:
        raise _refusal(path, error) from error
    if not there.is_dir():
        raise _refusal(path, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise _refusal(path, error) from error


def read_own(path: Path) -> bytes:
    """The contents of a regular file that this program wrote; a link is not followed, a pipe not waited for.

    Raises OSError.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        return file.read()


def open_to_others(path: Path) -> str | None:
    """How another user could change what is in this folder, with the remedy; None: nobody can, or it is not there.

    The bits of the group also bound its access control list.
    """
    try:
        found = path.stat()
    except OSError:
        return None
    if found.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to user {found.st_uid}, who can change what is in it: use another path"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written by other users (mode {stat.S_IMODE(found.st_mode):04o}): chmod go-w {path}"
    return None


def hold_dir(path: Path, *, private: bool = False) -> int | None:
    """Make the folder where absent and lock it until the handle is closed; None if another process has locked it.
    `private`: a folder that is made is closed to other users.

    Raises WriteError where it cannot be made. The lock ends with the process, however it ends.
    """
    folder = ensure_writable_dir(path, private=private)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def ensure_writable_dir(path: Path, *, private: bool = False) -> Path:
    """Make the folder `path` with its parents where absent, and a trial file in it; returns the folder.
    `private`: a folder that is made is closed to other users.

    Raises WriteError with the obstacle. Permission bits would not do: root ignores them, and a read-only mount too.
    """
    try:
        path.mkdir(0o700 if private else 0o777, parents=True, exist_ok=True)
        _open_aside(path, path / "trial").unlink()
    except WriteError:
        raise
    except OSError as error:
        raise _refusal(path, error) from error
    return path


def _target(path: Path) -> Path | None:
    """The file to replace, symbolic links followed (the link itself stays); None for a device or pipe."""
    try:
        if path.is_dir():
            raise WriteError(f"cannot write {path}: it is a directory; name a file")
        return None if path.exists() and not path.is_file() else path.resolve()
    except WriteError:
        raise
    except OSError as error:
        raise _refusal(path, error) from error


def _open_aside(path: Path, target: Path, *, mode: int = 0o666) -> Path:
    """A new empty file beside `target`; `path` is for messages. `mode` less the umask, as a plain open has it."""
    aside = target.with_name(f".{target.name[:40]}.{secrets.token_hex(6)}.part")
    try:
        aside.touch(mode, exist_ok=False)
    except OSError as error:
        raise _refusal(path, error) from error
    return aside


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refusal(path: Path, error: OSError) -> WriteError:
    """The operating system's error with what to do about it."""
    remedy = "choose another path"
    match error.errno:
        case errno.ENOENT:
            remedy = f"make the folder {path.parent} first, or choose another path"
        case errno.EEXIST | errno.ENOTDIR:
            remedy = "a file stands where a folder is needed: move it, or choose another path"
        case errno.EACCES | errno.EPERM:
            remedy = "allow this user to write there, or choose another path"
        case errno.EROFS:
            remedy = "the file system is read-only: choose another path"
        case errno.ENOSPC | errno.EDQUOT:
            remedy = "free some space, or choose another path"
    return WriteError(f"cannot write {path}: {os.strerror(error.errno or 0)}; {remedy}")
