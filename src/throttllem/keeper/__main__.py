"""The keeper's process: a Unix socket, one JSON object a line in and out, one lease a connection. It ends with it."""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import struct
import time
from functools import partial
from pathlib import Path
from typing import Any

from throttllem.files import hold_dir
from throttllem.gpu.nvml import Lock, Nvml
from throttllem.keeper.journal import Journal, log, places
from throttllem.keeper.leases import Gone, Lease, Leases, RefusedError

LINE_BYTES, CONNECTIONS, RESTORE_S, LOOK_S, PAUSE_S, SAY_S, UNSAID_S = 4096, 32, 5.0, 0.1, 1.0, 5.0, 250.0
BOOT = Path("/proc/sys/kernel/random/boot_id")


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
                await asyncio.sleep(0)  # however much is asked at once, all others have their turn
                try:
                    asked, holder = json.loads(line.decode()), f"process {pid} of user {uid}"
                    answer = {"ok": True, **await self._answer(asked, mine, holder, reader.at_eof)}
                except RefusedError as error:
                    answer = {"ok": False, "code": error.args[0], "error": error.args[1]}
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (Exception, asyncio.CancelledError) as error:  # whatever it said, or the keeper stops: only it ends
            log.warning("process %d of user %d is cut off: %.200r", pid, uid, error)
        finally:
            self._open -= 1
            for lease in mine:
                self._leases.end(lease, "its holder is gone")
            writer.transport.abort()  # what it did not read would keep the socket open, and nobody would count it

    async def _answer(self, asked: dict[str, Any], mine: list[Lease], holder: str, gone: Gone) -> dict[str, Any]:
        leases, what = self._leases, asked["op"]
        if what == "status":
            held = {uuid: {"by": lease.holder, "mhz": lease.mhz} for uuid, lease in leases.held.items()}
            given = {"allowed": leases.clocks, "normally": leases.normally, "before": leases.baselines}
            return {**given, "held": held, "returning": list(leases.returning)}
        if what == "lease" and not mine:
            gpus, ttl_s = (typed(uuid, str) for uuid in typed(asked["gpus"], list)), typed(asked["ttl_s"], int, float)
            mine.append(leases.take(tuple(gpus), float(ttl_s), holder, gone))
        elif what == "set" and mine:
            await leases.set(mine[0], typed(asked["mhz"], int))
        elif what == "beat" and mine:
            leases.beat(mine[0])
        elif what == "release" and mine:
            leases.end(lease := mine.pop(), "released by its holder")
            await asyncio.gather(*(leases.returning[uuid] for uuid in lease.gpus if uuid in leases.returning))
        else:
            raise RefusedError("malformed", "one lease a connection, then beat, set or release; status at any time")
        return {}

    async def keep_open(self, path: Path, stop: asyncio.Event) -> None:
        """Listen at `path` until `stop`; where the socket was taken away, at a new one."""
        while not stop.is_set():
            try:
                path.unlink(missing_ok=True)
                with contextlib.closing(await asyncio.start_unix_server(self.enter, path, limit=LINE_BYTES)):
                    path.chmod(0o666)  # who may come in is asked of the kernel, connection by connection
                    mine = path.stat().st_ctime_ns
                    tell_systemd(b"READY=1")
                    while not stop.is_set() and path.stat().st_ctime_ns == mine:
                        await asyncio.sleep(LOOK_S)
            except OSError as error:
                log.warning("nobody can connect: %s", error)
            await asyncio.sleep(LOOK_S)


async def keep(told: argparse.Namespace, nvml: Nvml, boot: str, stop: asyncio.Event) -> None:
    """Until `stop`; then every GPU is restored."""
    leases = Leases(nvml, dict(told.gpu), dict(told.normally), Journal(places(told.state, told.socket), boot))
    leases.restore(leases.baselines)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    sweeping = asyncio.ensure_future(leases.sweep(partial(tell_systemd, b"WATCHDOG=1")))
    listening = asyncio.ensure_future(Door(leases, frozenset(told.user)).keep_open(told.socket, stop))
    done, _ = await asyncio.wait([sweeping, listening], return_when=asyncio.FIRST_COMPLETED)
    leases.clocks = {}  # nobody gets a lease any more
    for lease in set(leases.held.values()):
        leases.end(lease, "the keeper stops")
    await asyncio.wait([*done, *leases.returning.values()], timeout=RESTORE_S)
    await asyncio.gather(*done)  # what failed is said at the end


def typed(value: Any, *types: type) -> Any:
    """A field of a request, as it is. Raises TypeError where it is of another type; true and false are no numbers."""
    if type(value) not in types:
        raise TypeError(f"{type(value).__name__} in the place of {types[-1].__name__}")
    return value


def tell_systemd(what: bytes) -> None:
    """As sd_notify(3) does; where systemd does not listen, or not now, nobody hears it."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker:
            speaker.sendto(what, socket.MSG_DONTWAIT, "\0" + address[1:] if address[0] == "@" else address)


def gpu_clocks(text: str) -> tuple[str, Lock]:
    """ "GPU-...=600-1410": a UUID and a range of MHz."""
    return text.partition("=")[0], Lock(*map(int, text.partition("=")[2].split("-")))


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="throttllem keeper", description=__doc__)
    gpu = partial(parser.add_argument, type=gpu_clocks, action="append", metavar="UUID=LOWEST-HIGHEST")
    gpu("--gpu", required=True, help="a GPU whose clock may be set, and to what MHz")
    gpu("--normally", default=[], help="baseline: the lock to restore after a lease; without it, a reset")
    parser.add_argument("--user", default=[], type=int, action="append", help="user id that may connect, beside root")
    parser.add_argument("--socket", default=Path("/run/throttllem/keeper.sock"), type=Path)
    parser.add_argument("--state", default=Path("/var/lib/throttllem"), type=Path)
    return parser.parse_args(arguments)


def seldom(due_s: dict[str, float], said: logging.LogRecord) -> bool:
    """Whether a line is said: of each kind one every SAY_S, however often clients cause it, and at once those that were
    not needed in the UNSAID_S before. `due_s`: when the next one is.
    """
    now_s = time.monotonic()
    next_s = max(due_s.get(said.msg, now_s - UNSAID_S), now_s - UNSAID_S)
    due_s[said.msg] = next_s + SAY_S if next_s < now_s else next_s
    return next_s < now_s


def crash(_: object, context: dict[str, Any]) -> None:
    """What must not fail has, for want of memory, say: end at once, the next keeper restores by the journal."""
    if not isinstance(context.get("exception"), OSError):
        try:
            log.critical("the keeper ends: %s", context)
        finally:  # to say so takes memory, too
            os._exit(1)


def main(arguments: list[str] | None = None) -> None:
    """Keep clocks, then end the process at once: threads of calls that hang would be waited for."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    log.addFilter(partial(seldom, {}))
    told = parsed(arguments)
    try:
        with contextlib.suppress(OSError):  # one copy of the journal will do
            told.state.mkdir(parents=True, exist_ok=True)
        if hold_dir(told.socket.parent) is None:
            raise OSError(f"{told.socket.parent}: another keeper runs there")
        with Nvml() as nvml, asyncio.Runner() as runner:
            runner.get_loop().set_exception_handler(crash)
            runner.run(keep(told, nvml, BOOT.read_text(encoding="utf-8").strip(), asyncio.Event()))
            os._exit(0)
    except Exception as error:
        log.error("%s", error, exc_info=not isinstance(error, OSError))
        time.sleep(PAUSE_S)  # whoever starts it again at once does so in vain
        os._exit(1)


if __name__ == "__main__":
    main()
