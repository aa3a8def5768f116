"""What a measurement found: text, tables and every figure; as a Markdown document, a JSON file and on a terminal.

Knows nothing of what was measured.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from throttllem.files import write_aside
from tools.testbed import processes

ROOT = processes.ROOT
DATA = ROOT / ".." / "shared" / "data"
"""Reference data lies beside the checkout, and is never part of it."""


class MissingError(Exception):
    """This machine lacks something that a measurement needs; the text names it, and how to get it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """What a measurement may use. `engines` holds the environments that `make engines` installs; `folder` is empty and
    removed afterwards; `report` shows progress; `quick` asks for a short form that only shows that everything works.
    """

    engines: Path
    folder: Path
    report: Callable[[str], None]
    quick: bool = False

    def environment(self, name: str) -> Path:
        """The virtual environment of an engine or of clients. Raises MissingError if it is not installed."""
        found = self.engines / name
        if not (found / "bin/python").exists():
            raise MissingError(f"{found} does not exist: `make engines` installs it")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells as text, under one caption."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One measurement. `text` is Markdown: what was done, what explains the figures. `results` go into the JSON file.

    `versions` of what was measured, by name; `pictures` are names of files beside the document.
    """

    title: str
    text: str
    tables: tuple[Table, ...]
    results: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)
    pictures: tuple[str, ...] = ()


def write_results(section: Section, file: Path) -> None:
    """Every figure, as JSON."""
    whole = {"title": section.title, "machine": machine(), "versions": dict(section.versions), **section.results}
    _write(file, json.dumps(whole, indent=1, default=str) + "\n")


def write_document(section: Section, file: Path, *, command: str) -> None:
    """The text and tables as Markdown. `command` repeats the measurement."""
    versions = ", ".join(f"{name} {version}" for name, version in section.versions.items())
    made = f"Written by `{command}`. Measured on {machine()}{f'; {versions}' if versions else ''}."
    pictures = [f"![{section.title}]({name})" for name in section.pictures]
    parts = [f"# {section.title}", made, section.text.strip(), *map(_markdown, section.tables), *pictures]
    _write(file, "\n\n".join(part for part in parts if part) + "\n")


def print_table(table: Table, console: Console) -> None:
    """One table on a terminal."""
    grid = Grid(*table.head, title=table.caption)
    for row in table.rows:
        grid.add_row(*row)
    console.print(grid)


def machine() -> str:
    """The machine in a sentence, without names: cores, processor, memory, interpreter."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores ({_processor()}), {memory:.0f} GiB, Linux, Python {platform.python_version()}, no GPU"


def version_of(environment: Path, package: str) -> str:
    """The version of a package in a virtual environment."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([environment / "bin/python", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def markdown_rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def replace_between(document: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marks. Raises ValueError where the document lacks them."""
    before, found_begin, rest = document.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{document}: the marks {begin} and {end} are missing; put them where the tables belong")
    _write(document, f"{before}{begin}\n\n{text}\n{end}{after}")


def _markdown(table: Table) -> str:
    return f"{table.caption}\n\n{markdown_rows(table.head, table.rows)}"


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(file) as aside:
        aside.write_text(text)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
