"""Everything that metrics, dashboard and logs may know of a running gateway: frozen, made by the driver on demand."""

from __future__ import annotations

from dataclasses import dataclass, field

from throttllem.core.snapshot import Counts, EngineView
from throttllem.core.types import EngineSpec, Slo, Verdict
from throttllem.engines.base import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """The projection from now on, thinned to at most 120 points: seconds from now, requests, KV blocks."""

    at_s: tuple[float, ...] = ()
    batch: tuple[int, ...] = ()
    kv_blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """The scoreboard against what the engine said: engine minus scoreboard at the last report, and the mean of its
    absolute value since the start. None: the engine never said.
    """

    batch: float | None = None
    kv_blocks: float | None = None
    mean_batch: float | None = None
    mean_kv_blocks: float | None = None
    corrections: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """Joules of one engine's GPUs since the gateway started: requests' and idle; `top_j` what the same work would have
    taken at the top clock, by the model, with the idle time left over (None: there is no model); `advised_j` likewise
    at the clocks that were advised where none is set (None: none was). Savings are estimates for that reason.
    """

    total_j: float = 0.0
    idle_j: float = 0.0
    top_j: float | None = None
    advised_j: float | None = None
    watts: float = 0.0

    @property
    def saved(self) -> float | None:
        """The fraction of `top_j` that was not taken, negative where it took more; None: nothing to compare."""
        return 1.0 - self.total_j / self.top_j if self.top_j else None

    @property
    def would_save(self) -> float | None:
        """The fraction of `total_j` that the advised clocks would not have taken; None: none were advised."""
        return 1.0 - self.advised_j / self.total_j if self.advised_j is not None and self.total_j else None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """One engine of the configuration. `view` None: the core does not know it now (down, or starting).

    `state`: "up", "starting", "down" or "stalled"; `trouble` says why in words. `clock_mhz` None: unknown.
    `kv_blocks` is the scoreboard's own estimate, `report` the engine's last word. `clocks` says how clocks are set
    ("on", "dry-run", "off"; "simulated"), `advised_mhz` what would be set, `held` what keeps GPUs from following and
    `unset` why clocks are only advised though they should be set.
    """

    name: str
    kind: str
    gpu: str
    model: str
    tp: int
    state: str
    trouble: str | None = None
    notes: tuple[str, ...] = ()
    spec: EngineSpec | None = None
    view: EngineView | None = None
    clock_mhz: int | None = None
    clocks: str = "simulated"
    advised_mhz: int | None = None
    limit_mhz: int | None = None
    held: str | None = None
    unset: str | None = None
    kv_blocks: int = 0
    report: Report | None = None
    drift: Drift = field(default_factory=Drift)
    energy: Energy = field(default_factory=Energy)
    ahead: Ahead = field(default_factory=Ahead)
    decision: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SloCounts:
    """Promises over requests that ended: how many had one, how many kept all of theirs, and by promise."""

    promised: int = 0
    kept: int = 0
    e2e_missed: int = 0
    tbt_missed: int = 0
    ttft_missed: int = 0

    @property
    def attainment(self) -> float | None:
        """The fraction that kept every promise; None while none was made."""
        return self.kept / self.promised if self.promised else None


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthStatus:
    """How well lengths are predicted: answers seen, the fraction that outgrew its prediction, mean absolute error of
    the prediction before inflation in tokens.
    """

    seen: int = 0
    exceeded: float | None = None
    mean_error_tokens: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """One model that is served: its queue, its engines, what the core decided."""

    names: tuple[str, ...]
    queue: int
    head: Verdict | None
    counts: Counts
    engines: tuple[EngineStatus, ...]
    recent: SloCounts
    ever: SloCounts
    length: LengthStatus
    prompt_tokens: int = 0
    generated_tokens: int = 0
    estimated_prompts: int = 0

    @property
    def title(self) -> str:
        """The first of its names; its first engine's where no engine has told one yet."""
        return next(iter(self.names), self.engines[0].name if self.engines else "unknown")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayStatus:
    """The whole gateway. `now_s` is its own time line, from 0 at its start; `phase` "serving" or "draining".

    `uncontrolled`: requests that were passed on to an engine without control so far.
    """

    version: str
    policy: str
    phase: str
    now_s: float
    slo: Slo
    models: tuple[ModelStatus, ...]
    uncontrolled: int = 0
