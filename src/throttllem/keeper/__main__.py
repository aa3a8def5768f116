"""The keeper's process: a Unix socket, one JSON object a line in and out, one lease a connection. It ends with it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import pwd
import signal
import socket
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from throttllem.files import hold_dir
from throttllem.gpu.nvml import Lock, Nvml
from throttllem.keeper.journal import Journal
from throttllem.keeper.leases import Lease, Leases, RefusedError, log

LINE_BYTES, CONNECTIONS, GIVE_BACK_S = 4096, 32, 5.0


class Door:
    """Who may come in, and what they may ask."""

    def __init__(self, leases: Leases, uids: frozenset[int]) -> None:
        self._leases, self._uids, self._open = leases, uids, 0

    async def enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its first to its last byte."""
        peer = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, _ = struct.unpack("3i", peer)
        mine: list[Lease] = []
        self._open += 1
        try:
            while (uid == 0 or uid in self._uids) and self._open <= CONNECTIONS and (line := await reader.readline()):
                try:
                    answer = {"ok": True, **await self._answer(json.loads(line), mine, f"process {pid} of user {uid}")}
                except RefusedError as error:
                    answer = {"ok": False, "code": error.args[0], "error": error.args[1]}
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (ValueError, TypeError, KeyError, AttributeError, ConnectionError) as error:
            log.warning("process %d of user %d said what is no request: %r", pid, uid, error)
        finally:
            self._open -= 1
            for lease in mine:
                self._leases.end(lease, "its holder is gone")
            writer.close()

    async def _answer(self, asked: Mapping[str, Any], mine: list[Lease], holder: str) -> dict[str, Any]:
        leases, what = self._leases, asked["op"]
        if what == "status":
            held = {uuid: {"by": lease.holder, "mhz": lease.mhz} for uuid, lease in leases.held.items()}
            return {
                "allowed": leases.clocks,
                "held": held,
                "returning": list(leases.returning),
                "before": leases.before,
            }
        if what == "lease" and not mine:
            mine.append(leases.take(tuple(map(str, asked["gpus"])), float(asked["ttl_s"]), holder))
            return {}
        if what not in ("beat", "set", "release") or not mine:
            raise RefusedError("malformed", "one lease a connection, then beat, set or release; status at any time")
        if what == "set":
            await leases.set(mine[0], int(asked["mhz"]))
        elif what == "beat":
            leases.beat(mine[0])
        else:
            leases.end(lease := mine.pop(), "given back by its holder")
            await asyncio.gather(*(leases.returning[uuid] for uuid in lease.gpus if uuid in leases.returning))
        return {}

    async def keep_open(self, path: Path, stop: asyncio.Event) -> None:
        """Listen at `path` until `stop`; where the socket was taken away, at a new one."""
        while not stop.is_set():
            path.unlink(missing_ok=True)
            server = await asyncio.start_unix_server(self.enter, path, limit=LINE_BYTES)
            path.chmod(0o666)  # who may come in is asked of the kernel, connection by connection
            number = path.stat().st_ino
            while not stop.is_set() and path.exists() and path.stat().st_ino == number:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), 0.25)
            server.close()


async def keep(arguments: argparse.Namespace, nvml: Nvml, boot: str) -> None:
    """Until SIGTERM; then everything is given back."""
    journal = Journal((arguments.state / "keeper.journal", arguments.socket.with_suffix(".journal")), boot)
    leases = Leases(nvml, dict(arguments.gpu), dict(arguments.normally), journal)
    leases.recover()
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    sweeping = loop.create_task(leases.sweep(partial(tell_systemd, b"WATCHDOG=1")))
    sweeping.add_done_callback(lambda _: stop.set())
    tell_systemd(b"READY=1")
    await Door(leases, frozenset(arguments.user)).keep_open(arguments.socket, stop)
    for lease in set(leases.held.values()):
        leases.end(lease, "the keeper stops")
    if leases.returning:
        await asyncio.wait(leases.returning.values(), timeout=GIVE_BACK_S)


def tell_systemd(what: bytes) -> None:
    """As sd_notify(3) does; nobody hears it where systemd did not start the process."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker:
            speaker.sendto(what, "\0" + address[1:] if address[0] == "@" else address)


def gpu_clocks(text: str) -> tuple[str, Lock]:
    """ "GPU-...=600-1410": a UUID and a range of MHz."""
    uuid, _, clocks = text.partition("=")
    low, _, high = clocks.partition("-")
    return uuid, Lock(int(low), int(high))


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="throttllem keeper", description=__doc__)
    gpu = partial(parser.add_argument, type=gpu_clocks, action="append", metavar="UUID=LOWEST-HIGHEST")
    gpu("--gpu", required=True, help="a GPU whose clock may be set, and to what MHz")
    gpu("--normally", default=[], help="the lock that is there while nobody asks for a clock, if there is one")
    parser.add_argument("--user", default=[], type=lambda name: pwd.getpwnam(name).pw_uid, action="append")
    parser.add_argument("--socket", default=Path("/run/throttllem/keeper.sock"), type=Path)
    parser.add_argument("--state", default=Path("/var/lib/throttllem"), type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Keep clocks, then end the process."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    told = parsed(arguments)
    if hold_dir(told.state) is None:
        raise SystemExit(f"{told.state}: another keeper runs there")
    with Nvml() as nvml:
        asyncio.run(keep(told, nvml, Path("/proc/sys/kernel/random/boot_id").read_text().strip()))
        os._exit(0)  # threads of calls that hang would be waited for


if __name__ == "__main__":
    main()
