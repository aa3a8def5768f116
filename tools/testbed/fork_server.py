"""A process that has imported everything and forks what a test needs: each a real process that starts in a millisecond.

It is started as a command, so that its user may have threads; it has one thread and does one thing at a time. What can
be forked is a module's `ROLES`: functions by name, each called in its new process with one order. Nothing outlives it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tools.testbed.processes import ROOT

Order = dict[str, Any]
Roles = Mapping[str, Callable[[Order], None]]
START_S, END_S = 60.0, 10.0
_PR_SET_PDEATHSIG = 1
_REAP_S = 0.2
_MOST_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Forked:
    """A new process: its id, its pidfd, and a socket whose other end it has as order["control"]."""

    pid: int
    pidfd: int
    control: socket.socket


class ForkServer:
    """The user's side."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel

    def fork(self, role: str, *, log: str, environment: Mapping[str, str], **order: object) -> Forked:
        """Run a role in a new process, which leads a group; its output is appended to `log`."""
        known = {"role": role, "log": log, "environment": dict(environment)}
        self._channel.send(json.dumps(known | order).encode())
        answer, handles, _, _ = socket.recv_fds(self._channel, _MOST_BYTES, 2)
        if not answer:
            raise RuntimeError("the fork server has ended")
        return Forked(int(answer), handles[0], socket.socket(fileno=handles[1]))

    def exit_code(self, pid: int, within_s: float) -> int | None:
        """The exit code of a process that it forked, -N for signal N; None: it has not ended in time."""
        until_s = time.monotonic() + within_s
        while True:
            self._channel.send(json.dumps({"ended": pid}).encode())
            code: int | None = json.loads(self._channel.recv(_MOST_BYTES))
            if code is not None or time.monotonic() > until_s:
                return code
            time.sleep(0.002)


@contextmanager
def fork_server(module: str, *, environment: Mapping[str, str] | None = None) -> Iterator[ForkServer]:
    """One with the roles of this module, until the block ends; its processes end with it."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with its:
            process = subprocess.Popen(
                [sys.executable, "-m", "tools.testbed.fork_server", module, str(its.fileno()), str(os.getpid())],
                # A process with threads must not fork.
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"} | dict(environment or {}),
                cwd=ROOT,
                pass_fds=(its.fileno(),),
            )
        try:
            ours.settimeout(START_S)
            ours.recv(_MOST_BYTES)
            ours.settimeout(None)
            yield ForkServer(ours)
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
            process.kill()
            process.wait()


# ---- the server's side ---------------------------------------------------------------------------------------


def _serve(channel: socket.socket, roles: Roles) -> None:
    """Until its user is gone."""
    codes: dict[int, int] = {}
    while True:
        if select.select([channel], [], [], _REAP_S)[0]:
            data = channel.recv(_MOST_BYTES)
            if not data:
                return
            order = json.loads(data)
            _reap(codes)
            if "ended" in order:
                channel.send(json.dumps(codes.get(order["ended"])).encode())
            else:
                _fork(channel, roles, order)
        _reap(codes)


def _reap(codes: dict[int, int]) -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            codes[pid] = os.waitstatus_to_exitcode(status)


def _fork(channel: socket.socket, roles: Roles, order: Order) -> None:
    ours, its = socket.socketpair()
    server = os.getpid()
    pid = os.fork()
    if pid == 0:
        channel.close()
        ours.close()
        _become(roles, order, its, server)
    its.close()
    pidfd = os.pidfd_open(pid)
    socket.send_fds(channel, [str(pid).encode()], [pidfd, ours.fileno()])
    os.close(pidfd)
    ours.close()


def _become(roles: Roles, order: Order, control: socket.socket, server: int) -> None:
    """The rest of this process's life."""
    code = 1
    try:
        os.setsid()
        die_with(server)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for target in (1, 2):
            os.dup2(log, target)
        os.close(log)
        faulthandler.register(signal.SIGUSR1)
        os.environ.update(order["environment"])
        roles[order["role"]](order | {"control": control})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        print("" if end.code is None or isinstance(end.code, int) else end.code, end="")
    except BaseException:  # nothing else would show it
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def die_with(parent: int) -> None:
    """This process is killed when the thread of its parent that made it ends, or now if that one has ended already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """`python -m tools.testbed.fork_server MODULE DESCRIPTOR PARENT`."""
    module, descriptor, parent = sys.argv[1:]
    die_with(int(parent))
    roles: Roles = importlib.import_module(module).ROLES
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    gc.collect()
    gc.freeze()  # so that no collection touches, and copies, what all have in common
    channel = socket.socket(fileno=int(descriptor))
    channel.send(b"ready")
    _serve(channel, roles)


if __name__ == "__main__":
    main()
