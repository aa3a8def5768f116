"""`throttllem calibrate`: a catalogue entry from a user's own measurements. Knows nothing of policies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from throttllem.cli.arguments import Extra, load
from throttllem.cli.progress import progress

if TYPE_CHECKING:
    import polars as pl
    from rich.table import Table

    from throttllem.calibrate.calibration import Calibration
    from throttllem.physics.catalogue import Catalogue, Gpu
    from throttllem.physics.model import Model


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
    from throttllem.calibrate.calibration import calibrate_points
    from throttllem.calibrate.datasheet import with_datasheet
    from throttllem.calibrate.entry import basis, check_name, entry, printable, write_entry
    from throttllem.calibrate.points import points_of
    from throttllem.calibrate.validation import fitted_before, fitted_to
    from throttllem.files import ensure_writable_dir
    from throttllem.physics.catalogue import Catalogue
    from throttllem.profiling.profile import read_profile

    catalogue = load(flags={"catalogue": ("--catalogue", catalogue)}).options.catalogue
    _check_target(out, profile_file, catalogue)
    known = Catalogue.load(catalogue)
    frame = read_profile(profile_file)
    gpu = with_datasheet(_like(known, frame, like, profile_file), sheet or ())
    model = _model(known, frame, profile_file)
    new_name = check_name(name if name is not None else str(frame["gpu"][0]))
    points = points_of(frame, model, profile_file)
    with progress("fitting") as report:
        calibration = calibrate_points(
            points, gpu, model, profile_file, lambda done, total: report("fitting", done / total)
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
    """The GPU to start from: the one of --like, or the profile's own."""
    from throttllem.calibrate.entry import printable
    from throttllem.gpu.boards.facts import knowing
    from throttllem.profiling.profile import ProfileError

    if like is not None:
        return known.gpu(like)
    own = str(frame["gpu"][0])
    known = knowing(known, own)
    if own not in known.gpus:
        raise ProfileError(
            f"{file}: its GPU {printable(own)!r} is not in the catalogue: name one that resembles it with --like "
            f"({', '.join(sorted(known.gpus))}); or run `throttllem doctor` on its machine: it prints the "
            "entry to add with --catalogue"
        )
    return known.gpu(own)


def _model(known: Catalogue, frame: pl.DataFrame, file: Path) -> Model:
    from throttllem.calibrate.entry import printable
    from throttllem.physics.catalogue import UnknownName
    from throttllem.profiling.profile import ProfileError

    try:
        return known.model(str(frame["model"][0]))
    except UnknownName as error:
        raise ProfileError(
            f"{file}: {printable(str(error))}; add it as a table [model.NAME] (layers, hidden, heads ... of its "
            f"config.json, as in docs/calibrate.md) to a TOML file, and give that with --catalogue"
        ) from error


def _check_target(out: Path, profile_file: Path, catalogue: Path | None) -> None:
    """Raise before the fits for a file that could not be written after them. Makes no folder yet."""
    from throttllem.files import ensure_writable_dir

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
    from rich.console import Console

    from throttllem.calibrate.errors import errors_table

    console, fitted = Console(), f"fitted to {calibration.rows_fitted} of {calibration.rows} rows"
    console.print(errors_table(calibration.scores, f"{name}: relative errors, {fitted}"))
    console.print(_constants_table(calibration))
    for warning in calibration.warnings:
        typer.echo(f"warning: {warning}", err=True)
    said = f"[gpu.{name}] is in {out}: use it with --catalogue."
    if calibration.like != name:
        said += f" Memory, clocks, power limit and idle watts are those of {calibration.like} (or of --sheet)."
    typer.echo(said)


def _constants_table(calibration: Calibration) -> Table:
    from rich.table import Table

    from throttllem.calibrate.entry import absent
    from throttllem.calibrate.errors import percent

    table = Table(title="constants of the fit")
    table.add_column("constant", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_column("+-", justify="right")
    table.add_column("determined?")
    for path, value, fitted in calibration.constants():
        if fitted is None:
            lacks = absent(calibration.gpu, path)
            said = f"no, 0 in {calibration.like}" if lacks else f"no, that of {calibration.like}"
            table.add_row(path, f"{value:.4g}", "", said)
        else:
            said = "yes" if fitted.determined else "with others only"
            table.add_row(path, f"{value:.4g}", percent(fitted.error), said)
    return table
