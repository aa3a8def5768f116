"""`throttllem arena`: which clock policy needs least? Policies, rivals and a clairvoyant on a grid of cells."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from throttllem.cli.arguments import Extra, Json, check_target, load, write_json
from throttllem.cli.progress import progress


def arena(
    grid: Annotated[str, typer.Option("--grid", help="tuning (to set parameters on) or judging.")] = "tuning",
    cells: Annotated[
        str | None, typer.Option("--cells", help="Cells by name or group, as in '100 %,*ttft1s'; default: all.")
    ] = None,
    policies: Annotated[
        str | None,
        typer.Option(
            "--policies",
            help="Contenders besides triton: policies that simulate knows, static, static-yesterday, rivals, or a "
            "class of your own, as in package.module:Class. Default: all.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=100, help="Seeds of every cell.")] = 2,
    trace: Annotated[
        str | None, typer.Option("--trace", help="A trace file whose requests every cell takes instead.")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, max=64, help="Cells side by side.")] = None,
    catalogue: Extra = None,
    json_file: Json = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for arena.html.")] = Path("out/arena"),
    document: Annotated[
        Path | None,
        typer.Option("--document", help="Also write the tables to this Markdown file, and a picture beside."),
    ] = None,
) -> None:
    """Which clock policy needs least? Policies, rivals and a clairvoyant on a grid of cells, simulated."""
    loaded = load(flags={"catalogue": ("--catalogue", catalogue)})
    from throttllem.arena.cells import GRIDS
    from throttllem.arena.contenders import field_of
    from throttllem.arena.contest import Arena
    from throttllem.arena.results import document as text
    from throttllem.arena.results.page import write_page
    from throttllem.arena.run_cache import tree
    from throttllem.did_you_mean import did_you_mean
    from throttllem.files import ensure_writable_dir, write_aside
    from throttllem.sim.own_policy import check_name

    if grid not in GRIDS:
        raise ValueError(f"--grid {grid}: no such grid; {did_you_mean(grid, GRIDS)}")
    chosen = GRIDS[grid] if cells is None else GRIDS[grid].matching([part.strip() for part in cells.split(",")])
    ensure_writable_dir(out)
    for file in (json_file, document):
        if file:
            check_target(file)
    options = loaded.options
    whole = Arena(
        grid=chosen,
        seeds=chosen.seeds(seeds),
        field=field_of(policies, check_name),
        catalogue=options.catalogue,
        cache_dir=options.cache_dir.expanduser(),
        trace=trace,
    )
    with progress("preparing") as report:
        entries = whole.run(workers or options.workers, report)
    for line in text.terminal(entries, chosen):
        typer.echo(line)
    if json_file:
        write_json(json_file, text.results_json(entries, whole.field, tree()))
    if document:
        whole_grid = (grid, cells, policies, trace) == ("judging", None, None, None)
        given = {"--grid": grid, "--cells": cells, "--policies": policies, "--trace": trace, "--seeds": seeds}
        words = [f"{flag} {value}" for flag, value in given.items() if value is not None]
        command = "make arena" if whole_grid else f"throttllem arena {' '.join(words)}"
        with write_aside(document) as aside:
            aside.write_text(
                text.markdown(entries, chosen, command=command, tree=tree(), picture=f"{document.stem}.svg"),
                encoding="utf-8",
            )
        with write_aside(document.with_suffix(".svg")) as aside:
            aside.write_text(text.picture(entries), encoding="utf-8")
    typer.echo(f"page: {write_page(out, entries, chosen, tree())}")
