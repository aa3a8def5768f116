"""Sections as Markdown documents and JSON files. Knows nothing of what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from throttllem.files import write_aside
from tools.evaluation.section import Section, Table


def write_results(section: Section, file: Path, *, machine: str) -> None:
    """Every figure, as JSON."""
    whole = {"title": section.title, "machine": machine, "versions": dict(section.versions), **section.results}
    _write(file, json.dumps(whole, indent=1, default=str) + "\n")


def write_document(section: Section, file: Path, *, machine: str, command: str) -> None:
    """The tables, with what was measured on what."""
    _write(file, markdown(section, machine=machine, command=command))


def markdown(section: Section, *, machine: str, command: str) -> str:
    """The document's text."""
    versions = ", ".join(f"{name} {version}" for name, version in section.versions.items())
    made = f"Written by `{command}`. Measured on {machine}{f'; {versions}' if versions else ''}."
    pictures = [f"![{section.title}]({name})" for name in section.pictures]
    parts = [f"# {section.title}", made, section.text.strip(), *map(_table, section.tables), *pictures]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(table: Table) -> str:
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return f"{table.caption}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(file) as aside:
        aside.write_text(text)
