"""`throttllem replay`: feeds a flight record to this build. Exit code 0: the same commands, 1: others, 2: no record."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from throttllem.cli.arguments import Json, check_target, write_json
from throttllem.cli.progress import progress
from throttllem.cli.terminal import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from throttllem.gateway.flight.replay import Difference, ReplayResult


def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Flight record that `serve` wrote (docs/replay.md).")],
    json_file: Json = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing; the exit code is the result.")] = False,
) -> None:
    """Feed a flight record to this build: the same commands, or the first difference."""
    from throttllem.gateway.flight.replay import replay as replay_file

    if json_file:
        check_target(json_file)
        if json_file.exists() and file.exists() and json_file.samefile(file):
            raise ValueError(f"--json {json_file}: is the record itself, which would be replaced; name another file")
    with progress("replaying", quiet=quiet) as report:
        result = replay_file(file, progress=lambda share: report("replaying", share))
    if not quiet:
        _show(result)
    if json_file:
        write_json(json_file, result_json(result))
    if result.first_difference:
        raise typer.Exit(1)


def result_json(result: ReplayResult) -> dict[str, object]:
    """The whole result; `same` sums it up."""
    found = asdict(result) | {"file": str(result.file), "same": result.first_difference is None}
    return {"schema": 1, **found}


def _show(result: ReplayResult) -> None:
    from rich.console import Console

    console, aside = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
    for doubt in result.doubts:
        aside.print(f"warning: {printable(doubt)}", markup=False, highlight=False)
    if result.cut_off:
        aside.print("warning: the file ends within a line (cut off): that line is left out", markup=False)
    console.print(_counts(result))
    took = f"{sum(result.events.values()):,} events over {result.recorded_s:,.1f} s, replayed in {result.seconds:.2f} s"
    if result.first_difference is None:
        console.print(f"the same commands: {took}", markup=False, highlight=False)
        return
    _show_difference(console, result.first_difference)
    console.print(f"record and build part there: {took}", markup=False, highlight=False)


def _counts(result: ReplayResult) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(f"{result.model}, policy {result.policy}, build {result.build}")))
    for name in ("event", "command"):
        table.add_column(name)
        table.add_column("count", justify="right")
    events, commands = list(result.events.items()), list(result.commands.items())
    for index in range(max(len(events), len(commands))):
        cells = [pair for some in (events, commands) for pair in (some[index] if index < len(some) else ("", ""))]
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else Text(printable(cell)) for cell in cells))
    return table


def _show_difference(console: Console, found: Difference) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(f"line {found.line}, at {found.at_s!r} s, event {json.dumps(found.event)}", markup=False)
    recorded = ["handle raised"] if found.recorded is None else [json.dumps(command) for command in found.recorded]
    ours = (
        [printable(f"handle raised {found.error}")]
        if found.ours is None
        else [json.dumps(command) for command in found.ours]
    )
    table = Table()
    table.add_column("recorded", overflow="fold")
    table.add_column("this build", overflow="fold")
    for index in range(max(len(recorded), len(ours), 1)):
        left, right = (some[index] if index < len(some) else "-" for some in (recorded, ours))
        table.add_row(Text(left), Text(right, style="" if left == right else "bold"))
    console.print(table)
