"""What is played: the GPUs, what the keeper may do with them, which are the gateway's, and what goes wrong when.

Values only. Seconds count from the beginning (`early`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

Lock = tuple[int, int]


class Stop(StrEnum):
    """How the gateway ends."""

    TERM = "SIGTERM"
    KILL = "SIGKILL"
    FREEZE = "SIGSTOP, for ever"
    INHERIT = "SIGKILL, and a child keeps its sockets"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPlan:
    """One GPU. `allowed` None: it is not opted in. `held`: the gateway's. `before`: its lock when the schedule begins.
    `declared`: the keeper's --normally states that lock as the baseline.
    """

    allowed: Lock | None
    held: bool
    before: Lock | None
    declared: bool

    @property
    def baseline(self) -> Lock | None:
        """What it must be locked to after a lease; None: it must be unlocked."""
        return self.before if self.declared else None

    @property
    def words(self) -> str:
        """For people."""
        lock = "unlocked" if self.before is None else f"locked {self.before[0]}-{self.before[1]}"
        if self.allowed is None:
            return f"{lock}, not opted in"
        stated = ", its baseline" if self.declared else ""
        use = "the gateway's" if self.held else "nobody's"
        return f"{lock}{stated}, may be {self.allowed[0]}-{self.allowed[1]}, {use}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong at `at_s`, for `for_s` if it lasts. The rest as its kind (`kinds`) has use for it."""

    kind: str
    at_s: float
    for_s: float = 0.0
    gpu: int = 0
    copy: int = 0
    which: str = ""
    count: int = 1

    @property
    def words(self) -> str:
        """For people, with everything that its kind may use."""
        lasts = f" for {self.for_s:.3f} s" if self.for_s else ""
        which = f" [{self.which}]" if self.which else ""
        return f"{self.at_s:.3f} s{lasts}: {self.kind}{which} (GPU {self.gpu}, copy {self.copy}, count {self.count})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """All of one play. `early`: it begins with the gateway's start, not with its first clock. `lift_s`: what lasts is
    lifted so long after the gateway's end, or before its end if below 0.
    """

    seed: int
    gpus: tuple[GpuPlan, ...]
    early: bool
    ttl_s: float
    life_s: float
    stop: Stop
    lift_s: float
    ask_at_s: tuple[float, ...]
    clock_every_s: tuple[float, float]
    faults: tuple[Fault, ...]

    @property
    def kinds(self) -> frozenset[str]:
        """Of its faults."""
        return frozenset(fault.kind for fault in self.faults)

    @property
    def words(self) -> str:
        """For people, one line a GPU and a fault."""
        gpus = [f"  GPU {index}: {gpu.words}" for index, gpu in enumerate(self.gpus)]
        faults = [f"  {fault.words}" for fault in self.faults] or ["  no fault"]
        lift = "before it" if self.lift_s < 0 else f"{self.lift_s:.3f} s after it"
        end = f"  {self.life_s:.3f} s: the gateway ends by {self.stop.value}; what lasts is lifted {lift}"
        when = "start" if self.early else "first clock"
        head = f"seed {self.seed}: TTL {self.ttl_s:.3f} s, {len(self.ask_at_s)} requests, from the gateway's {when} on"
        return "\n".join([head, *gpus, *faults, end])
