"""`throttllem doctor`: what may I do here, what is locked and by whom; `--restore` resets it. Output alone."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from throttllem.cli.keeper import STATE, Socket, State
from throttllem.doctor.examine import Examined, examine
from throttllem.doctor.finding import Finding, Mark
from throttllem.doctor.gpus import MEASURE_S, Gpu
from throttllem.doctor.restore import restore
from throttllem.gpu.keeper_client import SOCKET

ZEUSD = "/var/run/zeusd.sock"


def doctor(
    put_back: Annotated[
        bool, typer.Option("--restore", help="Restore what a keeper that is gone left locked. Needs root.")
    ] = False,
    gpu: Annotated[
        list[str] | None,
        typer.Option("--gpu", metavar="UUID", help="With --restore: reset only this GPU, no matter what locked it."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help=f"Watch the energy counters for {MEASURE_S:g} s.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    socket: Socket = SOCKET,
    state: State = STATE,
) -> None:
    """May I set clocks here, what is locked and by whom, and how to mend it. Exit code 1 where something is wrong."""
    if gpu and not put_back:
        raise ValueError("--gpu: only with --restore, which resets that GPU")
    told = list[Finding]()

    def tell(finding: Finding) -> None:
        told.append(finding)
        if not as_json:
            _print(finding)

    if put_back:
        for finding in restore(state, socket, gpu or ()):
            tell(finding)
    zeusd = Path(os.environ.get("ZEUSD_SOCK_PATH", ZEUSD))
    examined = examine(state, socket, zeusd, MEASURE_S if measure else None)
    for finding in examined.findings:
        tell(finding)
    wrong = sum(finding.mark is Mark.TROUBLE for finding in told)
    if as_json:
        typer.echo(json.dumps(_as_json(told, examined), indent=1))
    else:
        typer.echo(f"{wrong} to mend" if wrong else "nothing to mend")
    raise typer.Exit(code=1 if wrong else 0)


def _print(finding: Finding) -> None:
    typer.echo(f"{finding.mark} {finding.subject}: {finding.text}")
    if finding.remedy:
        typer.echo(f"     {finding.remedy}")


def _as_json(told: list[Finding], examined: Examined) -> dict[str, Any]:
    return {
        "schema": 1,
        "version": version("throttllem"),
        "findings": [
            {"mark": str(one.mark), "subject": one.subject, "text": one.text, "remedy": one.remedy} for one in told
        ],
        "gpus": [_gpu_json(gpu) for gpu in examined.gpus],
        "keeper": {
            "socket": str(examined.keeper.path),
            "runs": examined.keeper.runs,
            "allowed": examined.keeper.status.get("allowed", {}),
            "held": examined.keeper.status.get("held", {}),
            "returning": examined.keeper.status.get("returning", []),
            "left": dict(examined.keeper.left),
        },
    }


def _gpu_json(gpu: Gpu) -> dict[str, Any]:
    return {
        "number": gpu.number,
        "uuid": gpu.uuid,
        "name": gpu.name,
        "clocks_mhz": gpu.clocks_mhz,
        "clock_mhz": gpu.clock_mhz,
        "watts": gpu.watts,
        "limit_w": gpu.limit_w,
        "energy_counter": gpu.has_counter,
        "energy_refresh_s": gpu.refresh_s,
        "brake": gpu.throttle.text,
        "shared": gpu.sharing and gpu.sharing.name,
        "processes": gpu.pids,
        "steady_mhz": gpu.steady_mhz,
    }
