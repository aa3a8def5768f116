"""The commands about engines: characterize, profile, train, estimate. Knows nothing of policies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from throttllem.cli.arguments import (
    Extra,
    Gpu,
    Json,
    Model,
    Seed,
    Setting,
    Sizes,
    Tp,
    TraceName,
    cache_dir,
    check_target,
    parsed_sizes,
    progress_bar,
    write_json,
)
from throttllem.config import Options, changed
from throttllem.core.types import Slo
from throttllem.engines.base import EngineError, Kind, RemoteOptions
from throttllem.engines.http import check_address
from throttllem.engines.openai import OpenaiEngine
from throttllem.engines.remote import KINDS, remote_engine
from throttllem.engines.simulated.fleet import Fleet, build_fleet
from throttllem.engines.triton.engine import TritonEngine
from throttllem.files import ensure_writable_dir
from throttllem.gpu.hardware import HardwareGpu
from throttllem.gpu.keeper_client import SOCKET
from throttllem.physics.catalogue import Catalogue
from throttllem.physics.engine import EnginePhysics
from throttllem.physics.estimate import estimate as estimate_point
from throttllem.profiling.bake import bake
from throttllem.profiling.live.plan import POINTS, LivePlan
from throttllem.profiling.live.profiler import Device
from throttllem.profiling.live.run import SCRAPE_S, chosen_clocks, engine_spec, live_device, profile_live
from throttllem.profiling.measure import ProfilePlan
from throttllem.profiling.profile import check_ending, read_profile, spec_of, write_profile
from throttllem.profiling.score import score_profile, score_table, write_score_card
from throttllem.profiling.storage import save_table
from throttllem.profiling.tables import profile_fleet
from throttllem.profiling.train import train as train_trees
from throttllem.sim.characterize import capacities
from throttllem.sim.traces import load_trace


def characterize(
    gpu: Gpu = "a100-40gb-sxm",
    model: Model = "llama-2-13b",
    tp: Tp = None,
    sizes: Sizes = None,
    trace: TraceName = "azure-conv-like",
    slo_e2e: Annotated[float | None, typer.Option("--slo-e2e", help="Seconds that p99 E2E must keep.")] = None,
    slo_tbt: Annotated[float, typer.Option("--slo-tbt", help="Seconds that p99 of the mean TBT must keep.")] = 0.2,
    seed: Seed = 0,
    catalogue: Extra = None,
    setting: Setting = None,
    json_file: Json = None,
) -> None:
    """What can each engine bear at the top clock, and how slow is it then? (maximum load, E2E SLO)"""
    options = changed(Options(), setting or [])
    if json_file:
        check_target(json_file)
    fleet = build_fleet(Catalogue.load(catalogue), gpu, model, parsed_sizes(tp, sizes), options.engine)
    lengths = load_trace(trace, seed=seed)
    with progress_bar() as bar:
        task = bar.add_task("characterising", total=1.0)
        found = capacities(
            fleet,
            lengths,
            options,
            cache_dir(),
            seed=seed,
            slo=Slo(e2e_s=slo_e2e, tbt_s=slo_tbt),
            progress=lambda what, share: bar.update(task, completed=share),
        )
    table = Table("TP", "max load req/s", "E2E p99 s", "TBT p99 ms", "tokens/J", "never fits")
    for capacity in found.values():
        table.add_row(
            str(capacity.tp),
            f"{capacity.max_rps:.2f}",
            f"{capacity.e2e_p99_s:.1f}",
            f"{capacity.tbt_p99_s * 1e3:.0f}",
            f"{capacity.tokens_per_joule:.3f}",
            f"{capacity.rejected:.1%}",
        )
    Console().print(table)
    if json_file:
        write_json(json_file, {"schema": 1, "capacities": [asdict(capacity) for capacity in found.values()]})


def profile(
    out: Annotated[Path, typer.Argument(help="CSV or Parquet file to write.")],
    gpu: Gpu = "a100-40gb-sxm",
    model: Annotated[
        str | None, typer.Option("--model", help="Model of the catalogue; llama-2-13b, with --url llama-3-8b.")
    ] = None,
    tp: Tp = None,
    sizes: Sizes = None,
    rows: Annotated[int, typer.Option("--rows", help="Iterations measured of each size.")] = ProfilePlan().rows,
    seed: Seed = 0,
    catalogue: Extra = None,
    setting: Setting = None,
    url: Annotated[str | None, typer.Option("--url", help="Measure the live engine there.")] = None,
    engine_kind: Annotated[str, typer.Option("--engine-kind", help="With --url: openai or triton.")] = "openai",
    served_as: Annotated[str | None, typer.Option("--served-as", help="What the live engine calls the model.")] = None,
    stats: Annotated[str | None, typer.Option("--stats", help="Where vLLM's plug-in sends its steps.")] = None,
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", help="tokenizer.json of the live engine.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="File with the key of the live engine.")
    ] = None,
    capacity: Annotated[
        list[str] | None, typer.Option("--capacity", help="What the live engine does not tell, as in max_batch=64.")
    ] = None,
    clocks: Annotated[
        str | None, typer.Option("--clocks", help="With --url: MHz, as in 1410,1050; default: 8 of them.")
    ] = None,
    gpus: Annotated[str | None, typer.Option("--gpus", help="With --url: its GPUs here; their clocks are set.")] = None,
    keeper: Annotated[Path, typer.Option("--keeper", help="With --gpus: the keeper's socket.")] = SOCKET,
    seconds: Annotated[float | None, typer.Option("--seconds", help="With --url: no new point after so long.")] = None,
    points: Annotated[
        int | None, typer.Option("--points", help=f"With --url: so many points; {POINTS} without --seconds.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="With --url: go on where the last run ended.")] = False,
) -> None:
    """Measure engines, simulated or live, over batch, KV, prompt tokens and clock (docs/profile-format.md)."""
    options = changed(Options(), setting or [])
    known = Catalogue.load(catalogue)
    if url is None:
        fleet = build_fleet(known, gpu, model or "llama-2-13b", parsed_sizes(tp, sizes), options.engine)
        return _profile_simulated(fleet, ProfilePlan(rows=rows, seed=seed), out)
    check_address("--url", url)
    size = parsed_sizes(tp or (1 if sizes is None else None), sizes)
    fleet = build_fleet(known, gpu, model or "llama-3-8b", size, options.engine)
    given = _capacities(capacity or [])
    remote = RemoteOptions(
        url=url,
        kind=_kind(engine_kind),
        served_as=served_as,
        stats=stats,
        tokenizer=tokenizer,
        api_key=None if api_key_file is None else api_key_file.read_text(encoding="utf-8").strip(),
        scrape_s=SCRAPE_S,
        max_batch=given.get("max_batch"),
        max_context_tokens=given.get("max_context_tokens"),
        kv_blocks=given.get("kv_blocks"),
        block_tokens=given.get("block_tokens"),
    )
    plan = LivePlan(points=POINTS if seconds is None and points is None else points, seconds=seconds, seed=seed)
    named = None if gpus is None else tuple(part.strip() for part in gpus.split(",") if part.strip())
    device = live_device(fleet, chosen_clocks(fleet.clocks_mhz, clocks), named, keeper)
    engine = remote_engine(remote, engine_spec(fleet))
    return _profile_live(engine, device, plan, out, resume=resume, served_as=served_as)


def _kind(text: str) -> Kind:
    for kind in KINDS:
        if text == kind:
            return kind
    raise ValueError(f"--engine-kind {text}: must be one of {', '.join(KINDS)}")


def _capacities(texts: list[str]) -> dict[str, int]:
    names, found = ("max_batch", "max_context_tokens", "kv_blocks", "block_tokens"), {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in names or not value.isdecimal() or int(value) < 1:
            raise ValueError(f"--capacity {text}: write NAME=N, as in kv_blocks=4096; names are {', '.join(names)}")
        found[name] = int(value)
    return found


def _profile_simulated(fleet: Fleet, plan: ProfilePlan, out: Path) -> None:
    with progress_bar() as bar:
        task = bar.add_task("profiling", total=1.0)
        frame = profile_fleet(fleet, plan, lambda what, share: bar.update(task, completed=share))
    write_profile(frame, out)
    Console().print(f"{frame.height} iterations in {out}")


def _profile_live(
    engine: OpenaiEngine | TritonEngine,
    device: Device,
    plan: LivePlan,
    out: Path,
    *,
    resume: bool,
    served_as: str | None,
) -> None:
    check_ending(out)
    console = Console(stderr=True, soft_wrap=True)
    columns = (TextColumn("{task.description:>28}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("connecting", total=1.0)

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
                    say=lambda line: console.print(line, markup=False, highlight=False),
                    progress=lambda what, share: bar.update(task, description=what, completed=share),
                )

        try:
            rows = asyncio.run(measured())
        except EngineError as error:
            raise ValueError(str(error)) from error
    Console().print(f"{rows} rows in {out}")


def train(
    profile_file: Annotated[Path, typer.Argument(metavar="PROFILE", help="What `profile` wrote, or a real engine's.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the tables and score_card.json.")],
    catalogue: Extra = None,
    setting: Setting = None,
) -> None:
    """Train the performance model on a profile: a table for each engine size, and a score card."""
    options = changed(Options(), setting or [])
    frame = read_profile(profile_file)
    ensure_writable_dir(out)
    first = frame.row(0, named=True)
    sizes = tuple(sorted(set(frame["tp"].to_list())))
    fleet = build_fleet(Catalogue.load(catalogue), first["gpu"], first["model"], sizes, options.engine)
    with progress_bar() as bar:
        task = bar.add_task("training", total=1.0)
        trained = train_trees(frame)
        bar.update(task, completed=0.2)
        for tp in fleet.sizes:
            save_table(bake(trained, spec_of(frame, fleet.specs[tp])), out / f"table-tp{tp}.npz")
        bar.update(task, completed=0.3)
        card = score_profile(
            frame, on_progress=lambda done, total: bar.update(task, completed=0.3 + 0.7 * done / total)
        )
    write_score_card(card, out / "score_card.json")
    Console().print(score_table(card) if card.scores else "too few rows to hold any out: there are no scores")
    Console().print(f"tables and score_card.json in {out}")
    if unmeasured := [str(tp) for tp in fleet.sizes if tp not in trained.clocks_measured]:
        Console(soft_wrap=True).print(
            f"tp {', '.join(unmeasured)}: the clock axis was not measured (a profile without --gpus, or of one clock): "
            "`serve` keeps the maximum clock with this table, and refuses to set or advise clocks of GPUs; for that, "
            "profile again with --gpus and --clocks",
            markup=False,
            highlight=False,
        )


def estimate(
    clock: Annotated[int, typer.Option("--clock", help="MHz.")],
    batch: Annotated[int, typer.Option("--batch", help="Running requests.")],
    context: Annotated[int, typer.Option("--context", help="Tokens of each running request.")],
    gpu: Gpu = "a100-40gb-sxm",
    model: Model = "llama-2-13b",
    tp: Annotated[int, typer.Option("--tp", help="GPUs of the engine.")] = 4,
    prefill_tokens: Annotated[int, typer.Option("--prefill-tokens", help="Prompt tokens in the iteration.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    catalogue: Extra = None,
) -> None:
    """Seconds and watts of one iteration, and how far each figure is to be believed."""
    known = Catalogue.load(catalogue)
    point = estimate_point(EnginePhysics(known.gpu(gpu), known.model(model), tp), clock, batch, context, prefill_tokens)
    if as_json:
        sys.stdout.write(json.dumps(point.to_json()) + "\n")
        return
    table = Table(show_header=False, box=None)
    table.add_row("iteration", f"{point.iteration_s * 1e3:.2f} ms", point.basis["iteration_s"])
    table.add_row("power", f"{point.power_w:.0f} W", point.basis["power_w"])
    Console().print(table)
