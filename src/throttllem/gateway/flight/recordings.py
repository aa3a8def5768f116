"""The folder of flight records: names, the build that a header states, which files are removed when.

Knows nothing of events.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import throttllem.core

SCHEMA = 2
"""2: the controller plans clocks when a `Timer` comes, no longer with the event before it."""
_SUFFIX = re.compile(r"-(\d{8}T\d{6}Z)-(\d{4,})\.jsonl")


class Recordings:
    """The records of one model in a folder: the last `files` of them remain, those of earlier starts included."""

    def __init__(self, folder: Path, model: str, files: int) -> None:
        self._folder = folder
        self._name = safe_name(model)
        self._files = files
        self._stamp: str | None = None
        self._number = 0

    def next_path(self) -> Path:
        """A file that is not there yet: the model's name, when the first of them was begun (UTC), and a number."""
        if self._stamp is None:
            self._stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        while True:
            self._number += 1
            path = self._folder / f"{self._name}-{self._stamp}-{self._number:04d}.jsonl"
            if not path.exists():
                return path

    def remove_old(self, current: Path) -> None:
        """Remove the oldest files above the limit, never `current`, and the tables that only they named."""
        found = [path for path in self._folder.glob("*.jsonl") if self._order(path) and path != current]
        found.sort(key=lambda path: self._order(path) or ("", 0))
        gone: set[str] = set()
        for path in found[: max(0, len(found) + 1 - self._files)]:
            gone |= _tables_of(path)
            path.unlink(missing_ok=True)
        if gone:
            for path in self._folder.glob("*.jsonl"):
                gone -= _tables_of(path)
            for digest in sorted(gone):
                table_path(self._folder, digest).unlink(missing_ok=True)

    def _order(self, path: Path) -> tuple[str, int] | None:
        """Start and number of a file of this model; None: it is of another model."""
        match = _SUFFIX.fullmatch(path.name.removeprefix(self._name))
        return (match[1], int(match[2])) if match and path.name.startswith(self._name) else None


def safe_name(model: str) -> str:
    """The model's name as a file name may hold it; names that had to be changed stay different by their digest."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", model).lstrip(".-")[:80]
    if safe and safe == model:
        return safe
    return f"{safe or 'model'}-{hashlib.sha256(model.encode(errors='replace')).hexdigest()[:8]}"


def table_path(folder: Path, digest: str) -> Path:
    """The file of a performance table, beside the records that name it."""
    return folder / f"table-{digest}.npz"


def write_all(handle: int, text: bytes) -> None:
    """Write all of it; the system may take less at a time."""
    left = memoryview(text)
    while left:
        left = left[os.write(handle, left) :]


def _tables_of(path: Path) -> set[str]:
    """Digests that the header of a record names; none where it cannot be read."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError), path.open("rb") as file:
        # What the controller knows comes last and may be megabytes long.
        front, mark, _ = (line := file.readline()).partition(b'"options":')
        tables = json.loads(front.rstrip(b" ,") + b"}" if mark else line)["tables"]
        return {
            digest for digest in tables.values() if isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{16}", digest)
        }
    return set()


@cache
def build() -> str:
    """The version, and a digest of the core's source files: with the same core the same commands must come."""
    digest, core = hashlib.sha256(), Path(throttllem.core.__path__[0])
    for path in sorted(core.rglob("*.py")):
        digest.update(str(path.relative_to(core)).encode() + b"\0" + path.read_bytes())
    try:
        number = version("throttllem")
    except PackageNotFoundError:
        number = "unknown"
    return f"{number}+core.{digest.hexdigest()[:12]}"


def made_with() -> dict[str, str]:
    """What else may move the last bit of a number: Python, numpy and the processor's kind."""
    return {"python": platform.python_version(), "numpy": version("numpy"), "machine": platform.machine()}
