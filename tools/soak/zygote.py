"""A process that has imported everything and forks what a schedule needs: a keeper, gateways, engines, a stranger.

It does one thing at a time, in one thread, and keeps nothing: who asks gets a file descriptor of the new process.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy.ma
import numpy.random

from tools.soak import engine_process, gateway_process, keeper_process, stranger_process

Told = dict[str, Any]
ROLES: Mapping[str, Callable[[Told], None]] = {
    "keeper": keeper_process.run,
    "gateway": gateway_process.run,
    "engine": engine_process.run,
    "stranger": stranger_process.run,
}
"""Each is told at least "role", "log" (a file) and "environment"."""

_USED_LATER = (numpy.ma, numpy.random)
"""Imported here, or every gateway would import them anew."""
_PR_SET_PDEATHSIG = 1
_REAP_S = 0.2
_MOST_BYTES = 1 << 16


class Zygote:
    """The one side of it: asks for processes."""

    def __init__(self, channel: socket.socket, pid: int) -> None:
        self._channel, self.pid = channel, pid

    @classmethod
    def start(cls) -> Zygote:
        """Fork it, with everything that is imported now. Call it before there is a second thread."""
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        gc.collect()
        gc.freeze()  # so that no collection touches, and copies, what all have in common
        pid = os.fork()
        if pid == 0:
            mine.close()
            die_with_parent()
            _serve(its)
        its.close()
        return cls(mine, pid)

    def fork(self, told: Told) -> tuple[int, int, socket.socket]:
        """A new process: its id, its pidfd, and a socket whose other end it has as told["control"]."""
        self._channel.send(json.dumps(told).encode())
        answer, handles, _, _ = socket.recv_fds(self._channel, _MOST_BYTES, 2)
        if not answer:
            raise RuntimeError("the zygote is gone")
        return int(answer), handles[0], socket.socket(fileno=handles[1])

    def end(self) -> None:
        """No more processes; those that it forked die with it."""
        self._channel.close()
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def die_with_parent() -> None:
    """This process is killed when the thread that forked it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(channel: socket.socket) -> None:
    """Until the other side is gone."""
    while True:
        if select.select([channel], [], [], _REAP_S)[0]:
            asked = channel.recv(_MOST_BYTES)
            if not asked:
                os._exit(0)
            _answer(channel, json.loads(asked))
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _answer(channel: socket.socket, told: Told) -> None:
    mine, its = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        channel.close()
        mine.close()
        _become(told, its)
    its.close()
    handle = os.pidfd_open(pid)
    socket.send_fds(channel, [str(pid).encode()], [handle, mine.fileno()])
    os.close(handle)
    mine.close()


def _become(told: Told, control: socket.socket) -> None:
    """The rest of this process's life."""
    code = 1
    try:
        die_with_parent()
        log = os.open(told["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        faulthandler.register(signal.SIGUSR1)
        os.environ.update(told["environment"])
        ROLES[told["role"]](told | {"control": control})
        code = 0
    except SystemExit as error:
        print(error, file=sys.stderr)
    except BaseException:  # nobody else would say it
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
