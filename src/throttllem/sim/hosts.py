"""The hosts of a simulated pool: which engine is on which of them, and what goes wrong, at times drawn by the seed.

Knows nothing of requests, nor of what the controller does about a loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from throttllem.config import FaultOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How a start goes: it `fails` when an engine would be up, or `hangs` until it is given up, or neither."""

    fails: bool = False
    hangs: bool = False


@dataclass(slots=True)
class Host:
    """One host: its free GPUs, its engines and their GPUs, and whether it is up."""

    free_gpus: int
    engines: dict[int, int] = field(default_factory=dict)
    up: bool = True


class Hosts:
    """`gpus` on hosts of `faults.gpus_per_host`, the last with what is left. An engine is on one host."""

    def __init__(self, gpus: int, faults: FaultOptions, *, seed: int) -> None:
        each = faults.gpus_per_host
        self.hosts = [Host(free_gpus=min(each, gpus - first)) for first in range(0, gpus, each)]
        self._faults = faults
        self._losses = np.random.default_rng((seed, 1))
        self._starts = np.random.default_rng((seed, 2))

    def place(self, engine: int, tp: int) -> bool:
        """Give an engine GPUs, of the fullest host that has as many; False if none has."""
        found = [host for host in self.hosts if host.up and host.free_gpus >= tp]
        if not found:
            return False
        host = min(found, key=lambda host: host.free_gpus)
        host.free_gpus -= tp
        host.engines[engine] = tp
        return True

    def remove(self, engine: int) -> None:
        """The engine's GPUs are free; nothing happens to one that had none."""
        for host in self.hosts:
            host.free_gpus += host.engines.pop(engine, 0)

    def start(self) -> Start:
        """How the next start goes."""
        drawn = float(self._starts.random())
        fails = drawn < self._faults.failed_starts
        return Start(fails=fails, hangs=not fails and drawn < self._faults.failed_starts + self._faults.hung_starts)

    def next_loss_s(self) -> float | None:
        """Seconds until a host is lost, from now or from the last loss on; None: none ever is."""
        mtbf_s = self._faults.host_mtbf_s
        return None if mtbf_s is None else float(self._losses.exponential(mtbf_s / len(self.hosts)))

    def lose(self) -> tuple[int, list[int]]:
        """A host is lost: its number, and the engines that were on it. None of them, if it was down already."""
        number = int(self._losses.integers(len(self.hosts)))
        host = self.hosts[number]
        host.up = False
        return number, list(host.engines)

    def repaired(self, number: int) -> None:
        """The host can take engines again."""
        self.hosts[number].up = True
