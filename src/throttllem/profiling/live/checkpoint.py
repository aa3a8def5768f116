"""What a live profile has measured so far, on disk after every point: JSON lines beside the file that it will become.

The first line says of what it is; a line cut short by a crash is dropped. Knows nothing of engines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from throttllem.files import ensure_writable_dir

SUFFIX = ".partial"


class CheckpointError(ValueError):
    """A checkpoint that cannot be gone on from; the message says why and what would do."""


@dataclass(slots=True)
class Checkpoint:
    """`points` by key, in the order in which they were measured."""

    path: Path
    points: dict[str, list[dict[str, object]]] = field(default_factory=dict)

    def add(self, key: str, rows: list[dict[str, object]]) -> None:
        """One more point, on the disk when this returns."""
        self.points[key] = rows
        _append(self.path, {"point": key, "rows": rows})

    def done(self) -> None:
        """All is measured: nothing is left to go on with."""
        self.path.unlink(missing_ok=True)


def checkpoint_of(out: Path) -> Path:
    """Where the checkpoint of a profile lies."""
    return out.with_name(out.name + SUFFIX)


def open_checkpoint(out: Path, of: Mapping[str, object], *, resume: bool) -> Checkpoint:
    """Begin one, or go on with what is there. `of`: everything that must be the same. Raises CheckpointError."""
    path = checkpoint_of(out)
    ensure_writable_dir(path.absolute().parent)
    wanted = json.loads(json.dumps(of))
    if not path.exists():
        if resume:
            raise CheckpointError(f"--resume: there is no {path} to go on with")
        _append(path, {"of": wanted})
        return Checkpoint(path)
    if not resume:
        raise CheckpointError(f"{path} is there: --resume goes on with it; remove it to begin anew")
    return _resumed(path, wanted)


def _resumed(path: Path, wanted: dict[str, object]) -> Checkpoint:
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    try:
        first, *lines = (json.loads(line) for line in whole.splitlines())
        there = dict(first["of"])
        points = {str(line["point"]): list(line["rows"]) for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is no checkpoint of a profile; remove it to begin anew") from error
    other = [
        f"{name} {there.get(name)!r} there, {wanted.get(name)!r} now"
        for name in sorted(there.keys() | wanted.keys())
        if there.get(name) != wanted.get(name)
    ]
    if other:
        raise CheckpointError(f"{path}: is of another engine or plan: {'; '.join(other)}")
    if len(whole) < len(text):
        os.truncate(path, len(whole))
    return Checkpoint(path, points)


def _append(path: Path, line: Mapping[str, object]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, separators=(",", ":")) + "\n")
        file.flush()
        os.fsync(file.fileno())
