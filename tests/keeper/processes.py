"""Keepers, and processes of other users, forked on demand: what they need is imported once, and each is real."""

import collections
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import typer

import throttllem.doctor.examine
import throttllem.doctor.restore
import throttllem.gpu.keeper_client
import throttllem.keeper.unit
from tests.keeper.client import Client
from throttllem.cli.commands.doctor import doctor
from throttllem.keeper import __main__ as keeper
from throttllem.physics.catalogue import Catalogue
from tools.nvml import build
from tools.testbed.fork_server import fork_server

LIMIT_S = 10
IMPORTED_LATER = (
    throttllem.doctor.examine,
    throttllem.doctor.restore,
    throttllem.gpu.keeper_client,
    throttllem.keeper.unit,
)
"""By `doctor`, when it runs: a child without rights can read no file of the package."""


def keep(order):
    """A keeper as it is."""
    keeper.main(order["arguments"])


def keep_until_told_to_hang(order):
    """A keeper whose loop stands still after SIGUSR1."""
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(60))
    keeper.main(order["arguments"])


def keep_watched(order):
    """A keeper that writes down whatever Python does for it: files, sockets, programs, imports, code."""
    notes = Path(order["seen"]).open("a", buffering=1)  # noqa: SIM115
    watched = (
        "open",
        "socket.connect",
        "socket.bind",
        "subprocess",
        "os.",
        "exec",
        "compile",
        "import",
        "ctypes.dlopen",
    )

    def hear(event, what):
        if event.startswith(watched):
            notes.write(json.dumps([event, *map(str, what)]) + "\n")

    sys.addaudithook(hear)
    keeper.main(order["arguments"])


def become(uid):
    """That user, without any right that is ours and not that user's."""
    if uid is not None:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)


def examine(order):
    """`throttllem doctor`, of a user; the command line is read, with all that is imported for it, before."""
    app = typer.Typer(add_completion=False)
    app.command()(doctor)
    Catalogue.load()
    version("throttllem")  # what it imports may not be ours to read soon
    command = typer.main.get_command(app)
    with command.make_context("doctor", order["arguments"]) as context:
        become(order.get("uid"))
        try:
            command.invoke(context)
        except typer.Exit as end:
            raise SystemExit(end.exit_code) from end


def speak(order):
    """Another user's process: sends its lines, prints each answer, then stays a while."""
    become(order["uid"])
    with Client(Path(order["socket"])) as client:
        for line in order["lines"]:
            try:
                print(json.dumps(client.request(**line)), flush=True)
            except OSError as error:
                print(json.dumps(type(error).__name__), flush=True)
        time.sleep(order.get("stay_s", 0.0))


def flood(order):
    """Another user's process: for as long as it lives it connects, without waiting, and sends lines that never end."""
    become(order["uid"])
    held = collections.deque(maxlen=100)
    print("flooding", flush=True)
    while True:
        one = socket.socket(socket.AF_UNIX)
        one.setblocking(False)
        with contextlib.suppress(OSError):
            one.connect(order["socket"])
            one.send(b'{"op":"status"}\n' * order["lines"] + b"x" * 500)
        held.append(one)


def touch(order):
    """Another user's process: which of these files it can write, remove or read."""
    become(order["uid"])
    for path in map(Path, order["paths"]):
        done = []
        with contextlib.suppress(OSError):
            path.read_bytes()
            done.append("read")
        with contextlib.suppress(OSError), path.open("ab"):
            done.append("written")
        with contextlib.suppress(OSError):
            path.unlink()
            done.append("removed")
        print(json.dumps(done), flush=True)


def hold_on(order):
    """A client with a lease that leaves, at the end, a child with its connection behind."""
    client = Client(Path(order["socket"]))
    client.request("lease", gpus=order["gpus"], ttl_s=order["ttl_s"])
    client.request("set", mhz=order["mhz"])
    if order["fork"] and not os.fork():
        time.sleep(30)
        os._exit(0)
    print("held", flush=True)
    time.sleep(0 if order["fork"] else 30)


ROLES = {
    each.__name__: each for each in (keep, keep_until_told_to_hang, keep_watched, examine, speak, flood, touch, hold_on)
}


class Processes:
    """Starts and waits for them; nothing of them outlives the tests."""

    def __init__(self, server, first):
        self._server, self._first = server, first

    def start(self, role, log, environment, **order):
        """A process id."""
        forked = self._server.fork(role, log=str(log), environment=environment, **order)
        os.close(forked.pidfd)
        forked.control.close()
        return forked.pid

    def exit_code(self, pid, within_s=0.0):
        """None: it has not ended."""
        return self._server.exit_code(pid, within_s)

    def wait(self, pid, within_s=LIMIT_S):
        """Its exit code, -N for signal N; a process that does not end is a fault."""
        code = self.exit_code(pid, within_s)
        assert code is not None, f"process {pid} is still there after {within_s} s"
        return code

    @contextlib.contextmanager
    def without_driver(self):
        """What is started meanwhile finds, before any NVML, a file that is no library."""
        self._first.touch()
        try:
            yield
        finally:
            self._first.unlink()


@contextlib.contextmanager
def keeper_processes(library):
    with tempfile.TemporaryDirectory() as first:
        environment = {"LD_LIBRARY_PATH": f"{first}:{library}", "ZEUSD_SOCK_PATH": "/nonexistent/zeusd.sock"}
        environment["NOTIFY_SOCKET"] = ""
        with fork_server("tests.keeper.processes", environment=environment) as server:
            yield Processes(server, Path(first) / build.NAME)
