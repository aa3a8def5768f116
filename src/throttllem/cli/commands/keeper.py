"""`throttllem keeper`: becomes the keeper's process, which loads the keeper alone; or prints its systemd unit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Socket = Annotated[
    Path | None, typer.Option("--socket", help="The keeper's Unix socket; default /run/throttllem/keeper.sock.")
]
State = Annotated[
    Path | None, typer.Option("--state", help="The keeper's folder, for its journal; default /var/lib/throttllem.")
]
_CLOCKS = "UUID=LOWEST-HIGHEST"


def keeper(
    gpu: Annotated[
        list[str], typer.Option("--gpu", metavar=_CLOCKS, help="A GPU whose clock may be set, and to what MHz. Repeat.")
    ],
    normally: Annotated[
        list[str] | None,
        typer.Option(
            "--normally",
            metavar=_CLOCKS,
            help="Baseline: the lock to restore after a lease; without it, a reset.",
        ),
    ] = None,
    user: Annotated[
        list[str] | None, typer.Option("--user", metavar="NAME", help="A user that may connect, beside root. Repeat.")
    ] = None,
    socket: Socket = None,
    state: State = None,
    unit: Annotated[
        bool, typer.Option("--unit", help="Print a systemd unit for these options, hardened, and stop.")
    ] = False,
) -> None:
    """Lease GPU clocks to a gateway without rights, and restore them whatever happens. Needs root."""
    import os
    import sys

    from throttllem.doctor.rights import sets_clocks
    from throttllem.gpu.keeper_client import SOCKET
    from throttllem.keeper.unit import (
        PROGRAM,
        STATE,
        check_options,
        program_warnings,
        unit_text,
        user_id,
    )

    socket, state = socket or SOCKET, state or STATE
    options = [("--gpu", text) for text in gpu]
    options += [("--normally", text) for text in normally or ()]
    options += [("--user", user_id(name)) for name in user or ()]
    options += [("--socket", str(socket)), ("--state", str(state))]
    command = [sys.executable, *PROGRAM, *(text for pair in options for text in pair)]
    check_options(options)
    if not unit and not sets_clocks():
        raise PermissionError(
            "the keeper sets clocks, which needs root (CAP_SYS_ADMIN): run this with sudo, or install the service that "
            "`throttllem keeper --unit` prints; `throttllem doctor` needs no rights"
        )
    warnings = [*program_warnings()]
    for warning in warnings:
        typer.echo(f"!! {warning}", err=True)
    if unit:
        typer.echo(unit_text(command, socket, state, warnings), nl=False)
        return
    os.execv(command[0], command)
