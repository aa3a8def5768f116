"""The keeper of clocks as a process of a testbed, on the GPUs of a fake NVML."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.testbed.private import private_folder
from tools.testbed.processes import Process, started


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeper:
    """A running keeper."""

    socket: Path
    process: Process


@contextmanager
def keeper(
    ranges_mhz: Mapping[str, tuple[int, int]], folder: Path, *, environment: Mapping[str, str] | None = None
) -> Iterator[Keeper]:
    """Keeps the GPUs of these UUIDs within their ranges, for this user; its log is in `folder`.

    `environment` makes it see the GPUs (`Machine.environment`). Raises ProcessError.
    """
    command = [sys.executable, "-m", "throttllem.keeper", "--user", str(os.getuid())]
    for uuid, (low, high) in ranges_mhz.items():
        command += ["--gpu", f"{uuid}={low}-{high}"]
    with private_folder("keeper-") as private:
        socket = private / "keeper.sock"
        command += ["--socket", str(socket), "--state", str(private / "state")]
        log = folder / "keeper.log"
        with started(command, log, ready=socket.exists, within_s=10.0, environment=environment) as process:
            yield Keeper(socket=socket, process=process)
