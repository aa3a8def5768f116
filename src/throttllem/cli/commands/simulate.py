"""`throttllem simulate`: what would I save? A trace in virtual time under several policies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from throttllem.cli.arguments import (
    Config,
    Engine,
    Extra,
    Gpu,
    Json,
    KvCache,
    Model,
    Out,
    Seed,
    Setting,
    Sizes,
    Tp,
    TraceColumns,
    TraceName,
    check_target,
    load,
    parsed_duration,
    parsed_engines,
    parsed_sizes,
    write_json,
)
from throttllem.cli.progress import progress

if TYPE_CHECKING:
    from throttllem.option_sources import Loaded
    from throttllem.sim.study import Study


def simulate(
    gpu: Gpu = "a100-40gb-sxm",
    model: Model = "llama-2-13b",
    tp: Tp = None,
    sizes: Sizes = None,
    engine: Engine = None,
    kv_cache_dtype: KvCache = None,
    trace: TraceName = "azure-conv-like",
    columns: TraceColumns = None,
    policy: Annotated[
        str,
        typer.Option(
            "--policy",
            help="triton, throttllem, least-energy, fixed:<MHz>, each also with +autoscale; least-energy also with "
            "+gather (every request can wait, slo.batch); or a class of your own, as in package.module:Class.",
        ),
    ] = "triton,throttllem,least-energy",
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths",
            help="How output lengths are predicted: online (default: as the gateway does), oracle or max-tokens.",
        ),
    ] = None,
    length_error: Annotated[
        float | None, typer.Option("--length-error", help="An oracle with this error at p95, as in the paper (0.3).")
    ] = None,
    slo_e2e: Annotated[
        str | None,
        typer.Option("--slo-e2e", metavar="DURATION", help="E2E SLO, as in 20s; default: what characterize finds."),
    ] = None,
    slo_tbt: Annotated[
        str | None,
        typer.Option(
            "--slo-tbt", metavar="DURATION", help="SLO on a request's mean time between tokens; default 200ms."
        ),
    ] = None,
    slo_ttft: Annotated[
        str | None, typer.Option("--slo-ttft", metavar="DURATION", help="TTFT SLO; default: none.")
    ] = None,
    peak_rps: Annotated[
        str | None,
        typer.Option(
            "--peak-rps", help="Scale arrivals: busiest 60 s at this rate, or max: the engine's maximum load."
        ),
    ] = None,
    seconds: Annotated[
        str | None, typer.Option("--seconds", metavar="DURATION", help="Cut the (scaled) trace, as in 300 or 5m.")
    ] = None,
    seed: Seed = 0,
    count_freed_gpus: Annotated[bool, typer.Option("--count-freed-gpus", help="Count GPUs of no engine too.")] = False,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus",
            min=1,
            help="GPUs of a pool whose engines share the requests: as many of the largest size as fit; with +autoscale "
            "the load selects sizes and numbers. Idle GPUs without an engine count too. Default: one engine.",
        ),
    ] = None,
    engines: Annotated[
        str | None,
        typer.Option(
            "--engines",
            help="With --gpus: how many engines of each of --sizes it begins with, as in 1:4,2:1; without +autoscale "
            "it keeps them. Default: as many of the largest size as fit.",
        ),
    ] = None,
    co2_g_per_kwh: Annotated[
        float | None, typer.Option("--co2-g-per-kwh", help="Grams of CO2 of a kWh; default 445, the world's average.")
    ] = None,
    price_per_kwh: Annotated[
        float | None, typer.Option("--price-per-kwh", help="Price of a kWh; default 0.08 USD (cost.currency).")
    ] = None,
    catalogue: Extra = None,
    config: Config = None,
    setting: Setting = None,
    json_file: Json = None,
    out: Out = None,
) -> None:
    """What would I save? Replay a trace in virtual time under several policies."""
    loaded = load(
        setting,
        config,
        {
            "length.predictor": ("--lengths", lengths),
            "length.p95_error": ("--length-error", length_error),
            "slo.e2e_s": ("--slo-e2e", slo_e2e),
            "slo.tbt_s": ("--slo-tbt", slo_tbt),
            "slo.ttft_s": ("--slo-ttft", slo_ttft),
            "batching.engine": ("--engine", engine),
            "batching.kv_cache_dtype": ("--kv-cache-dtype", kv_cache_dtype),
            "cost.co2_g_per_kwh": ("--co2-g-per-kwh", co2_g_per_kwh),
            "cost.price_per_kwh": ("--price-per-kwh", price_per_kwh),
            "catalogue": ("--catalogue", catalogue),
        },
    )
    from throttllem.sim.study import Study

    slo = loaded.options.slo
    study = Study(
        gpu=gpu,
        model=model,
        sizes=parsed_sizes(tp, sizes),
        trace=trace,
        columns=columns,
        policies=tuple(name.strip() for name in policy.split(",") if name.strip()),
        slo_e2e_s=slo.e2e_s,
        slo_tbt_s=slo.tbt_s,
        slo_ttft_s=slo.ttft_s,
        slo_batch=slo.batch,
        peak_rps=_peak(peak_rps),
        seconds=parsed_duration("--seconds", seconds),
        seed=seed,
        count_freed_gpus=count_freed_gpus,
        gpus=gpus,
        engines=parsed_engines(engines),
        options=loaded.options,
    )
    run_study(study, loaded, json_file, out)


def run_study(
    study: Study, loaded: Loaded, json_file: Path | None, out: Path | None, *, with_oracle: bool = False
) -> None:
    """Simulate, print the tables, and write what was wanted. `with_oracle`: also print what the last policy would take
    if output lengths were known.
    """
    from throttllem.files import ensure_writable_dir
    from throttllem.physics.catalogue import Catalogue
    from throttllem.report.page import write_report
    from throttllem.report.terminal import beside, results_json, show_results
    from throttllem.sim.study import run_all

    options = loaded.options
    known = Catalogue.load(options.catalogue)
    if out:
        ensure_writable_dir(out)
    if json_file:
        check_target(json_file)
    with progress("preparing") as report:
        scenario, policies = study.prepare(
            known, options.cache_dir.expanduser(), report, lambda trace: typer.echo(f"trace {trace.described()}")
        )
        report("prepared", 1.0)
        jobs = [(scenario, policy) for policy in policies]
        names = [policy.name for policy in policies]
        if with_oracle:
            jobs.append((scenario.with_lengths("oracle"), policies[-1]))
            names.append(f"{policies[-1].name}, lengths known")
        every = run_all(
            jobs, workers=options.workers, progress=lambda index, share: report(names[index], share, names[index])
        )
    runs = every[: len(policies)]
    described = scenario.described()
    show_results(described, runs)
    for other, run in zip(jobs[len(runs) :], every[len(runs) :], strict=True):
        typer.echo(beside(other[0].described(), run, runs))
    if json_file:
        write_json(json_file, results_json(described, runs))
    if out:
        typer.echo(f"report: {write_report(out, described, runs)}")


def _peak(text: str | None) -> float | str | None:
    """Requests/s, "max", or None for the trace as it is."""
    from throttllem.sim.study import MAXIMUM

    if text is None or text == MAXIMUM:
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--peak-rps {text}: must be requests per second, or {MAXIMUM}") from None
