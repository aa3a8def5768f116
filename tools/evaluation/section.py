"""What one part of the evaluation found: text, tables, and everything that was measured. Knows nothing of printing.

A module of this folder is a part if it has `section(workshop: Workshop) -> Section`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DATA = ROOT / ".." / "shared" / "data"
"""Reference data lies beside the checkout, and is never part of it."""


class MissingError(Exception):
    """What a part needs is not on this machine; the text says what, and how to get it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """What a part may use: `engines` holds the environments that `make engines` installs, `folder` is empty and goes
    away afterwards, `say` shows progress, `quick` asks for the short form that only shows that everything works.
    """

    engines: Path
    folder: Path
    say: Callable[[str], None]
    quick: bool = False

    def environment(self, name: str) -> Path:
        """The virtual environment of an engine or of clients. Raises MissingError if it is not installed."""
        found = self.engines / name
        if not (found / "bin/python").exists():
            raise MissingError(f"{found} is not there: `make engines` installs it")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells as text, under one caption."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One part. `text` is Markdown: what was done and what explains the figures. `results` go into the JSON file.

    `versions` of what was measured, by name; `pictures` are names of files beside the document.
    """

    title: str
    text: str
    tables: tuple[Table, ...]
    results: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)
    pictures: tuple[str, ...] = ()
