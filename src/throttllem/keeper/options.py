"""The keeper's command line. `throttllem keeper` checks it before, and writes it into the systemd unit."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from throttllem.gpu.clock_range import ClockRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`allowed`: by UUID, the clocks that may be set. `baselines`: the clocks that a GPU is locked to after a lease;
    a GPU without one is reset. `uids`: the users that may connect, beside root. `state`: the folder of the journal.
    """

    allowed: Mapping[str, ClockRange]
    baselines: Mapping[str, ClockRange]
    uids: frozenset[int]
    socket: Path
    state: Path


def parse_options(arguments: list[str] | None = None) -> Options:
    """Those of the command line. Exits with code 2 where it is wrong."""
    parser = argparse.ArgumentParser(prog="throttllem keeper", description="Leases GPU clocks, and restores them.")
    gpu = partial(parser.add_argument, type=parse_gpu, action="append", default=[], metavar="UUID=LOWEST-HIGHEST")
    gpu("--gpu", required=True, help="a GPU whose clock may be set, and to what MHz")
    gpu("--normally", help="baseline: the lock to restore after a lease; without it, a reset")
    parser.add_argument("--user", type=int, action="append", default=[], help="user id that may connect, beside root")
    parser.add_argument("--socket", default=Path("/run/throttllem/keeper.sock"), type=Path)
    parser.add_argument("--state", default=Path("/var/lib/throttllem"), type=Path)
    parsed = parser.parse_args(arguments)
    return Options(
        allowed=dict(parsed.gpu),
        baselines=dict(parsed.normally),
        uids=frozenset(parsed.user),
        socket=parsed.socket,
        state=parsed.state,
    )


def parse_gpu(text: str) -> tuple[str, ClockRange]:
    """ "GPU-...=600-1410": a UUID and a range of MHz. Raises ValueError."""
    uuid, _, clocks = text.partition("=")
    return uuid, ClockRange.parse(clocks)
