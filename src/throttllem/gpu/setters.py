"""The ways to set clocks without being root: through the keeper, or through zeusd where a site runs one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from throttllem.gpu.keeper_client import TTL_S, KeeperClient
from throttllem.gpu.nvml import NvmlGpu
from throttllem.gpu.zeusd import ZeusdClient


class ClockClient(Protocol):
    """Client of a process that may set clocks. Sets those of a group of GPUs: of all of them, or of none."""

    async def set(self, mhz: int, sent: Callable[[], None] | None = None) -> int:
        """Lock them to a clock; `sent` is called when the command is on its way. Returns the clock that they are set
        to, which may be the nearest one that is allowed. Raises OSError.
        """

    async def restore(self) -> None:
        """Undo every `set`. Raises OSError."""


MakeClient = Callable[[tuple[NvmlGpu, ...], Callable[[str], None]], ClockClient]
"""Makes the client of a group of GPUs. It calls its second argument, with the reason, when they were restored without
being asked while no command was under way (zeusd never restores)."""


def clock_setter(*, keeper: Path, zeusd: Path | None = None, ttl_s: float = TTL_S) -> MakeClient:
    """Makes the client for a group of GPUs, once they are found: of zeusd if its socket is given, else of the keeper.
    Connects to neither yet.
    """
    if zeusd is not None:
        return lambda gpus, lost: ZeusdClient(zeusd, gpus)
    return lambda gpus, lost: KeeperClient(keeper, tuple(gpu.uuid for gpu in gpus), ttl_s, lost)
