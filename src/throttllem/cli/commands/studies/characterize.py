"""`throttllem characterize`: the maximum load of simulated engines."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from throttllem.cli.arguments import (
    Config,
    Engine,
    Extra,
    Gpu,
    Json,
    KvCache,
    Model,
    Seed,
    Setting,
    Sizes,
    Tp,
    TraceColumns,
    TraceName,
    check_target,
    load,
    parsed_sizes,
    write_json,
)
from throttllem.cli.progress import progress


def characterize(
    gpu: Gpu = "a100-40gb-sxm",
    model: Model = "llama-2-13b",
    tp: Tp = None,
    sizes: Sizes = None,
    engine: Engine = None,
    kv_cache_dtype: KvCache = None,
    trace: TraceName = "azure-conv-like",
    columns: TraceColumns = None,
    slo_e2e: Annotated[
        str | None, typer.Option("--slo-e2e", metavar="DURATION", help="Bound on p99 of E2E, as in 20s.")
    ] = None,
    slo_tbt: Annotated[
        str | None, typer.Option("--slo-tbt", metavar="DURATION", help="Bound on p99 of the mean TBT; default 200ms.")
    ] = None,
    seed: Seed = 0,
    catalogue: Extra = None,
    config: Config = None,
    setting: Setting = None,
    json_file: Json = None,
) -> None:
    """The maximum load of each engine at the maximum clock, and its latency there."""
    options = load(
        setting,
        config,
        {
            "slo.e2e_s": ("--slo-e2e", slo_e2e),
            "slo.tbt_s": ("--slo-tbt", slo_tbt),
            "batching.engine": ("--engine", engine),
            "batching.kv_cache_dtype": ("--kv-cache-dtype", kv_cache_dtype),
            "catalogue": ("--catalogue", catalogue),
        },
    ).options
    from rich.console import Console
    from rich.table import Table

    from throttllem.core.types import Slo
    from throttllem.engines.simulated.fleet import build_fleet
    from throttllem.engines.simulated.presets import batching
    from throttllem.physics.catalogue import Catalogue
    from throttllem.sim.characterize import capacities
    from throttllem.sim.study import SLO_TBT_S
    from throttllem.sim.traces.trace import load_trace

    if json_file:
        check_target(json_file)
    known = Catalogue.load(options.catalogue)
    fleet = build_fleet(known, gpu, model, parsed_sizes(tp, sizes), options.batching)
    rules = batching(options.batching, known.gpu(gpu)).described
    tbt_s = SLO_TBT_S if options.slo.tbt_s is None else options.slo.tbt_s
    read = load_trace(trace, columns=columns, seed=seed)
    typer.echo(f"trace {read.described()}")
    with progress("characterising") as report:
        found = capacities(
            fleet,
            read,
            options,
            options.cache_dir.expanduser(),
            seed=seed,
            slo=Slo(e2e_s=options.slo.e2e_s, tbt_s=tbt_s),
            progress=report,
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
    table.caption = f"Simulated engine: batches as {rules}."
    Console().print(table)
    if json_file:
        write_json(
            json_file, {"schema": 1, "batching": rules, "capacities": [asdict(capacity) for capacity in found.values()]}
        )
