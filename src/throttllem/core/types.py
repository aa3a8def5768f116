"""The vocabulary of the core: requests, engines, events in, commands out, and the reasons for them.

Every value is frozen; None means absent. Seconds are on the driver's own time line (virtual or wall): they mean nothing
without the run that they came from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise


class OptionError(ValueError):
    """An option holds a value that cannot be used.

    `name` is the option within its section: the code that loaded the section adds where the option was set. `shown` is
    the value as an error may show it, "" for a secret.
    """

    def __init__(self, section: str, name: str, value: object, problem: str, *, secret: bool = False) -> None:
        self.name, self.problem = name, problem
        self.shown = "" if secret else f" = {value}"
        super().__init__(f"{f'{section}.' if section else ''}{name}{self.shown}: {problem}")


def check(section: str, **values: tuple[float, float, float]) -> None:
    """Raise OptionError for the first of `name=(value, least, most)` that is out of range, or no number."""
    for name, (value, least, most) in values.items():
        if not least <= value <= most:
            raise OptionError(section, name, value, f"must be between {least:g} and {most:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Service level objectives of one request. None: that quantity has no objective."""

    e2e_s: float | None = None
    """From arrival to the last token."""
    tbt_s: float | None = None
    """Mean time between the tokens of one request (TPOT)."""
    ttft_s: float | None = None
    """From arrival to the first token."""
    attainment: float = 0.99
    """Fraction of the class's requests that shall meet all of these: margins are learned for it."""
    batch: bool = False
    """Whether the request may be held, as long as its SLOs allow, to run together with others that can wait."""

    def __post_init__(self) -> None:
        for name in ("e2e_s", "tbt_s", "ttft_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise OptionError("slo", name, value, "must be a positive number of seconds, or absent")
        check("slo", attainment=(self.attainment, 0.5, 0.9999))

    def met(self, *, e2e_s: float, ttft_s: float | None, tbt_s: float | None) -> bool | None:
        """Whether a request with these times met all SLOs. A time that was not observed (None) is left out; None is
        returned where none can be judged.
        """
        times = ((self.e2e_s, e2e_s), (self.ttft_s, ttft_s), (self.tbt_s, tbt_s))
        judged = [took_s <= slo_s for slo_s, took_s in times if slo_s is not None and took_s is not None]
        return all(judged) if judged else None


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePrefix:
    """What one engine has of a request's prompt, as `Request` has it of the engine that the request is planned on."""

    engine: int
    cached_prompt_tokens: int = 0
    common_prompt_tokens: int = 0
    prefix_of: int | None = None
    prefix_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request as the gateway or a trace gives it. `output_tokens` is known in simulation only (oracle predictors).

    `slo_class` is the name of the class that the SLO is of, "" the default's.
    `sequences` are generated side by side, over `prompts` different prompts of `prompt_tokens` (their mean). `caller`
    and `model` (as the client named it) are for the prediction of lengths only.

    Of each prompt the engine need not compute `cached_prompt_tokens`, and the sequences of one prompt hold
    `common_prompt_tokens` of it once. A request that may still run, `prefix_of`, begins with the same `prefix_tokens`.
    All are whole KV blocks, and 0 where the engine does not cache prefixes. `prefixes`: the same for each of several
    engines that serve when the request arrives.
    """

    id: int
    arrival_s: float
    prompt_tokens: int
    max_tokens: int
    slo: Slo
    slo_class: str = ""
    output_tokens: int | None = None
    sequences: int = 1
    prompts: int = 1
    caller: str = ""
    model: str = ""
    cached_prompt_tokens: int = 0
    common_prompt_tokens: int = 0
    prefix_of: int | None = None
    prefix_tokens: int = 0
    prefixes: tuple[EnginePrefix, ...] = ()

    def on(self, engine: int) -> Request:
        """The request with what this engine has of its prompt. The same where `prefixes` is empty."""
        if not self.prefixes:
            return self
        found = next((one for one in self.prefixes if one.engine == engine), EnginePrefix(engine=engine))
        return replace(
            self,
            cached_prompt_tokens=found.cached_prompt_tokens,
            common_prompt_tokens=found.common_prompt_tokens,
            prefix_of=found.prefix_of,
            prefix_tokens=found.prefix_tokens,
        )

    @property
    def computed_prompt_tokens(self) -> int:
        """Prompt tokens that the engine must compute for all its sequences."""
        further = max(self.cached_prompt_tokens, self.common_prompt_tokens)
        tokens = max(1, self.prompt_tokens - self.cached_prompt_tokens) * self.prompts
        return tokens + max(1, self.prompt_tokens - further) * max(0, self.sequences - self.prompts)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What the core must know of an engine before it runs: capacities and batching rules, never speed.

    `kv_blocks` of `block_tokens` tokens each; `prefill_budget_tokens` is the most tokens (of prompts and decoding
    sequences) that one iteration processes. `chunked`: prompts are split over iterations (vLLM), otherwise they go
    whole (TensorRT-LLM). `no_evict`: the engine reserves prompt + max_tokens before it starts a request
    (TensorRT-LLM's GUARANTEED_NO_EVICT), otherwise it preempts by recomputation when blocks run out.
    `clocks_mhz` ascending. `prefix_caching`: KV blocks of prompts with a common beginning are shared and kept.

    `unknown` names the capacities that the engine does not report and no option sets. Their values are more than any
    engine has, so that they bind no request; no performance table holds for such an engine.
    """

    gpu: str
    model: str
    tp: int
    kv_blocks: int
    block_tokens: int
    max_batch: int
    max_context_tokens: int
    prefill_budget_tokens: int
    chunked: bool
    no_evict: bool
    clocks_mhz: tuple[int, ...]
    idle_w: float
    startup_s: float
    prefix_caching: bool = False
    unknown: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        capacities = ("kv_blocks", "block_tokens", "max_batch", "max_context_tokens", "prefill_budget_tokens")
        check("engine", **{name: (getattr(self, name), 1, math.inf) for name in capacities})
        clocks = self.clocks_mhz
        if not clocks or clocks[0] < 1 or any(low >= high for low, high in pairwise(clocks)):
            raise OptionError("engine", "clocks_mhz", clocks, "must be positive, ascending and not empty")


class Reason(StrEnum):
    """Why a verdict or a plan came out as it did. Shown to people: in dashboards, logs and errors."""

    NEVER_FITS_KV = "prompt + max_tokens exceeds the KV cache"
    NEVER_FITS_CONTEXT = "prompt + max_tokens exceeds the model's context"
    CANCELLED = "the client disconnected"
    QUEUE_FULL = "the queue is full"
    ENGINE_LOST = "the engine was lost"
    KV = "the KV cache would overflow"
    BATCH = "the batch is full"
    TBT = "the time between tokens would exceed the SLO"
    E2E = "an end-to-end SLO would be violated"
    TTFT = "a time-to-first-token SLO would be violated"
    OWN_DEADLINE = "its own SLO can no longer be met"
    GATHERING = "requests that can wait are gathered"
    HELD_BACK = "it could not join in time without violating the SLOs of others"
    NO_ENGINE = "no engine is ready"
    FITS = "every check passed"
    FIXED = "the policy fixes the clock"
    OWN_POLICY = "a policy of the public interface chose the clock"
    LOST_RUNNING = "a lost request is running"
    OUTSIDE_HULL = "the load is outside the profiled range"
    NO_TABLE = "there is no performance table"
    TABLE_DRIFT = "iterations take more than twice, or less than half, of what the performance table says"
    UNCONTROLLED = "a request without control is running"
    UNKNOWN_STATE = "the engine's clock is unknown"
    INFEASIBLE = "no clock meets every SLO"
    WAITING = "a request waits in the queue"
    LOWEST_CLOCK = "the lowest clock meets every SLO"
    LOWEST_FEASIBLE = "one clock lower would violate an SLO"
    LEAST_ENERGY = "least predicted energy among the feasible clocks"
    DWELL = "a lower clock waits for the minimum dwell"
    NOT_WORTH = "a lower clock would save too little"
    IDLE = "no request is running"


class VerdictKind(StrEnum):
    """What admission decides about one request."""

    ADMIT = "admit"
    WAIT = "wait"
    LOST = "lost"
    REJECT = "reject"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What admission decided for one request, why, and the request that stands in the way (None: none does)."""

    kind: VerdictKind
    why: Reason
    binding: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FrequencyPlan:
    """The clock that should be set, why, and the request whose SLO rules out a lower one (None: none does)."""

    mhz: int
    why: Reason
    binding: int | None = None


# ---- events: what the driver reports to the core ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """A request arrived; `again`: it comes back from an engine that was lost, or left it, before it gave a byte."""

    request: Request
    again: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """The client of a request disconnected."""

    request_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """Engine `engine` completed iteration `iteration` (0, 1, 2 ... since it started).

    `started`: requests that gave their first token (or their first after a preemption) in this iteration;
    `finished`: requests that gave their last; `preempted`: requests evicted from the KV cache when this iteration was
    put together, which wait inside the engine now. A request can be in `started` and `finished` at once.
    """

    engine: int
    iteration: int
    started: tuple[int, ...] = ()
    finished: tuple[int, ...] = ()
    preempted: tuple[int, ...] = ()
    assumed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReady:
    """An engine can take requests, at the maximum clock."""

    engine: int
    spec: EngineSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLost:
    """An engine died, or did not start; what ran on it is gone."""

    engine: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockRead:
    """The clock of an engine's GPUs as it is now; None: it could not be read or set.

    `limit_mhz`: the GPUs cannot exceed this clock while a power cap, heat or another program's lock holds them down
    (None: nothing does). `followed` False: the engine does not run at `mhz`, which is that of a dry run.
    `switch_s`: how long the switch to `mhz` took, from the command to the clock read back (None: there was none, or it
    was not measured).
    """

    engine: int
    mhz: int | None
    limit_mhz: int | None = None
    followed: bool = True
    switch_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """A request has given `tokens` output tokens so far, which is not what its iterations imply."""

    engine: int
    request_id: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What an engine reports of itself after its last iteration: sequences that run and wait in it, and KV blocks in
    use (None: not reported). Other clients may use the engine too, and prompts may share blocks.
    """

    engine: int
    running: int
    waiting: int
    kv_blocks: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncontrolled:
    """How many requests the engine now computes that are no generation under control, such as embeddings. What they
    take is not known: while there are some, no clock below the maximum is known to be safe.
    """

    engine: int
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RateChanged:
    """An engine gives this many tokens per sequence and step now, as far as deadlines may count on it: it speculates.
    Its iterations are numbered by tokens, so each takes that part of a step.
    """

    engine: int
    tokens_per_step: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShuttingDown:
    """No more requests will come: from now on none is held."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timer:
    """The core's deadline has come."""


Event = (
    Arrived
    | Cancelled
    | Stepped
    | Progressed
    | Observed
    | RateChanged
    | Uncontrolled
    | EngineReady
    | EngineLost
    | ClockRead
    | ShuttingDown
    | Timer
)


# ---- commands: what the driver must do ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """Give a request to an engine."""

    engine: int
    request_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """End a request that was not dispatched."""

    request_id: int
    why: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail:
    """End a request whose engine was lost while it ran."""

    request_id: int
    why: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Take a request out of an engine; it ends with this command."""

    engine: int
    request_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SetClock:
    """Set all GPUs of an engine to one clock."""

    engine: int
    plan: FrequencyPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class StartEngine:
    """Bring up an engine of this size beside those that run."""

    engine: int
    tp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StopEngine:
    """Take down an engine that runs nothing."""

    engine: int


Command = Dispatch | Reject | Fail | Cancel | SetClock | StartEngine | StopEngine
