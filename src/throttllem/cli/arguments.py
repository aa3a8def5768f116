"""Options that several commands of the command line share, and how their texts are read. Knows no command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from throttllem.config import Environment
from throttllem.files import ensure_writable_dir, write_aside
from throttllem.sim.study import MAXIMUM

Gpu = Annotated[str, typer.Option("--gpu", help="GPU of the catalogue.")]
Model = Annotated[str, typer.Option("--model", help="Model of the catalogue.")]
Tp = Annotated[int | None, typer.Option("--tp", help="GPUs of the engine (tensor parallel degree); 4 by default.")]
Sizes = Annotated[str | None, typer.Option("--sizes", help="Engine sizes instead of --tp, as in 1,2,4.")]
TraceName = Annotated[
    str,
    typer.Option(
        "--trace",
        help="CSV (Azure) or JSONL (Mooncake) file, azure-conv-like[:seconds=..], azure-code-like[..] or "
        "poisson:rate=2,input=1023,output=99,seconds=300.",
    ),
]
Extra = Annotated[Path | None, typer.Option("--catalogue", help="TOML with GPUs and models of your own.")]
Seed = Annotated[int, typer.Option("--seed", help="Same seed, same result.")]
Setting = Annotated[
    list[str] | None, typer.Option("--set", help="Any option as section.name=value, as in throttle.dwell_s=1.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result here as JSON.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for report.html.")]


def parsed_sizes(tp: int | None, sizes: str | None) -> tuple[int, ...]:
    """Engine sizes from --tp or --sizes; TP 4 where neither is given."""
    if tp is not None and sizes is not None:
        raise ValueError("--tp and --sizes: give one of them")
    if sizes is None:
        return (4 if tp is None else tp,)
    try:
        return tuple(int(size) for size in sizes.split(","))
    except ValueError:
        raise ValueError(f"--sizes {sizes}: must be whole numbers with commas between, as in 1,2,4") from None


def parsed_peak(text: str | None) -> float | str | None:
    """Requests/s, "max", or None for the trace as it is."""
    if text is None or text == MAXIMUM:
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--peak-rps {text}: must be requests per second, or {MAXIMUM}") from None


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Bars on stderr while it is a terminal; nothing otherwise."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:>24}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield bar


def check_target(json_file: Path) -> None:
    """Better now than after a long run."""
    ensure_writable_dir(json_file.absolute().parent)
    if json_file.is_dir():
        raise ValueError(f"--json {json_file}: is a folder; name a file")


def cache_dir() -> Path:
    """Where tables and characterisations are kept."""
    return Environment().cache_dir.expanduser()


def write_json(file: Path, content: dict[str, object]) -> None:
    """Whole or not at all."""
    with write_aside(file) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
