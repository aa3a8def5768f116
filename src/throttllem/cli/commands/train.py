"""`throttllem train`: performance tables from a profile, and a verdict on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from throttllem.cli.arguments import Config, Extra, Setting, load, write_json
from throttllem.cli.progress import progress

if TYPE_CHECKING:
    import polars as pl

    from throttllem.config import Options
    from throttllem.core.forecast.performance_table import TableVerdict

BELOW = 1
"""Exit code of tables that no clock may be set by."""


def train(
    profile_file: Annotated[Path, typer.Argument(metavar="PROFILE", help="What `profile` wrote, or a real engine's.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the tables and score_card.json.")],
    accept: Annotated[
        bool, typer.Option("--accept", help="Overrule the verdict: clocks may be set by these tables all the same.")
    ] = False,
    catalogue: Extra = None,
    config: Config = None,
    setting: Setting = None,
) -> None:
    """Train the performance model on a profile: a table for each engine size, a score card and a verdict.

    Of a quick profile the table is that of a law calibrated on it. Exit code 1: no clock may be set by a table
    (docs/profile-format.md); it is written all the same.
    """
    options = load(setting, config, {"catalogue": ("--catalogue", catalogue)}).options
    from dataclasses import replace

    from rich.console import Console

    from throttllem.engines.simulated.fleet import build_fleet
    from throttllem.files import ensure_writable_dir
    from throttllem.gpu.boards.facts import knowing
    from throttllem.physics.catalogue import Catalogue
    from throttllem.profiling.bake import bake
    from throttllem.profiling.profile import is_quick, read_profile, spec_of
    from throttllem.profiling.score import score_profile, score_table, write_score_card
    from throttllem.profiling.storage import save_table
    from throttllem.profiling.train import train as train_trees
    from throttllem.profiling.verdict import judge

    frame = read_profile(profile_file)
    ensure_writable_dir(out)
    if is_quick(frame):
        return _train_quick(frame, profile_file, out, options, accept=accept)
    first = frame.row(0, named=True)
    sizes = tuple(sorted(set(frame["tp"].to_list())))
    known = knowing(Catalogue.load(options.catalogue), first["gpu"])
    fleet = build_fleet(known, first["gpu"], first["model"], sizes, options.batching)
    with progress("training") as report:
        trained = train_trees(frame)
        report("training", 0.2)
        tables = {tp: bake(trained, spec_of(frame, fleet.specs[tp])) for tp in fleet.sizes}
        report("scoring", 0.3)
        card = score_profile(frame, on_progress=lambda done, total: report("scoring", 0.3 + 0.7 * done / total))
    verdicts = {tp: judge(frame, card, fleet.physics[tp], accept=accept) for tp in fleet.sizes}
    model = known.model(first["model"]).model_dump_json()
    for tp, verdict in verdicts.items():
        table = replace(tables[tp], verdict=verdict, gpu=str(first["gpu"]), model=model)
        save_table(table, out / f"table-tp{tp}.npz")
    write_score_card(card, out / "score_card.json")
    Console().print(score_table(card) if card.scores else "too few rows to hold any out: there are no scores")
    Console().print(f"tables and score_card.json in {out}")
    if unmeasured := [str(tp) for tp in fleet.sizes if tp not in trained.clocks_measured]:
        typer.echo(
            f"tp {', '.join(unmeasured)}: the clock axis was not measured (a profile without --gpus, or of one clock): "
            "with this table `serve` stays at the maximum clock, and refuses to set clocks of GPUs, also in a dry run; "
            "for that, profile again with --gpus and --clocks"
        )
    _conclude(verdicts)


def _conclude(verdicts: Mapping[int, TableVerdict]) -> None:
    """The verdicts in words, and the exit code."""
    for tp, verdict in verdicts.items():
        _say(tp, verdict)
    if not all(verdict.sound for verdict in verdicts.values()):
        raise typer.Exit(BELOW)


def _say(tp: int, verdict: TableVerdict) -> None:
    """The verdict in words."""
    for doubt in verdict.doubts:
        typer.echo(f"verdict, tp {tp}: to be known: {doubt}")
    if not verdict.faults:
        typer.echo(f"verdict, tp {tp}: sound")
        return
    ending = "accepted with --accept: clocks may be set by it all the same"
    if not verdict.accepted:
        ending = "`serve --clocks on` refuses this table: profile again, or overrule the verdict with --accept"
    for fault in verdict.faults:
        typer.echo(f"verdict, tp {tp}: {fault}")
    typer.echo(f"verdict, tp {tp}: {ending}")


def _train_quick(frame: pl.DataFrame, file: Path, out: Path, options: Options, *, accept: bool) -> None:
    """The table of a law calibrated on a quick profile, beginning with the profile's own GPU of the catalogue."""
    from dataclasses import replace

    from rich.console import Console

    from throttllem.calibrate.errors import errors_table
    from throttllem.calibrate.quick import quick_law, quick_table
    from throttllem.engines.simulated.fleet import build_fleet
    from throttllem.gpu.boards.facts import knowing
    from throttllem.physics.catalogue import Catalogue
    from throttllem.profiling.profile import spec_of, switches_of
    from throttllem.profiling.storage import save_table
    from throttllem.profiling.verdict import judge_law

    first = frame.row(0, named=True)
    known = knowing(Catalogue.load(options.catalogue), first["gpu"])
    if frame["tp"].n_unique() > 1:
        raise ValueError(f"{file}: a quick profile is of one engine size; train those of several one by one")
    tp = int(first["tp"])
    fleet = build_fleet(known, first["gpu"], first["model"], (tp,), options.batching)
    gpu, model, spec = known.gpu(first["gpu"]), known.model(first["model"]), spec_of(frame, fleet.specs[tp])
    with progress("calibrating") as report:
        law = quick_law(frame, gpu, model, file, lambda done, total: report("calibrating", 0.5 * done / total))
        table = quick_table(law, model, spec, lambda done, total: report("tabulating", 0.5 + 0.5 * done / total))
    verdict = judge_law(frame, law.mean_errors, fleet.physics[tp], accept=accept)
    switches = switches_of(frame, tp)
    table = replace(table, verdict=verdict, gpu=gpu.name, model=model.model_dump_json(), switches=switches)
    save_table(table, out / f"table-tp{tp}.npz")
    write_json(out / "score_card.json", law.to_json())
    console = Console()
    console.print(errors_table(law.scores, f"{model.name} on {gpu.name}: relative errors of the calibrated law"))
    stated = table.calibrated
    assert stated is not None
    console.print(
        f"table and score_card.json in {out}: calibrated at {', '.join(map(str, law.clocks_mhz))} MHz, not measured at "
        f"every clock. serve reserves at least {stated.seconds_error:.1%} of each SLO for its error and sets no clock "
        f"below {law.clocks_mhz[0]} MHz"
    )
    _conclude({tp: verdict})
