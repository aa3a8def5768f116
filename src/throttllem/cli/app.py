"""The command line: options in, tables and files out. An error is one sentence that says what to mend, exit code 2."""

from __future__ import annotations

import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from throttllem.cli.arguments import (
    Extra,
    Gpu,
    Json,
    Model,
    Out,
    Seed,
    Setting,
    Sizes,
    Tp,
    TraceName,
    cache_dir,
    check_target,
    parsed_peak,
    parsed_sizes,
    progress_bar,
    write_json,
)
from throttllem.cli.calibrate import calibrate
from throttllem.cli.doctor import doctor
from throttllem.cli.engines import characterize, estimate, profile, train
from throttllem.cli.keeper import keeper
from throttllem.cli.replay import replay
from throttllem.cli.serve import serve
from throttllem.config import Environment, LengthOptions, Options, changed
from throttllem.files import ensure_writable_dir
from throttllem.physics.catalogue import Catalogue
from throttllem.report.page import write_report
from throttllem.report.terminal import results_json, show_results
from throttllem.reproduce.run import claims_table, outcomes_json
from throttllem.reproduce.run import reproduce as reproduce_claims
from throttllem.sim.study import MAXIMUM, Study, run_all

app = typer.Typer(
    help="Serve LLMs at the least energy that keeps every latency promise.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"throttllem {version('throttllem')}")
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Serve LLMs at the least energy that keeps every latency promise."""


for command in (serve, keeper, doctor, replay, characterize, profile, train, calibrate, estimate):
    app.command()(command)


_INTERRUPTED = 130
"""Exit code of a command that a signal ended (128 + SIGINT)."""


@app.command()
def simulate(
    gpu: Gpu = "a100-40gb-sxm",
    model: Model = "llama-2-13b",
    tp: Tp = None,
    sizes: Sizes = None,
    trace: TraceName = "azure-conv-like",
    policy: Annotated[
        str, typer.Option("--policy", help="triton, throttllem, least-energy, fixed:<MHz>; each also with +autoscale.")
    ] = "triton,throttllem,least-energy",
    length_error: Annotated[float, typer.Option("--length-error", help="Error of length predictions at p95.")] = 0.0,
    slo_e2e: Annotated[
        float | None, typer.Option("--slo-e2e", help="Seconds; default: what characterize finds.")
    ] = None,
    slo_tbt: Annotated[float, typer.Option("--slo-tbt", help="Seconds, on a request's mean.")] = 0.2,
    slo_ttft: Annotated[float | None, typer.Option("--slo-ttft", help="Seconds; default: no promise.")] = None,
    peak_rps: Annotated[
        str | None,
        typer.Option(
            "--peak-rps", help="Scale arrivals: busiest 60 s at this rate, or max: the engine's maximum load."
        ),
    ] = None,
    seconds: Annotated[float | None, typer.Option("--seconds", help="Cut the (scaled) trace.")] = None,
    seed: Seed = 0,
    count_freed_gpus: Annotated[bool, typer.Option("--count-freed-gpus", help="Count GPUs of no engine too.")] = False,
    catalogue: Extra = None,
    setting: Setting = None,
    json_file: Json = None,
    out: Out = None,
) -> None:
    """What would I save? Replay a trace in virtual time under several policies."""
    options = changed(Options(length=LengthOptions(p95_error=length_error)), setting or [])
    study = Study(
        gpu=gpu,
        model=model,
        sizes=parsed_sizes(tp, sizes),
        trace=trace,
        policies=tuple(name.strip() for name in policy.split(",") if name.strip()),
        slo_e2e_s=slo_e2e,
        slo_tbt_s=slo_tbt,
        slo_ttft_s=slo_ttft,
        peak_rps=parsed_peak(peak_rps),
        seconds=seconds,
        seed=seed,
        count_freed_gpus=count_freed_gpus,
        options=options,
    )
    _simulate(study, catalogue, json_file, out)


@app.command()
def demo(out: Annotated[Path, typer.Option("--out", help="Folder for report.html.")] = Path("out/demo")) -> None:
    """The main job in a minute: 25 minutes of chat on four simulated A100, three policies, a report."""
    study = Study(
        gpu="a100-40gb-sxm",
        model="llama-2-13b",
        sizes=(4,),
        trace="azure-conv-like:seconds=1800",
        policies=("triton", "throttllem", "least-energy"),
        peak_rps=MAXIMUM,
    )
    _simulate(study, None, None, out)


@app.command()
def reproduce(
    trace: Annotated[str | None, typer.Option("--trace", help="Default: an hour of azure-conv-like.")] = None,
    seed: Seed = 0,
    catalogue: Extra = None,
    json_file: Json = None,
) -> None:
    """Every claim of the throttLL'eM paper: its figure, ours, and why where they differ."""
    if json_file:
        check_target(json_file)
    with progress_bar() as bar:
        task = bar.add_task("preparing", total=1.0)
        outcomes = reproduce_claims(
            Catalogue.load(catalogue),
            cache_dir(),
            workers=Environment().workers,
            seed=seed,
            trace=trace,
            progress=lambda what, share: bar.update(task, description=what, completed=share),
        )
    console = Console()
    console.print(claims_table(outcomes, console.width))
    if json_file:
        write_json(json_file, outcomes_json(outcomes))


def main() -> None:
    """Run the command line; errors that the user can mend are one sentence on stderr."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stop is an interrupt: what was begun is taken back
    try:
        app()
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            Console(stderr=True).print("interrupted")
        raise
    except (ValueError, OSError) as error:
        if not isinstance(error, ValidationError) and Environment().debug:
            raise
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, highlight=False)
        sys.exit(2)


def _simulate(study: Study, catalogue: Path | None, json_file: Path | None, out: Path | None) -> None:
    known = Catalogue.load(catalogue)
    if out:
        ensure_writable_dir(out)
    if json_file:
        check_target(json_file)
    with progress_bar() as bar:
        first = bar.add_task("preparing", total=1.0)
        scenario, policies = study.prepare(
            known, cache_dir(), lambda what, share: bar.update(first, description=what, completed=share)
        )
        bar.update(first, description="prepared", completed=1.0)
        tasks = [bar.add_task(policy.name, total=1.0) for policy in policies]
        runs = run_all(
            [(scenario, policy) for policy in policies],
            workers=Environment().workers,
            progress=lambda index, share: bar.update(tasks[index], completed=share),
        )
    described = scenario.described()
    show_results(described, runs)
    if json_file:
        write_json(json_file, results_json(described, runs))
    if out:
        Console(soft_wrap=True).print(f"report: {write_report(out, described, runs)}")
