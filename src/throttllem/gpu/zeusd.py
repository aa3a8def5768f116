"""Client of zeusd, the daemon of the Zeus project, which can set clocks instead of the keeper where a site runs it.

zeusd holds no leases: this client remembers which GPUs it set, and their clocks are reset only if this process lives to
do it. The HTTP interface is that of zeus 0.16 (`zeus/utils/zeusd.py`).
"""

from __future__ import annotations

import asyncio
import http.client
import os
import socket
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlencode

from throttllem.gpu.nvml import NvmlGpu

_TIMEOUT_S = 3.0


class ZeusdError(OSError):
    """zeusd could not be reached, or rejected a request."""


def reach(path: Path) -> None:
    """Connect to its socket, without a request. Raises ZeusdError if there is none, or if this user may not connect."""
    connection = _UnixConnection(path)
    try:
        connection.connect()
    except OSError as error:
        raise _unreachable(path, error) from error
    finally:
        connection.close()


class ZeusdClient:
    """Sets the clocks of some GPUs through zeusd."""

    def __init__(self, path: Path, gpus: Sequence[NvmlGpu]) -> None:
        self._path, self._gpus = path, tuple(gpus)
        self._touched: list[NvmlGpu] = []
        self._thread = ThreadPoolExecutor(1)
        """One thread, so that requests stay in order: a reset comes after the set before it, even if that was
        cancelled."""

    async def set(self, mhz: int, sent: Callable[[], None] | None = None) -> int:
        """Lock all GPUs to a clock. Raises OSError."""
        if sent is not None:
            sent()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._set, mhz)
        return mhz

    async def restore(self) -> None:
        """Reset the clocks of all GPUs that were set. Raises OSError."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._reset)

    def _set(self, mhz: int) -> None:
        self._touched = list(self._gpus)
        self._post("set_gpu_locked_clocks", self._gpus, {"min_clock_mhz": mhz, "max_clock_mhz": mhz})

    def _reset(self) -> None:
        failed: OSError | None = None
        for gpu in list(self._touched):  # one that fails does not leave the other GPUs locked
            try:
                self._post("reset_gpu_locked_clocks", (gpu,), {})
                self._touched.remove(gpu)
            except OSError as error:
                failed = error
        if failed is not None:
            raise failed

    def _post(self, command: str, gpus: Sequence[NvmlGpu], parameters: dict[str, int]) -> None:
        query = {"gpu_ids": ",".join(str(gpu.index()) for gpu in gpus), **parameters, "block": "true"}
        connection = _UnixConnection(self._path)
        try:
            connection.request("POST", f"/gpu/{command}?{urlencode(query)}")
            response = connection.getresponse()
            body = response.read(500).decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise _unreachable(self._path, error) from error
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise ZeusdError(f"zeusd {self._path}: {command}: HTTP {response.status} {body}")


def _unreachable(path: Path, error: Exception) -> ZeusdError:
    return ZeusdError(f"zeusd {path}: {error}; is it running, and may this user connect?")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(str(self._path))
        _, uid, _ = struct.unpack("iII", self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (0, os.geteuid()):
            raise PermissionError(f"user {uid} listens there, and only root's zeusd is trusted to set clocks")
