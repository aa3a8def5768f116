"""The commands about engines: characterize, profile, train, estimate. Knows nothing of policies."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from throttllem.arguments import (
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
from throttllem.engine.fleet import build_fleet
from throttllem.files import ensure_writable_dir
from throttllem.learn.bake import bake
from throttllem.learn.measure import ProfilePlan
from throttllem.learn.profile import read_profile, write_profile
from throttllem.learn.score import score_profile, score_table, write_score_card
from throttllem.learn.storage import save_table
from throttllem.learn.tables import profile_fleet
from throttllem.learn.train import train as train_trees
from throttllem.physics.catalogue import Catalogue
from throttllem.physics.engine import EnginePhysics
from throttllem.physics.estimate import estimate as estimate_point
from throttllem.sim.prepare import capacities
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
            promised=Slo(e2e_s=slo_e2e, tbt_s=slo_tbt),
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
    model: Model = "llama-2-13b",
    tp: Tp = None,
    sizes: Sizes = None,
    rows: Annotated[int, typer.Option("--rows", help="Iterations measured of each size.")] = ProfilePlan().rows,
    seed: Seed = 0,
    catalogue: Extra = None,
    setting: Setting = None,
) -> None:
    """Measure the simulated engines over batch, KV, prompt tokens and clock (docs/profile-format.md)."""
    options = changed(Options(), setting or [])
    fleet = build_fleet(Catalogue.load(catalogue), gpu, model, parsed_sizes(tp, sizes), options.engine)
    with progress_bar() as bar:
        task = bar.add_task("profiling", total=1.0)
        frame = profile_fleet(
            fleet, ProfilePlan(rows=rows, seed=seed), lambda what, share: bar.update(task, completed=share)
        )
    write_profile(frame, out)
    Console().print(f"{frame.height} iterations in {out}")


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
            save_table(bake(trained, fleet.specs[tp]), out / f"table-tp{tp}.npz")
        bar.update(task, completed=0.3)
        card = score_profile(
            frame, on_progress=lambda done, total: bar.update(task, completed=0.3 + 0.7 * done / total)
        )
    write_score_card(card, out / "score_card.json")
    Console().print(score_table(card))
    Console().print(f"tables and score_card.json in {out}")


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
