"""Opens the keeper's folders and files so that no other user decides what is read or written there.

Knows nothing of what is in them.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

# Why the whole path counts
#
# A user that may write to a folder can rename what is in it, and so put another folder or file under the same name. In
# a sticky folder (/tmp) that user cannot rename what is root's, but can be first to use the name, and can use it again
# once it was tidied up. So every folder from / on must be one that only root can write to.
#
# Each folder is opened from the descriptor of the one before, without following links, and is checked by its own
# descriptor. What was checked is what is used, whatever happens to the names meanwhile.

FILE_BYTES = 64 * 1024
"""The longest file that is read."""
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class UnsafeError(OSError):
    """Another user could decide what is read or written there."""


@contextlib.contextmanager
def open_folder(path: Path, *, make: bool = False) -> Iterator[int]:
    """The descriptor of a folder. `make`: it and its parents are made where absent, writable by this user only.

    Raises UnsafeError if another user than root (or this process's) can write to it or to a parent, or if one of them
    is a link; any other OSError as the system reports it.
    """
    here = Path("/")
    handle = os.open(here, _FOLDER)
    try:
        _check_folder(handle, here)
        for name in path.absolute().parts[1:]:
            here /= name
            inner = _opened(handle, name, here, make)
            os.close(handle)
            handle = inner
            _check_folder(handle, here)
        yield handle
    finally:
        os.close(handle)


def read_file(folder: int, name: str, path: Path) -> bytes:
    """The contents of a file of that folder. `path` is for messages. Raises UnsafeError unless it is a regular file of
    at most FILE_BYTES, under one name, that only root (or this process's user) can write to; OSError.
    """
    handle = os.open(name, _READ, dir_fd=folder)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise UnsafeError(f"{path} is no regular file, or has a second name")
        _check_owner(found, path)
        content = os.read(handle, FILE_BYTES + 1)
    finally:
        os.close(handle)
    if len(content) > FILE_BYTES:
        raise UnsafeError(f"{path} is longer than {FILE_BYTES} bytes")
    return content


def write_file(folder: int, name: str, content: bytes) -> None:
    """Replace a file of that folder as a whole; every user may read it, whatever the umask. Raises OSError."""
    part = str(Path(name).with_suffix(".part"))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(part, dir_fd=folder)
    handle = os.open(part, _WRITE, 0o644, dir_fd=folder)
    try:
        os.fchmod(handle, 0o644)
        while content:
            content = content[os.write(handle, content) :]
    finally:
        os.close(handle)
    os.rename(part, name, src_dir_fd=folder, dst_dir_fd=folder)


def keep_aside(folder: int, name: str) -> str:
    """Give a file of that folder a second name, so that it outlives its replacement; what has no second name is
    renamed. Returns the name. Raises OSError.
    """
    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    aside = f"{name}.damaged-{found.st_mtime_ns}"
    try:
        os.link(name, aside, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except FileExistsError:
        pass
    except OSError:  # a folder, or a file system without second names
        os.rename(name, aside, src_dir_fd=folder, dst_dir_fd=folder)
    return aside


def _opened(folder: int, name: str, path: Path, make: bool) -> int:
    """A folder inside of one. Raises OSError."""
    try:
        return os.open(name, _FOLDER, dir_fd=folder)
    except FileNotFoundError:
        if not make:
            raise
    except NotADirectoryError as error:
        raise UnsafeError(f"{path} is a link or no folder: name the folder itself") from error
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o755, dir_fd=folder)
    return os.open(name, _FOLDER, dir_fd=folder)


def _check_folder(handle: int, path: Path) -> None:
    _check_owner(os.fstat(handle), path)


def _check_owner(found: os.stat_result, path: Path) -> None:
    """Raises UnsafeError if another user can write there. The bits of the group also bound its access control list."""
    if found.st_uid not in (0, os.geteuid()):
        raise UnsafeError(f"{path} belongs to user {found.st_uid}: use a path that only root can write to")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(found.st_mode)
        raise UnsafeError(f"{path} has mode {mode:04o}: other users can write there; use a path that only root can")
