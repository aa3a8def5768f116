"""`throttllem profile`: iterations of an engine, simulated or live, measured into a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from throttllem.cli.arguments import (
    MODEL_HELP,
    Config,
    Extra,
    Seed,
    Setting,
    Sizes,
    load,
    parsed_duration,
    parsed_sizes,
)
from throttllem.cli.progress import progress

if TYPE_CHECKING:
    from throttllem.config import EngineEntry, Options
    from throttllem.engines.base import RemoteOptions
    from throttllem.engines.openai import OpenaiEngine
    from throttllem.engines.simulated.fleet import Fleet
    from throttllem.engines.triton.engine import TritonEngine
    from throttllem.physics.catalogue import Catalogue
    from throttllem.profiling.live.plan import LivePlan
    from throttllem.profiling.live.profiler import Device

CAPACITIES = ("max_batch", "max_context_tokens", "kv_blocks", "block_tokens")


def profile(
    out: Annotated[Path, typer.Argument(help="CSV or Parquet file to write.")],
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="GPU of the catalogue; default: the kind of --gpus, else a100-40gb-sxm."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help=f"{MODEL_HELP} With --url: what the engine reports."),
    ] = None,
    tp: Annotated[
        int | None, typer.Option("--tp", help="GPUs of the engine (tensor parallel degree); 4, with --url 1.")
    ] = None,
    sizes: Sizes = None,
    rows: Annotated[int | None, typer.Option("--rows", help="Iterations measured of each size; default 30000.")] = None,
    seed: Seed = 0,
    catalogue: Extra = None,
    config: Config = None,
    setting: Setting = None,
    url: Annotated[str | None, typer.Option("--url", help="Measure the live engine at this address.")] = None,
    engine_kind: Annotated[
        str | None, typer.Option("--engine-kind", help="With --url: openai (default) or triton.")
    ] = None,
    served_as: Annotated[str | None, typer.Option("--served-as", help="The live engine's name of the model.")] = None,
    stats: Annotated[str | None, typer.Option("--stats", help="Where vLLM's plug-in sends its steps.")] = None,
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", help="tokenizer.json of the live engine.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="File with the key of the live engine.")
    ] = None,
    capacity: Annotated[
        list[str] | None,
        typer.Option("--capacity", help="What the live engine does not report, as in max_batch=64. Repeat."),
    ] = None,
    clocks: Annotated[
        str | None, typer.Option("--clocks", help="With --url: MHz, as in 1410,1050; default: 8 of them.")
    ] = None,
    gpus: Annotated[str | None, typer.Option("--gpus", help="With --url: its GPUs here; their clocks are set.")] = None,
    keeper: Annotated[Path | None, typer.Option("--keeper", help="With --gpus: the keeper's socket.")] = None,
    seconds: Annotated[
        str | None,
        typer.Option("--seconds", metavar="DURATION", help="With --url: begin no point after this time, as in 10m."),
    ] = None,
    points: Annotated[
        int | None, typer.Option("--points", help="With --url: number of points; 60 without --seconds.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="With --url and --gpus: ten minutes, 4 clocks; `train` calibrates a law on it."),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="With --url: continue the last run.")] = False,
) -> None:
    """Measure engines, simulated or live, over batch, KV, prompt tokens and clock (docs/profile-format.md)."""
    if quick and (url is None or gpus is None or points is not None):
        raise ValueError(
            "--quick: a few batches at a few clocks of real GPUs: it needs --url and --gpus, and no --points"
        )
    key = None if api_key_file is None else api_key_file.read_text(encoding="utf-8").strip()
    loaded = load(
        setting,
        config,
        {
            "engines.0.kind": ("--engine-kind", engine_kind or ("openai" if url else None)),
            "engines.0.url": ("--url", url),
            "engines.0.served_as": ("--served-as", served_as),
            "engines.0.stats": ("--stats", stats),
            "engines.0.tokenizer": ("--tokenizer", tokenizer),
            "engines.0.api_key": ("--api-key-file", key),
            "engines.0.gpu": ("--gpu", gpu),
            "engines.0.gpus": ("--gpus", gpus),
            **({"engines.0.tp": ("--tp", tp)} if url else {}),
            **_capacities(capacity or []),
            "clocks.keeper": ("--keeper", keeper),
            "catalogue": ("--catalogue", catalogue),
        },
    )
    from throttllem.engines.simulated.fleet import build_fleet
    from throttllem.physics.catalogue import Catalogue

    options, entry = loaded.options, loaded.options.engines[0]
    known = Catalogue.load(options.catalogue)
    if entry.url is None:
        fleet = build_fleet(known, entry.kind_of_gpu, model or "llama-2-13b", parsed_sizes(tp, sizes), options.batching)
        return _profile_simulated(fleet, rows, seed, out)
    size = parsed_sizes(tp, sizes, default=entry.tp)
    known, kind = _boards(known, entry)
    model = model or entry.model or _reported_model(known, kind, size, entry, options)
    fleet = build_fleet(known, kind, model, size, options.batching)
    engine, device = _live(fleet, entry, options, clocks, quick=quick)
    plan = _plan(points, parsed_duration("--seconds", seconds), seed, quick=quick)
    return _profile_live(engine, device, plan, out, resume=resume, served_as=entry.served_as)


def _boards(known: Catalogue, entry: EngineEntry) -> tuple[Catalogue, str]:
    """The kind of the GPUs, and the catalogue with it."""
    from throttllem.gpu.boards.facts import kind_of

    if entry.gpus is None:
        return known, entry.kind_of_gpu
    kind = kind_of(entry.gpus, entry.gpu, known)
    for note in kind.notes:
        typer.echo(f"note: {note}", err=True)
    return known.having(kind.gpu), kind.gpu.name


def _capacities(texts: list[str]) -> dict[str, tuple[str, object]]:
    """The options that `--capacity name=value` sets. Raises ValueError."""
    found: dict[str, tuple[str, object]] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in CAPACITIES or not value:
            raise ValueError(f"--capacity {text}: write NAME=N, as in kv_blocks=4096; names: {', '.join(CAPACITIES)}")
        found[f"engines.0.{name}"] = ("--capacity", value)
    return found


def spelled(*keys: str) -> str:
    """How this command sets options of the engine, for errors and notes."""
    from throttllem.engines.base import in_configuration

    capacities = {key: f"--capacity {key}=N" for key in CAPACITIES}
    known = {"stats": "--stats SOCKET", "tokenizer": "--tokenizer FILE", "model": "--model NAME", **capacities}
    return " ".join(known.get(key) or in_configuration(key) for key in keys)


def _live(
    fleet: Fleet, entry: EngineEntry, options: Options, clocks: str | None, *, quick: bool
) -> tuple[OpenaiEngine | TritonEngine, Device]:
    from throttllem.engines.remote import remote_engine
    from throttllem.profiling.live.run import chosen_clocks, engine_spec, live_device, quick_clocks

    if quick and clocks is None:
        wanted = quick_clocks(fleet.physics[fleet.sizes[0]].gpu)
    else:
        wanted = chosen_clocks(fleet.clocks_mhz, clocks)
    assert entry.url is not None
    device = live_device(fleet, wanted, entry.gpus, options.clocks.keeper, entry.url)
    return remote_engine(_remote(entry), engine_spec(fleet)), device


def _remote(entry: EngineEntry) -> RemoteOptions:
    from throttllem.engines.base import RemoteOptions
    from throttllem.profiling.live.run import SCRAPE_S

    assert entry.url is not None
    assert entry.kind != "simulated"
    return RemoteOptions(
        url=entry.url,
        kind=entry.kind,
        served_as=entry.served_as,
        stats=entry.stats,
        stats_secret=entry.stats_secret,
        tokenizer=entry.tokenizer,
        metrics_url=entry.metrics_url,
        api_key=entry.api_key,
        scrape_s=SCRAPE_S,
        max_batch=entry.max_batch,
        max_context_tokens=entry.max_context_tokens,
        kv_blocks=entry.kv_blocks,
        block_tokens=entry.block_tokens,
        flags=spelled,
    )


def _reported_model(known: Catalogue, gpu: str, size: tuple[int, ...], entry: EngineEntry, options: Options) -> str:
    """The name of the model that the engine says it serves. Raises ValueError where its figures are not known."""
    import asyncio

    from throttllem.engines.base import EngineError
    from throttllem.engines.remote import remote_engine
    from throttllem.engines.simulated.fleet import fleet_without_model
    from throttllem.profiling.live.run import engine_spec

    engine = remote_engine(_remote(entry), engine_spec(fleet_without_model(known, gpu, size, options.batching)))

    async def names() -> tuple[str, ...]:
        try:
            connected = await engine.connect()
        finally:
            await engine.close()
        return tuple(dict.fromkeys((*connected.roots, *connected.models)))

    try:
        served = asyncio.run(names())
    except EngineError as error:
        raise ValueError(str(error)) from error
    found = known.reported(served)
    if found is None:
        raise ValueError(
            f"the engine serves {', '.join(served)}, whose figures are not known: give --model, a name of the "
            "catalogue or the model's config.json"
        )
    typer.echo(f"model {found.name}, as the engine reports: {found.described}", err=True)
    return found.name


def _plan(points: int | None, seconds: float | None, seed: int, *, quick: bool) -> LivePlan:
    from throttllem.profiling.live.plan import POINTS, LivePlan, quick_plan

    if quick:
        return quick_plan(seconds, seed)
    return LivePlan(points=POINTS if seconds is None and points is None else points, seconds=seconds, seed=seed)


def _profile_simulated(fleet: Fleet, rows: int | None, seed: int, out: Path) -> None:
    from throttllem.profiling.measure import ProfilePlan
    from throttllem.profiling.profile import write_profile
    from throttllem.profiling.tables import profile_fleet

    plan = ProfilePlan(seed=seed) if rows is None else ProfilePlan(rows=rows, seed=seed)
    with progress("profiling") as report:
        frame = profile_fleet(fleet, plan, report)
    write_profile(frame, out)
    typer.echo(f"{frame.height} iterations in {out}")


def _profile_live(
    engine: OpenaiEngine | TritonEngine,
    device: Device,
    plan: LivePlan,
    out: Path,
    *,
    resume: bool,
    served_as: str | None,
) -> None:
    import asyncio
    import contextlib

    from throttllem.engines.base import EngineError
    from throttllem.gpu.hardware import HardwareGpu
    from throttllem.profiling.live.run import profile_live
    from throttllem.profiling.profile import check_ending

    check_ending(out)
    with progress("connecting") as report:

        async def measured() -> int:
            async with contextlib.AsyncExitStack() as stack:
                stack.push_async_callback(engine.close)
                if isinstance(device.gpu, HardwareGpu):
                    await stack.enter_async_context(device.gpu)
                return await profile_live(
                    engine,
                    device,
                    plan,
                    out,
                    resume=resume,
                    served_as=served_as,
                    say=lambda line: typer.echo(line, err=True),
                    progress=report,
                )

        try:
            rows = asyncio.run(measured())
        except EngineError as error:
            raise ValueError(str(error)) from error
    typer.echo(f"{rows} rows in {out}")
