"""What was seen of one schedule while it was played. Values only: `check` judges them. Seconds of CLOCK_MONOTONIC."""

from __future__ import annotations

from dataclasses import dataclass, field

from tools.nvml.machine import Write
from tools.soak.schedule import Lock, Schedule


@dataclass(slots=True)
class Ask:
    """A request to the gateway. `how` it ended: complete, error (in OpenAI's shape), cut (its
    connection), broken; None: not. `begun`: its answer had begun.
    """

    gateway: int
    asked_s: float
    how: str | None = None
    why: str = ""
    ended_s: float | None = None
    at_the_end: bool = False
    begun: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """The lease on these GPUs ends at this time at the latest, and no earlier than at `from_s`."""

    at_s: float
    from_s: float
    why: str
    gpus: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """While it lasts no keeper can restore a GPU."""

    began_s: float
    ended_s: float
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Other:
    """What another controller did to a lock: set it, or removed it (None, also a driver that was reloaded)."""

    at_s: float
    gpu: int
    lock: Lock | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """A process's end. `by_us`: by a signal of the soak. `unnoted`: GPUs that it, a keeper, had
    locked and that no journal copy names.
    """

    at_s: float
    by_us: bool
    unnoted: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """The soak itself did not run for `lasted_s`."""

    at_s: float
    lasted_s: float


@dataclass(slots=True, kw_only=True)
class Evidence:
    """One play; the gateway was ended at `stopped_s`. Per GPU: `attempted` writes, `effective` writes, `left` (its lock
    when time was up), `last` (its lock when all was over). `base_s`: from when on the last restoring counts;
    `restored_s`: when all was restored (None: never). `forgot`: both copies of the journal were destroyed and a keeper
    began without them. `other_users` could connect to the socket. `idle` kinds never had an effect. `must_log`:
    what has to be in the keeper's log.
    `troubles` are violations seen on the spot. `waited_s`: how long the soak was ready to run and had no core, from the
    gateway's end on; `gaps`: when it did not run for long.
    """

    schedule: Schedule
    began_s: float = 0.0
    stopped_s: float = 0.0
    writes: tuple[Write, ...] = ()
    write_count: int = 0
    attempted: tuple[int, ...] = ()
    effective: tuple[int, ...] = ()
    left: tuple[Lock | None, ...] = ()
    last: tuple[Lock | None, ...] = ()
    base_s: float = 0.0
    restored_s: float | None = None
    forgot: bool = False
    asks: dict[int, Ask] = field(default_factory=dict)
    losses: list[Loss] = field(default_factory=list)
    obstacles: list[Obstacle] = field(default_factory=list)
    others: list[Other] = field(default_factory=list)
    starts_s: list[float] = field(default_factory=list)
    deaths: list[Death] = field(default_factory=list)
    gateways: list[Death] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    waited_s: float = 0.0
    other_users: int = 0
    idle: list[str] = field(default_factory=list)
    must_log: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    logs: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a schedule. `restorings_s`: of each lease that was lost, how long its slowest GPU took."""

    schedule: Schedule
    violations: tuple[str, ...]
    restorings_s: tuple[float, ...]
    complete: int
    errors: int
    cut: int
    wall_s: float
    idle: tuple[str, ...] = ()
    starved_s: float = 0.0
    logs: str = ""
