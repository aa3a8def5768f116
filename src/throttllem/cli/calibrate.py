"""The command that makes a catalogue entry of a user's own measurements. Knows nothing of policies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import polars as pl
import typer
from rich.console import Console
from rich.table import Table

from throttllem.calibrate.calibration import Calibration, calibrate_points
from throttllem.calibrate.datasheet import with_datasheet
from throttllem.calibrate.entry import absent, basis, check_name, entry, printable, write_entry
from throttllem.calibrate.points import points_of
from throttllem.calibrate.validation import fitted_before, fitted_to, percent
from throttllem.cli.arguments import Extra, progress_bar
from throttllem.files import ensure_writable_dir
from throttllem.physics.catalogue import Catalogue, Gpu, Model, UnknownName
from throttllem.profiling.profile import ProfileError, read_profile


def calibrate(
    profile_file: Annotated[
        Path, typer.Argument(metavar="PROFILE", help="Measured iterations (docs/profile-format.md).")
    ],
    out: Annotated[Path, typer.Option("--out", help="TOML file to write, for --catalogue.")],
    name: Annotated[str | None, typer.Option("--name", help="Of the new entry; default: the profile's GPU.")] = None,
    like: Annotated[
        str | None,
        typer.Option("--like", help="GPU that lends data sheet and first guesses; default: the profile's GPU."),
    ] = None,
    sheet: Annotated[
        list[str] | None,
        typer.Option(
            "--sheet", help="key=value of the data sheet, instead of --like's; repeat. clock_max_mhz, limit_w ..."
        ),
    ] = None,
    catalogue: Extra = None,
) -> None:
    """Fit the physics to a GPU or model of your own: a catalogue entry, and its errors on what the fit did not see."""
    _check_target(out, profile_file, catalogue)
    known = Catalogue.load(catalogue)
    frame = read_profile(profile_file)
    gpu = with_datasheet(_like(known, frame, like, profile_file), sheet or ())
    model = _model(known, frame, profile_file)
    new_name = check_name(name if name is not None else str(frame["gpu"][0]))
    points = points_of(frame, model, profile_file)
    with progress_bar() as bar:
        task = bar.add_task("fitting", total=1.0)
        calibration = calibrate_points(
            points, gpu, model, profile_file, lambda done, total: bar.update(task, completed=done / total)
        )
    source_name = printable(profile_file.name)
    calibration = replace(calibration, warnings=(*fitted_before(gpu, source_name), *calibration.warnings))
    source = f"{fitted_to(source_name)}, {frame.height} rows"
    covered = basis(points, model.name, source)
    new_model = None if Catalogue.load().models.get(model.name) == model else model
    text = entry(calibration, new_name, covered, new_model)
    if not out.exists():
        ensure_writable_dir(out.absolute().parent)
    write_entry(text, out)
    _show(calibration, new_name, out)


def _like(known: Catalogue, frame: pl.DataFrame, like: str | None, file: Path) -> Gpu:
    """The GPU to start from: the one asked for, or the profile's own."""
    if like is not None:
        return known.gpu(like)
    own = str(frame["gpu"][0])
    if own not in known.gpus:
        raise ProfileError(
            f"{file}: its GPU {printable(own)!r} is not in the catalogue: name one that resembles it with --like "
            f"({', '.join(sorted(known.gpus))})"
        )
    return known.gpu(own)


def _model(known: Catalogue, frame: pl.DataFrame, file: Path) -> Model:
    try:
        return known.model(str(frame["model"][0]))
    except UnknownName as error:
        raise ProfileError(
            f"{file}: {printable(str(error))}; add it as a table [model.NAME] (layers, hidden, heads ... of its "
            f"config.json, as in docs/calibrate.md) to a TOML file, and give that with --catalogue"
        ) from error


def _check_target(out: Path, profile_file: Path, catalogue: Path | None) -> None:
    """Better now than after the fits. Folders that are missing are made only when there is something to write."""
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder; name a file")
    if _same(out, profile_file):
        raise ValueError(f"--out {out}: is the profile itself, which would be replaced; name another file")
    if catalogue is not None and _same(out, catalogue):
        raise ValueError(
            f"--out {out}: is the --catalogue file, whose other entries would be lost; name another file, and copy "
            f"the new entry over afterwards"
        )
    if not out.exists() or out.is_file():
        ensure_writable_dir(next(folder for folder in out.absolute().parents if folder.exists()))


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _show(calibration: Calibration, name: str, out: Path) -> None:
    console = Console()
    console.print(_errors_table(calibration, name))
    console.print(_constants_table(calibration))
    for warning in calibration.warnings:
        Console(soft_wrap=True, stderr=True).print(f"warning: {warning}", markup=False)
    said = f"[gpu.{name}] is in {out}: use it with --catalogue."
    if calibration.like != name:
        said += f" Memory, clocks, power limit and idle watts are those of {calibration.like} (or of --sheet)."
    Console(soft_wrap=True).print(said, markup=False)


def _errors_table(calibration: Calibration, name: str) -> Table:
    table = Table(title=f"{name}: relative errors, fitted to {calibration.rows_fitted} of {calibration.rows} rows")
    table.add_column("held out")
    table.add_column("rows", justify="right")
    for what in ("seconds", "watts"):
        for figure in ("median", "p90", "worst"):
            table.add_column(f"{what}\n{figure}", justify="right")
    for score in calibration.scores:
        cells = [percent(value) for e in (score.seconds, score.watts) for value in (e.median, e.p90, e.worst)]
        table.add_row(score.held_out, str(score.seconds.count), *cells)
    return table


def _constants_table(calibration: Calibration) -> Table:
    table = Table(title="constants of the fit")
    table.add_column("constant", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_column("+-", justify="right")
    table.add_column("determined?")
    for path, value, fitted in calibration.constants():
        if fitted is None:
            lacks = absent(calibration.gpu, path)
            said = f"no, 0 in {calibration.like}" if lacks else f"no, kept from {calibration.like}"
            table.add_row(path, f"{value:.4g}", "", said)
        else:
            said = "yes" if fitted.determined else "with others only"
            table.add_row(path, f"{value:.4g}", percent(fitted.error), said)
    return table
