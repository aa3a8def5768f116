"""Who sets clocks for us: the keeper, or a zeusd where a site has one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from throttllem.gpu.hardware import ClockSetter
from throttllem.gpu.keeper_client import TTL_S, KeptClocks
from throttllem.gpu.nvml import NvmlGpu
from throttllem.gpu.zeusd import ZeusdClocks


def clock_setter(
    *, keeper: Path, zeusd: Path | None = None, ttl_s: float = TTL_S
) -> Callable[[tuple[NvmlGpu, ...]], ClockSetter]:
    """Makes the setter of a group of GPUs; reaches nobody yet."""
    if zeusd is not None:
        return lambda gpus: ZeusdClocks(zeusd, gpus)
    return lambda gpus: KeptClocks(keeper, tuple(gpu.uuid for gpu in gpus), ttl_s)
