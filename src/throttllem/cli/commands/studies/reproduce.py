"""`throttllem reproduce`: the paper's claims, judged by simulation."""

from __future__ import annotations

from typing import Annotated

import typer

from throttllem.cli.arguments import Extra, Json, Seed, check_target, load, write_json
from throttllem.cli.progress import progress


def reproduce(
    trace: Annotated[str | None, typer.Option("--trace", help="Default: an hour of azure-conv-like.")] = None,
    lengths: Annotated[
        str, typer.Option("--lengths", help="How output lengths are predicted: online (as the gateway does) or oracle.")
    ] = "online",
    seed: Seed = 0,
    catalogue: Extra = None,
    json_file: Json = None,
) -> None:
    """Every claim of the throttLL'eM paper: its figure, ours, and why where they differ."""
    options = load(flags={"catalogue": ("--catalogue", catalogue)}).options
    from rich.console import Console

    from throttllem.physics.catalogue import Catalogue
    from throttllem.reproduce.run import claims_table, reproduction_json, runs_table
    from throttllem.reproduce.run import reproduce as reproduce_claims

    if lengths not in ("online", "oracle"):
        raise ValueError(f"--lengths {lengths}: must be online or oracle")
    if json_file:
        check_target(json_file)
    with progress("preparing") as report:
        found = reproduce_claims(
            Catalogue.load(options.catalogue),
            options.cache_dir.expanduser(),
            workers=options.workers,
            seed=seed,
            trace=trace,
            lengths="online" if lengths == "online" else "oracle",
            progress=report,
        )
    console = Console()
    console.print(found.headline, style="bold", highlight=False)
    console.print(claims_table(found.outcomes, console.width))
    console.print(runs_table(found.evidence))
    if json_file:
        write_json(json_file, reproduction_json(found))
