"""Sections on a terminal. Knows nothing of what they compare."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tools.fidelity.section import Section


def print_section(console: Console, section: Section, *, constants: bool) -> None:
    """Errors, then targets; with `constants`, what the fit gives, by GPU."""
    table = Table("error of", "held out", "points", "mean", "median", "p90", "worst", title=section.title)
    for row in section.rows:
        errors = row.errors
        figures = (f"{figure:.1%}" for figure in (errors.mean, errors.median, errors.p90, errors.worst))
        table.add_row(row.what, row.held_out, f"{errors.count:,}", *figures)
    console.print(table)
    for target in section.targets:
        verdict = "[green]met[/]" if target.met else "[red]not met[/]"
        console.print(f"  {verdict}  {target.what}: {target.found} (target {target.limit})")
    if constants:
        for gpu, values in section.constants.items():
            console.print(f"  {gpu}: " + ", ".join(f"{path} = {value:.4g}" for path, value in values.items()))


def print_verdict(console: Console, sections: Sequence[Section]) -> None:
    """How many targets are met, and those that are not."""
    targets = [target for section in sections for target in section.targets]
    missed = [target for target in targets if not target.met]
    console.print(f"{len(targets) - len(missed)} of {len(targets)} targets met")
    for target in missed:
        console.print(f"  [red]not met[/]: {target.what}: {target.found} (target {target.limit})")
