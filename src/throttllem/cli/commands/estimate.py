"""`throttllem estimate`: seconds and watts of one iteration, from the physics."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from throttllem.cli.arguments import Extra, Gpu, KvCache, Model, load


def estimate(
    clock: Annotated[int, typer.Option("--clock", help="MHz.")],
    batch: Annotated[int, typer.Option("--batch", help="Running requests.")],
    context: Annotated[int, typer.Option("--context", help="Tokens of each running request.")],
    gpu: Gpu = "a100-40gb-sxm",
    model: Model = "llama-2-13b",
    tp: Annotated[int, typer.Option("--tp", help="GPUs of the engine.")] = 4,
    prefill_tokens: Annotated[int, typer.Option("--prefill-tokens", help="Prompt tokens in the iteration.")] = 0,
    kv_cache_dtype: KvCache = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    catalogue: Extra = None,
) -> None:
    """Seconds and watts of one iteration, and what each figure is based on."""
    options = load(
        flags={
            "catalogue": ("--catalogue", catalogue),
            "batching.kv_cache_dtype": ("--kv-cache-dtype", kv_cache_dtype),
        }
    ).options
    from rich.console import Console
    from rich.table import Table

    from throttllem.physics.catalogue import Catalogue
    from throttllem.physics.engine import EnginePhysics
    from throttllem.physics.estimate import estimate as estimate_point

    known = Catalogue.load(options.catalogue)
    the_model = known.model(model).with_cache(options.batching.kv_cache_dtype)
    point = estimate_point(EnginePhysics(known.gpu(gpu), the_model, tp), clock, batch, context, prefill_tokens)
    if as_json:
        typer.echo(json.dumps(point.to_json()))
        return
    table = Table(show_header=False, box=None)
    table.add_row("model", the_model.described, model)
    table.add_row("iteration", f"{point.iteration_s * 1e3:.2f} ms", point.basis["iteration_s"])
    table.add_row("power", f"{point.power_w:.0f} W", point.basis["power_w"])
    Console().print(table)
