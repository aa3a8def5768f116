"""Forks keepers, and processes of other users, on demand: what they need is imported once, and each is real.

Orders come in on standard input, one JSON object a line; answers go out in the same way. Started by `rig`.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.metadata import version
from pathlib import Path

import typer

# What `doctor` imports when it runs: a child without rights can read no file of the package.
import throttllem.doctor.examine
import throttllem.doctor.restore
import throttllem.gpu.keeper_client
import throttllem.keeper.unit  # noqa: F401
from tests.keeper.client import Client
from throttllem.cli.commands.doctor import doctor
from throttllem.keeper import __main__ as keeper
from tools.nvml import build

LIMIT_S = 10
DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG: nothing outlives the tests, however they end."""


def keep(arguments):
    """A keeper as it is."""
    keeper.main(arguments)


def keep_until_told_to_hang(arguments):
    """A keeper whose loop stands still after SIGUSR1."""
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(60))
    keeper.main(arguments)


def keep_watched(arguments, seen):
    """A keeper that writes down whatever Python does for it: files, sockets, programs, imports, code."""
    notes = Path(seen).open("a", buffering=1)  # noqa: SIM115
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
    keeper.main(arguments)


def become(uid):
    """That user, with nothing that we may and he may not."""
    if uid is not None:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)


def examine(arguments, uid=None):
    """`throttllem doctor`, of a user; the command line is read, with all that is imported for it, before."""
    app = typer.Typer(add_completion=False)
    app.command()(doctor)
    version("throttllem")  # what it imports may not be ours to read soon
    command = typer.main.get_command(app)
    with command.make_context("doctor", arguments) as context:
        become(uid)
        try:
            command.invoke(context)
        except typer.Exit as end:
            raise SystemExit(end.exit_code) from end


def speak(socket, uid, lines, stay_s=0.0):
    """Another user's process: says its lines, prints each answer, then stays a while."""
    become(uid)
    with Client(Path(socket)) as client:
        for line in lines:
            try:
                print(json.dumps(client.request(**line)), flush=True)
            except OSError as error:
                print(json.dumps(type(error).__name__), flush=True)
        time.sleep(stay_s)


def touch(uid, paths):
    """Another user's process: which of these files it can write, remove or read."""
    become(uid)
    for path in map(Path, paths):
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


def hold_on(socket, gpus, mhz, ttl_s, fork):
    """A holder that leaves, at the end, a child with its connection behind."""
    client = Client(Path(socket))
    client.request("lease", gpus=gpus, ttl_s=ttl_s)
    client.request("set", mhz=mhz)
    if fork and not os.fork():
        time.sleep(30)
        os._exit(0)
    print("held", flush=True)
    time.sleep(0 if fork else 30)


WHAT = {each.__name__: each for each in (keep, keep_until_told_to_hang, keep_watched, examine, speak, touch, hold_on)}


def start(order):
    """Its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(number, target)
        os.closerange(3, 100)
        os.environ.update(order["environment"])
        WHAT[order["what"]](**order["with"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        print("" if isinstance(end.code, int) else end.code, end="", flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def wait(pid, within_s):
    """Its exit code, -N for signal N; None: it is still there."""
    ends_s = time.monotonic() + within_s
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > ends_s:
            return None
        time.sleep(0.002)


class Nursery:
    """The tests' side."""

    def __init__(self, library):
        self._first = tempfile.TemporaryDirectory()
        self._first_file = Path(self._first.name) / build.NAME
        environment = os.environ | {"LD_LIBRARY_PATH": f"{self._first.name}:{library}"}
        environment.pop("NOTIFY_SOCKET", None)
        environment["ZEUSD_SOCK_PATH"] = "/nonexistent/zeusd.sock"
        command = [sys.executable, "-m", "tests.keeper.nursery"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, bufsize=1
        )

    def _order(self, **order):
        self._process.stdin.write(json.dumps(order) + "\n")
        return json.loads(self._process.stdout.readline())

    def start(self, what, log, environment, **given):
        """A process id."""
        return self._order(do="start", what=what, log=str(log), environment=environment, **{"with": given})

    def wait(self, pid, within_s=LIMIT_S):
        """As `wait`, but a process that is still there is a fault."""
        code = self._order(do="wait", pid=pid, within_s=within_s)
        assert code is not None, f"process {pid} is still there after {within_s} s"
        return code

    @contextlib.contextmanager
    def without_driver(self):
        """What is started meanwhile finds, before any NVML, a file that is no library."""
        self._first_file.touch()
        try:
            yield
        finally:
            self._first_file.unlink()

    def close(self):
        self._first.cleanup()
        self._process.stdin.close()
        self._process.wait(LIMIT_S)
        self._process.stdout.close()


def main():
    for line in sys.stdin:
        order = json.loads(line)
        done = start(order) if order.pop("do") == "start" else wait(**order)
        print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main()
