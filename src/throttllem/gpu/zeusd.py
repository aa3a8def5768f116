"""Clocks set through zeusd, the daemon of the Zeus project, where a site has it in the keeper's place.

zeusd remembers nothing: the GPUs that were set are remembered here, and their clocks are reset only if this process
lives to do it. Its HTTP interface is that of zeus 0.16 (`zeus/utils/zeusd.py`).
"""

from __future__ import annotations

import asyncio
import http.client
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlencode

from throttllem.gpu.device import nothing
from throttllem.gpu.nvml import NvmlGpu

_TIMEOUT_S = 3.0


class ZeusdError(OSError):
    """zeusd did not do it."""


def reach(path: Path) -> None:
    """Whether one listens there and lets us in; asks it nothing. Raises ZeusdError."""
    connection = _UnixConnection(path)
    try:
        connection.connect()
    except OSError as error:
        raise _away(path, error) from error
    finally:
        connection.close()


class ZeusdClocks:
    """The clocks of some GPUs."""

    def __init__(self, path: Path, gpus: Sequence[NvmlGpu]) -> None:
        self._path, self._gpus = path, tuple(gpus)
        self._touched: list[NvmlGpu] = []
        self._thread = ThreadPoolExecutor(1)
        """Calls keep their order: a reset comes after the set before it, even if nobody waits for that any more."""

    async def set(self, mhz: int, sent: Callable[[], None] = nothing) -> int:
        """Lock all of them to a clock. Raises OSError."""
        sent()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._set, mhz)
        return mhz

    async def give_back(self) -> None:
        """Reset the clocks of all that were set. Raises OSError."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._reset)

    def _set(self, mhz: int) -> None:
        self._touched = list(self._gpus)
        self._post("set_gpu_locked_clocks", self._gpus, {"min_clock_mhz": mhz, "max_clock_mhz": mhz})

    def _reset(self) -> None:
        failed: OSError | None = None
        for gpu in list(self._touched):  # one that fails does not keep the others locked
            try:
                self._post("reset_gpu_locked_clocks", (gpu,), {})
                self._touched.remove(gpu)
            except OSError as error:
                failed = error
        if failed is not None:
            raise failed

    def _post(self, what: str, gpus: Sequence[NvmlGpu], more: dict[str, int]) -> None:
        fields = {"gpu_ids": ",".join(str(gpu.index()) for gpu in gpus), **more, "block": "true"}
        connection = _UnixConnection(self._path)
        try:
            connection.request("POST", f"/gpu/{what}?{urlencode(fields)}")
            answer = connection.getresponse()
            said = answer.read(500).decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise _away(self._path, error) from error
        finally:
            connection.close()
        if answer.status != http.client.OK:
            raise ZeusdError(f"zeusd {self._path}: {what}: HTTP {answer.status} {said}")


def _away(path: Path, error: Exception) -> ZeusdError:
    return ZeusdError(f"zeusd {path}: {error}; is it running, and may this user connect?")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(str(self._path))
