"""What a GPU is made of: clocks, watts, limits, how long a switch takes. The catalogue's GPUs as parts of a machine.

How long: a switch takes from a few to a dozen milliseconds, and that depends most on the target clock
(arXiv 2502.20075). Here by a hash of it: so half the targets take less than the median, and none more than the largest.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

SWITCH_MS = (4.5, 13.0)
BATCH = 32
CONTEXT_TOKENS = 1000
"""The reference load: what util 1 draws."""


class PartError(ValueError):
    """A part that no GPU can be; the message names field and fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One GPU as it leaves the factory. `busy_w` at util 1, one per clock; clocks ascending."""

    name: str
    uuid: str
    clocks_mhz: tuple[int, ...]
    idle_w: float
    busy_w: tuple[float, ...]
    limit_w: float
    limit_min_w: float | None = None
    limit_max_w: float | None = None
    """None: a quarter of the default limit, and the limit itself."""
    idle_mhz: int | None = None
    """What an unlocked idle GPU falls to; None: the lowest."""
    boost_mhz: int | None = None
    """What an unlocked busy GPU reaches, without any clock event reason; None: the highest. GeForce stays below it."""
    context_keeps_clock: bool = False
    """An H100 with a context idles at its top clock."""
    switch_ms: tuple[float, float] = SWITCH_MS
    """Median and largest over all targets; (0, 0): at once."""
    refresh_s: float = 0.1
    """How often the energy counter moves; 0: always."""
    memory_mhz: int = 1215
    memory_bytes: int = 40 * 2**30
    memory_bus_bits: int | None = None
    cores: int | None = None
    """CUDA cores. These two None: the driver does not report them."""
    pci_device_id: int = 0x20B010DE
    capability: tuple[int, int] = (8, 0)
    architecture: int = 7
    """NVML_DEVICE_ARCH_AMPERE."""

    def __post_init__(self) -> None:
        """Raises PartError."""
        clocks, top = self.clocks_mhz, 256
        _require(0 < len(clocks) <= top and list(clocks) == sorted(set(clocks)), f"clocks_mhz: ascending, 1 to {top}")
        _require(clocks[0] > 0, "clocks_mhz: above 0")
        _require(len(self.busy_w) == len(clocks), "busy_w: one per clock")
        _require(list(self.busy_w) == sorted(self.busy_w), "busy_w: not falling with the clock")
        _require(0 < self.idle_w <= self.busy_w[0], "idle_w: above 0, at most the lowest busy_w")
        _require(0 < self.limits_w[0] <= self.limit_w <= self.limits_w[1], "limit_w: within its smallest and largest")
        _require(self.idle_mhz is None or self.idle_mhz in clocks, "idle_mhz: one of clocks_mhz")
        _require(self.boost_mhz is None or self.boost_mhz in clocks, "boost_mhz: one of clocks_mhz")
        _require(0 <= self.switch_ms[0] <= self.switch_ms[1], "switch_ms: median, then largest")
        _require(self.refresh_s >= 0, "refresh_s: at least 0")
        _require(self.uuid.startswith("GPU-") and len(self.uuid) < 48, "uuid: GPU-..., under 48 characters")
        _require(0 < len(self.name.encode()) < 96, "name: 1 to 95 bytes")

    @property
    def limits_w(self) -> tuple[float, float]:
        """The smallest and the largest power limit that can be set."""
        return self.limit_min_w or self.limit_w / 4, self.limit_max_w or self.limit_w

    def switch_s(self, target_mhz: int) -> float:
        """How long a switch to that clock takes. 0 to 1 by hash: the median at a half, the largest at 1."""
        median, largest = self.switch_ms
        if median <= 0:
            return 0.0
        place = int.from_bytes(hashlib.sha256(f"{target_mhz} MHz".encode()).digest()[:4], "big") / 2**32
        return median * math.pow(largest / median, 2 * place - 1) / 1000


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise PartError(message)


def uuid_of(index: int) -> str:
    """A made-up one, the same on every run."""
    digits = hashlib.sha256(f"fake GPU {index}".encode()).hexdigest()
    return f"GPU-{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:32]}"


def catalogue_parts(gpu: str, n: int, *, model: str = "llama-3-8b", tp: int = 1, **fields: Any) -> tuple[Part, ...]:
    """`n` GPUs of throttllem's catalogue; busy watts are those of a model at the reference load on `tp` GPUs."""
    from throttllem.physics.catalogue import Catalogue  # noqa: PLC0415 - nothing else of the package needs throttllem
    from throttllem.physics.engine import EnginePhysics  # noqa: PLC0415

    catalogue = Catalogue.load()
    kind = catalogue.gpu(gpu)
    physics = EnginePhysics(kind, catalogue.model(model), tp)
    clocks = kind.clocks_mhz
    watts = (physics.iteration(clock, BATCH, BATCH * CONTEXT_TOKENS, 0, 0.0)[1] / tp for clock in clocks)
    busy = tuple(accumulate(watts, max))  # above the law's ceiling they fall by a few tenths of a per cent
    bits, capability = 4096, kind.compute_capability or "8.0"
    known: dict[str, Any] = {
        "name": next(iter(kind.nvml_names), gpu),
        "capability": tuple(int(part) for part in capability.split(".")),
        "cores": (kind.multiprocessors or 0) * (64 if capability in ("7.0", "7.5", "8.0") else 128) or None,
        "memory_bus_bits": bits,
        "memory_mhz": round(kind.bandwidth_bytes_per_s * 4e-6 / bits),
        "clocks_mhz": clocks,
        "idle_w": kind.power.idle_w,
        "busy_w": busy,
        "limit_w": kind.power.limit_w,
        "memory_bytes": int(kind.memory_bytes),
    }
    return tuple(Part(**{"uuid": uuid_of(index), **known, **fields}) for index in range(n))


def a100(n: int = 1, **fields: Any) -> tuple[Part, ...]:
    """A100-SXM4-40GB; `fields` replace those of Part, or choose `model` and `tp`."""
    own: dict[str, Any] = {
        "name": "NVIDIA A100-SXM4-40GB",
        "limit_min_w": 100.0,
        "memory_mhz": 1215,
        "memory_bus_bits": 5120,
        "cores": 6912,
    }
    return catalogue_parts("a100-40gb-sxm", n, **(own | fields))


def rtx4090(n: int = 1, **fields: Any) -> tuple[Part, ...]:
    """GeForce RTX 4090, which under load stays at a steady boost clock below its highest; watts are rough."""
    clocks = tuple(range(210, 3106, 15))
    own: dict[str, Any] = {
        "name": "NVIDIA GeForce RTX 4090",
        "clocks_mhz": clocks,
        "boost_mhz": 2730,
        "idle_w": 25.0,
        "busy_w": tuple(60.0 + 340.0 * (clock / clocks[-1]) ** 2 for clock in clocks),
        "limit_w": 450.0,
        "memory_mhz": 10501,
        "memory_bus_bits": 384,
        "cores": 16384,
        "memory_bytes": 24 * 2**30,
        "pci_device_id": 0x268410DE,
        "capability": (8, 9),
        "architecture": 8,
    }
    return tuple(Part(**{"uuid": uuid_of(index), **own, **fields}) for index in range(n))


def h100(n: int = 1, **fields: Any) -> tuple[Part, ...]:
    """H100-SXM5-80GB; its context keeps the clock up."""
    own: dict[str, Any] = {
        "name": "NVIDIA H100 80GB HBM3",
        "limit_min_w": 200.0,
        "context_keeps_clock": True,
        "memory_mhz": 2619,
        "memory_bus_bits": 5120,
        "cores": 16896,
        "pci_device_id": 0x233010DE,
        "capability": (9, 0),
        "architecture": 9,
    }
    return catalogue_parts("h100-80gb-sxm", n, **(own | fields))
