"""Command-line options that several commands share, and how their texts are read.

Imported before every command: numpy, pydantic and the like are imported where a command needs them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from throttllem.option_sources import Loaded

Gpu = Annotated[str, typer.Option("--gpu", help="GPU of the catalogue.")]
MODEL_HELP = "Model of the catalogue, checkpoint (OWNER/NAME), or a config.json (the file or its folder)."
Model = Annotated[str, typer.Option("--model", help=MODEL_HELP)]
KvCache = Annotated[
    str | None,
    typer.Option("--kv-cache-dtype", help="auto (the checkpoint's, default), bfloat16 or fp8."),
]
Tp = Annotated[int | None, typer.Option("--tp", help="GPUs of the engine (tensor parallel degree); 4 by default.")]
Sizes = Annotated[str | None, typer.Option("--sizes", help="Engine sizes instead of --tp, as in 1,2,4.")]
Engine = Annotated[
    str | None,
    typer.Option("--engine", help="Whose batching is simulated: vllm (default), tensorrt-llm or sglang."),
]
TraceName = Annotated[
    str,
    typer.Option(
        "--trace",
        help="CSV, JSON or Parquet file (Azure, BurstGPT, Mooncake, ServeGen, vLLM, aiperf, OpenTelemetry), or "
        "azure-conv-like[:seconds=..], azure-code-like[..], mooncake-like[..], "
        "poisson:rate=2,input=1023,output=99,seconds=300.",
    ),
]
TraceColumns = Annotated[
    str | None,
    typer.Option(
        "--columns",
        metavar="KEY=COLUMN,..",
        help="Columns of the trace file, as in arrival=t,prompt=in,generated=out,unit=ms; also status=.. Any of them.",
    ),
]
Extra = Annotated[Path | None, typer.Option("--catalogue", help="TOML file with GPUs and models of your own.")]
Seed = Annotated[int, typer.Option("--seed", help="Same seed, same result.")]
Config = Annotated[Path | None, typer.Option("--config", help="TOML file of options.")]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any option, as in throttle.dwell_s=1. Repeat."),
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result to this file as JSON.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for report.html.")]


def load(
    setting: list[str] | None = None,
    config: Path | None = None,
    flags: Mapping[str, tuple[str, object]] | None = None,
) -> Loaded:
    """The options of `--set`, `--config`, the environment and flags; former names are noted on stderr."""
    from throttllem.option_sources import load_options

    loaded = load_options(file=config, settings=setting or (), flags=flags)
    for note in loaded.notes:
        typer.echo(f"note: {note}", err=True)
    return loaded


def parsed_sizes(tp: int | None, sizes: str | None, default: int = 4) -> tuple[int, ...]:
    """Engine sizes from --tp or --sizes."""
    if tp is not None and sizes is not None:
        raise ValueError("--tp and --sizes: give one of them")
    if sizes is None:
        return (default if tp is None else tp,)
    try:
        return tuple(int(size) for size in sizes.split(","))
    except ValueError:
        raise ValueError(f"--sizes {sizes}: must be whole numbers with commas between, as in 1,2,4") from None


def parsed_engines(engines: str | None) -> dict[int, int] | None:
    """How many engines of each size, from --engines; None where it was not given."""
    if engines is None:
        return None
    try:
        found = [(int(tp), int(count)) for tp, count in (part.split(":") for part in engines.split(","))]
    except ValueError:
        found = []
    if not found or len(dict(found)) < len(found) or min(count for _, count in found) < 1:
        raise ValueError(f"--engines {engines}: must be sizes and how many of each, as in 1:4,2:1")
    return dict(found)


def parsed_duration(flag: str, text: str | None) -> float | None:
    """Seconds, or None where the flag was not given."""
    from throttllem.option_sources import seconds

    try:
        return None if text is None else seconds(text)
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from None


def check_target(json_file: Path) -> None:
    """Raise before a long run for a `--json` file that could not be written after it."""
    from throttllem.files import ensure_writable_dir

    ensure_writable_dir(json_file.absolute().parent)
    if json_file.is_dir():
        raise ValueError(f"--json {json_file}: is a folder; name a file")


def write_json(file: Path, content: dict[str, object]) -> None:
    """Write the whole file, or leave it as it was."""
    from throttllem.files import write_aside

    with write_aside(file) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
