"""`throttllem doctor`: which clocks may be set here, and which are locked; `--restore` restores them."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Annotated, Any

import typer

from throttllem.cli.arguments import Extra
from throttllem.cli.commands.keeper import Socket, State

if TYPE_CHECKING:
    from throttllem.doctor.examine import Examined
    from throttllem.doctor.finding import Finding
    from throttllem.doctor.gpus import Gpu
    from throttllem.physics.catalogue import Catalogue


def doctor(
    put_back: Annotated[
        bool, typer.Option("--restore", help="Restore what a keeper that is gone left locked. Needs root.")
    ] = False,
    gpu: Annotated[
        list[str] | None,
        typer.Option("--gpu", metavar="UUID", help="With --restore: reset only this GPU, whatever locked it."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Watch the energy counters for a few seconds.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    zeusd: Annotated[
        Path, typer.Option("--zeusd", envvar="ZEUSD_SOCK_PATH", help="Socket of a zeusd, if there is one.")
    ] = Path("/var/run/zeusd.sock"),
    socket: Socket = None,
    state: State = None,
    catalogue: Extra = None,
) -> None:
    """Show whether this user may set clocks here, what is locked, and remedies. Exit code 1 if there is a fault."""
    if gpu and not put_back:
        raise ValueError("--gpu: only with --restore, which resets that GPU")
    from throttllem.doctor.examine import examine
    from throttllem.doctor.finding import Mark
    from throttllem.doctor.gpus import MEASURE_S
    from throttllem.doctor.restore import restore
    from throttllem.gpu.keeper_client import SOCKET
    from throttllem.keeper.unit import STATE
    from throttllem.physics.catalogue import Catalogue

    socket, state = socket or SOCKET, state or STATE
    known = Catalogue.load(catalogue)
    found: list[Finding] = []

    def report(finding: Finding) -> None:
        found.append(finding)
        if not as_json:
            _print(finding)

    if put_back:
        for finding in restore(state, socket, gpu or ()):
            report(finding)
    examined = examine(state, socket, zeusd, MEASURE_S if measure else None, known)
    for finding in examined.findings:
        report(finding)
    wrong = sum(finding.mark is Mark.TROUBLE for finding in found)
    if as_json:
        typer.echo(json.dumps(_as_json(found, examined, known), indent=1))
    else:
        typer.echo(f"{wrong} to correct" if wrong else "nothing to correct")
    raise typer.Exit(code=1 if wrong else 0)


def _print(finding: Finding) -> None:
    typer.echo(f"{finding.mark} {finding.subject}: {finding.text}")
    if finding.remedy:
        typer.echo(indent(finding.remedy, "     "))


def _as_json(found: list[Finding], examined: Examined, known: Catalogue) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "schema": 1,
        "version": version("throttllem"),
        "findings": [
            {"mark": str(one.mark), "subject": one.subject, "text": one.text, "remedy": one.remedy} for one in found
        ],
        "gpus": [_gpu_json(gpu, known) for gpu in examined.gpus],
        "keeper": {
            "socket": str(examined.keeper.path),
            "runs": examined.keeper.runs,
            "allowed": examined.keeper.status.get("allowed", {}),
            "held": examined.keeper.status.get("held", {}),
            "returning": examined.keeper.status.get("returning", []),
            "left": dict(examined.keeper.left),
        },
    }


def _gpu_json(gpu: Gpu, known: Catalogue) -> dict[str, Any]:
    from throttllem.physics.recognition import recognise

    kind = recognise(gpu.board, known)
    return {
        "number": gpu.number,
        "uuid": gpu.uuid,
        "name": gpu.board.name,
        "kind": kind.gpu.name if kind.listed else None,
        "like": None if kind.listed else kind.gpu.like,
        "clocks_mhz": gpu.clocks_mhz,
        "clock_mhz": gpu.clock_mhz,
        "watts": gpu.watts,
        "limit_w": gpu.limit_w,
        "energy_counter": gpu.counter is not None,
        "energy_refresh_s": gpu.counter and gpu.counter.refresh_s,
        "brake": gpu.throttle.text,
        "shared": gpu.sharing and gpu.sharing.name,
        "processes": gpu.pids,
        "steady_mhz": gpu.steady_mhz,
    }
