"""`throttllem serve`: options in, a running gateway out. Knows nothing of how a request is served."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from throttllem.cli.arguments import Setting, cache_dir, progress_bar
from throttllem.gateway.check import check_configuration, verdict
from throttllem.gateway.run import run_gateway
from throttllem.gateway.settings import RESOLVED, ServeOptions
from throttllem.tree import Source, build, from_environment, from_settings, from_toml

PREFIX = "THROTTLLEM_"
OTHERS = ("THROTTLLEM_CACHE_DIR", "THROTTLLEM_WORKERS", "THROTTLLEM_DEBUG", "THROTTLLEM_STATS")
"""Variables of the whole program, and of the plug-in in the engine."""
_EXPLAIN = "Explain the configuration, then stop. Exit code 1: something to mend (!!), 2: serve would not start."
Check = Annotated[bool, typer.Option("--check", help=_EXPLAIN)]


def serve(
    config: Annotated[Path | None, typer.Option("--config", help="TOML file; without it a simulated engine.")] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port of the API; default 8000; 0: any free one.")] = None,
    metrics_port: Annotated[int | None, typer.Option("--metrics-port", help="Own port for metrics, dashboard.")] = None,
    policy: Annotated[
        str | None,
        typer.Option("--policy", help="triton, throttllem, least-energy (default), fixed:<MHz>."),
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", help="URL of a vLLM-like engine, in place of the simulated one.")
    ] = None,
    triton: Annotated[str | None, typer.Option("--triton", help="URL of a Triton server, likewise.")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="GPU of the catalogue, of the one engine.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Model of the catalogue, of the one engine.")] = None,
    tp: Annotated[int | None, typer.Option("--tp", help="GPUs of the one engine.")] = None,
    tables: Annotated[Path | None, typer.Option("--tables", help="Folder that `train` wrote.")] = None,
    gpus: Annotated[str | None, typer.Option("--gpus", help="GPUs of the one engine: UUIDs or numbers.")] = None,
    clocks: Annotated[str | None, typer.Option("--clocks", help="With --gpus: on, advise (default) or off.")] = None,
    slo_e2e: Annotated[float | None, typer.Option("--slo-e2e", help="Seconds; promised where none is named.")] = None,
    slo_tbt: Annotated[float | None, typer.Option("--slo-tbt", help="Seconds, mean; likewise.")] = None,
    slo_ttft: Annotated[float | None, typer.Option("--slo-ttft", help="Seconds; likewise.")] = None,
    setting: Setting = None,
    check: Check = False,
    log_level: Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")] = "info",
) -> None:
    """An OpenAI-compatible gateway in front of real engines, or of a simulated one in real time."""
    if engine and triton:
        raise ValueError("--engine and --triton: give one of them, or both engines in a --config file")
    flags = {
        "server.host": host,
        "server.port": port,
        "server.metrics_port": metrics_port,
        "policy": policy,
        "engines.0.kind": "openai" if engine else "triton" if triton else None,
        "engines.0.url": engine or triton,
        "engines.0.gpu": gpu,
        "engines.0.model": model,
        "engines.0.tp": tp,
        "engines.0.tables": tables,
        "engines.0.gpus": gpus,
        "clocks.mode": clocks,
        "slo.e2e_s": slo_e2e,
        "slo.tbt_s": slo_tbt,
        "slo.ttft_s": slo_ttft,
    }
    given = [f"{path}={value}" for path, value in flags.items() if value is not None]
    sources: list[Source] = [from_toml(config)] if config else []
    sources += [from_environment(os.environ, PREFIX, OTHERS), from_settings([*given, *(setting or [])])]
    options, origins = build(ServeOptions, sources, RESOLVED)
    _log_to_stderr(log_level)
    console = Console(stderr=not check, soft_wrap=True)
    if check:
        raise typer.Exit(code=_explain(options, origins, console))
    with progress_bar() as bar:
        task = bar.add_task("preparing", total=1.0)
        gateway = run_gateway(
            options, cache_dir(), progress=lambda what, share: bar.update(task, description=what, completed=share)
        )
    gateway.serve(lambda line: console.print(line, highlight=False, markup=False))


def _explain(options: ServeOptions, origins: dict[str, str], console: Console) -> int:
    """Print what `--check` found; the exit code."""
    findings = asyncio.run(check_configuration(options, origins, cache_dir()))
    for finding in findings:
        console.print(f"{finding.mark} {finding.text}", highlight=False, markup=False)
    code, summary = verdict(findings)
    console.print(summary, highlight=False, markup=False)
    return code


def _log_to_stderr(level: str) -> None:
    known = ("debug", "info", "warning", "error")
    if level not in known:
        raise ValueError(f"--log-level {level}: must be one of {', '.join(known)}")
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
