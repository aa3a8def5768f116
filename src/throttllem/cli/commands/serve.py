"""`throttllem serve`: options in, a running gateway out. Knows nothing of how a request is served."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from throttllem.cli.arguments import MODEL_HELP, Config, Setting, load
from throttllem.cli.progress import progress

if TYPE_CHECKING:
    from throttllem.option_sources import Loaded

LOG_LEVELS = ("debug", "info", "warning", "error")
_EXPLAIN = "Explain the configuration, then stop. Exit code 1: something to correct (!!), 2: serve would not start."


def serve(
    config: Config = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port of the API; default 8000; 0: any free one.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option("--metrics-port", help="Separate port for metrics and dashboard.")
    ] = None,
    allowed_origins: Annotated[
        str | None,
        typer.Option(
            "--allowed-origins", help="Origins of web pages that may call the gateway (CORS), by commas; *: all."
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option("--policy", help="triton, throttllem, least-energy (default), fixed:<MHz>."),
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", help="URL of a vLLM-like engine, instead of the simulated one.")
    ] = None,
    triton: Annotated[str | None, typer.Option("--triton", help="URL of a Triton server, likewise.")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="GPU of the catalogue, of the one engine.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help=f"Of the one engine; default: what it reports. {MODEL_HELP}")
    ] = None,
    tp: Annotated[int | None, typer.Option("--tp", help="Number of GPUs of the one engine.")] = None,
    tables: Annotated[Path | None, typer.Option("--tables", help="Folder that `train` wrote.")] = None,
    gpus: Annotated[str | None, typer.Option("--gpus", help="GPUs of the one engine: UUIDs or numbers.")] = None,
    clocks: Annotated[str | None, typer.Option("--clocks", help="With --gpus: on, dry-run (default) or off.")] = None,
    slo_e2e: Annotated[
        str | None,
        typer.Option("--slo-e2e", metavar="DURATION", help="E2E SLO of a request that sets none, as in 20s."),
    ] = None,
    slo_tbt: Annotated[
        str | None,
        typer.Option(
            "--slo-tbt", metavar="DURATION", help="SLO on the mean time between tokens, likewise, as in 200ms."
        ),
    ] = None,
    slo_ttft: Annotated[str | None, typer.Option("--slo-ttft", metavar="DURATION", help="TTFT SLO, likewise.")] = None,
    setting: Setting = None,
    check: Annotated[bool, typer.Option("--check", help=_EXPLAIN)] = False,
    log_level: Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")] = "info",
) -> None:
    """An OpenAI-compatible gateway for real engines, or for a simulated one in real time."""
    if engine and triton:
        raise ValueError("--engine and --triton: give one of them, or both engines in a --config file")
    if log_level not in LOG_LEVELS:
        raise ValueError(f"--log-level {log_level}: must be one of {', '.join(LOG_LEVELS)}")
    url_flag, kind = ("--triton", "triton") if triton else ("--engine", "openai" if engine else None)
    loaded = load(
        setting,
        config,
        {
            "server.host": ("--host", host),
            "server.port": ("--port", port),
            "server.metrics_port": ("--metrics-port", metrics_port),
            "server.allowed_origins": ("--allowed-origins", allowed_origins),
            "policy": ("--policy", policy),
            "engines.0.kind": (url_flag, kind),
            "engines.0.url": (url_flag, engine or triton),
            "engines.0.gpu": ("--gpu", gpu),
            "engines.0.model": ("--model", model),
            "engines.0.tp": ("--tp", tp),
            "engines.0.tables": ("--tables", tables),
            "engines.0.gpus": ("--gpus", gpus),
            "clocks.mode": ("--clocks", clocks),
            "slo.e2e_s": ("--slo-e2e", slo_e2e),
            "slo.tbt_s": ("--slo-tbt", slo_tbt),
            "slo.ttft_s": ("--slo-ttft", slo_ttft),
        },
    )
    if loaded.options.length.predictor == "oracle":
        where = loaded.origins["length.predictor"]
        raise ValueError(f"{where}: length.predictor = oracle: output lengths are not known in advance; use online")
    _log_to_stderr(log_level)
    if check:
        raise typer.Exit(code=_explain(loaded))
    from throttllem.gateway.run import run_gateway

    options = loaded.options
    with progress("preparing") as report:
        gateway = run_gateway(options, options.cache_dir.expanduser(), progress=report)
    gateway.serve(lambda line: typer.echo(line, err=True))


def _explain(loaded: Loaded) -> int:
    """Print what `--check` found; the exit code."""
    import asyncio

    from throttllem.gateway.check import check_configuration, verdict
    from throttllem.printable import printable

    options = loaded.options
    findings = asyncio.run(check_configuration(options, dict(loaded.origins), options.cache_dir.expanduser()))
    for finding in findings:
        typer.echo(f"{finding.mark} {printable(finding.text)}")
    code, summary = verdict(findings)
    typer.echo(summary)
    return code


def _log_to_stderr(level: str) -> None:
    import logging

    from throttllem.printable import PrintableFormatter

    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])
