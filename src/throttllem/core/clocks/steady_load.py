"""How much work comes in, and what serving it for good would cost at each clock.

The requests at hand show which clocks meet their SLOs; they cannot show which is cheapest, because more requests will
come. So the cost of a clock is the mean power at which the engine, fed at the measured rate, settles. Knows nothing of
deadlines.
"""

# The theory. At a given load the engine's throughput is fixed: it must generate as many tokens per second as clients
# want. A lower clock then does not mean less work but a larger batch: iterations are slower, so more requests are in
# flight at a time (Little's law). The engine settles where
#
#     m = (tokens per second) x t(b),      t(b) the seconds of an iteration with batch b
#
# with m the mean number of sequences in flight. Arrivals are Poisson and every request is admitted, so the number in
# flight is that of M/G/infinity: the engine is idle e^-m of the time, and holds b = m / (1 - e^-m) while busy. Prompts
# take their share of the time, which stretches every iteration by 1 / (1 - share). `_settle` evaluates the right side
# on a grid of m, for all clocks at once, and takes the first m at which the engine keeps up.
#
# The watts there, busy and idle in their shares, are the cost of the clock. A clock holds the load only if its bursts
# fit too (two standard deviations of a compound Poisson inflow), with some KV and batch free, and if a long output
# still meets its E2E SLO: otherwise sprints at high clocks would have to make up for it later, and power is convex in
# the clock, so slow and steady is cheaper than slow, then fast.

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.types import EngineSpec, Request

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

_RECENT = 512
_MOST_RECENT, _RECENT_S = 2048, 300.0
_MOST_TOKENS = 2**24
_REFRESH = 32
_LONG = 0.99
_FEW = 8
_ENOUGH = 32  # finished requests before their lengths are believed more than the predictions
_MEAN_SEQUENCES = np.concatenate([[0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7], 1.15 ** np.arange(0, 48)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Load over the recent past: requests per second, tokens of a mean request and of a long output.

    `burst` is how far above the mean the inflow of tokens goes now and then. `e2e_s`: the tightest E2E SLO of the
    recent requests, None if there was none.
    """

    requests_per_s: float
    prompt_tokens: float
    output_tokens: float
    long_output_tokens: float
    burst: float
    e2e_s: float | None


class Recent(IntEnum):
    """What is kept of a recent request, in this order: when it came, its prompt and what of it is cached, its output as
    predicted, and as it was (what is expected, until it has ended), sequences, SLOs (inf: none), the attainment asked,
    the index of its SLO class, and how many had ended with it (0: it runs).
    """

    ARRIVAL_S = 0
    PROMPT_TOKENS = 1
    CACHED_TOKENS = 2
    PREDICTED_TOKENS = 3
    OUTPUT_TOKENS = 4
    SEQUENCES = 5
    E2E_S = 6
    TTFT_S = 7
    TBT_S = 8
    ATTAINMENT = 9
    SLO_CLASS = 10
    ENDED = 11


@dataclass(slots=True, kw_only=True)
class LoadEstimator:
    """Exponentially weighted arrivals with time constant `window_s`; unbiased from the first second on.

    Long prompts and tight SLOs are looked for among the last `_RECENT` requests. A long output is one that is longer
    than the fraction of outputs for which an SLO is asked to hold. Predictions are inflated on purpose;
    the inflation that finished requests show is taken out again, or a safe prediction would look like a high load.
    `first_s`, `last_s`: the first and the last arrival. `sums`: weighted requests, prompt tokens, output tokens.
    `recent` requests by id, the last 512 or, up to 2,048, all of the last 300 s, each with its values in the order of
    `Recent`; `classes`: SLO classes by their index. `first_token`: the tightest TTFT SLO among them, seconds (inf:
    none), and their long prompts, tokens. `outputs`:
    tokens of the requests that ended last.
    """

    window_s: float
    first_s: float | None = None
    last_s: float = 0.0
    sums: tuple[float, float, float] = (0.0, 0.0, 0.0)
    seen: int = 0
    recent: dict[int, tuple[float, ...]] = field(default_factory=OrderedDict)
    classes: tuple[str, ...] = ()
    first_token: tuple[float, int] = (math.inf, 0)
    done: int = 0
    predicted_tokens: float = 0.0
    output_tokens: float = 0.0
    outputs: deque[int] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.recent = OrderedDict(self.recent)  # which finds its first item at once
        if self.recent and not self._possible():
            raise ValueError("the recent requests hold values that no request has")
        self.outputs = deque(self.outputs, _RECENT)

    def _possible(self) -> bool:
        """Whether the recent requests are such that they can be replayed: compiled code does not ask."""
        if any(len(values) != len(Recent) for values in self.recent.values()):
            return False
        recent = self.recent_requests()
        tokens = recent[:, [Recent.PROMPT_TOKENS, Recent.OUTPUT_TOKENS]]
        sequences, classes = recent[:, Recent.SEQUENCES], recent[:, Recent.SLO_CLASS]
        cached = recent[:, Recent.CACHED_TOKENS]
        possible = np.isfinite(recent[:, Recent.ARRIVAL_S]).all() and (np.diff(recent[:, Recent.ARRIVAL_S]) >= 0).all()
        possible &= ((tokens >= 0) & (tokens <= _MOST_TOKENS)).all() and ((sequences >= 1) & (sequences <= 2**16)).all()
        possible &= ((cached >= -1) & (cached <= recent[:, Recent.PROMPT_TOKENS])).all()
        return bool(possible and ((classes >= 0) & (classes < len(self.classes))).all())

    def arrived(self, request: Request, now_s: float, *, predicted_tokens: int, expected_tokens: int) -> None:
        """One request came in, with its output as predicted and as expected; it counts as many requests as it has
        sequences.
        """
        slo, sequences, prompt_tokens = request.slo, request.sequences, request.prompt_tokens
        if request.slo_class not in self.classes:
            self.classes = (*self.classes, request.slo_class)
        while len(self.recent) >= _RECENT:
            first = next(iter(self.recent))
            if len(self.recent) < _MOST_RECENT and self.recent[first][Recent.ARRIVAL_S] > now_s - _RECENT_S:
                break
            del self.recent[first]
        self.recent[request.id] = (
            now_s,
            prompt_tokens,
            min(request.cached_prompt_tokens, prompt_tokens - 1),
            predicted_tokens,
            expected_tokens,
            sequences,
            slo.e2e_s or math.inf,
            slo.ttft_s or math.inf,
            slo.tbt_s or math.inf,
            slo.attainment,
            self.classes.index(request.slo_class),
            0,
        )
        self.seen += 1
        if self.seen % _REFRESH == 1:
            recent = self.recent_requests()[-_RECENT:]
            long_tokens = _quantile(recent[:, Recent.PROMPT_TOKENS], _LONG)
            self.first_token = (float(recent[:, Recent.TTFT_S].min()), math.ceil(long_tokens))
        if self.first_s is None:
            self.first_s = self.last_s = now_s
        keep = math.exp(-(now_s - self.last_s) / self.window_s)
        n, prompts, outputs = self.sums
        self.sums = (
            n * keep + sequences,
            prompts * keep + sequences * prompt_tokens,
            outputs * keep + sequences * predicted_tokens,
        )
        self.last_s = now_s

    def finished(self, request_id: int, predicted_tokens: int, output_tokens: int) -> None:
        """One request ended, with what was predicted and what came out."""
        keep = 1.0 - 1.0 / _RECENT
        self.done += 1
        self.predicted_tokens = keep * self.predicted_tokens + predicted_tokens
        self.output_tokens = keep * self.output_tokens + output_tokens
        self.outputs.append(output_tokens)
        known = self.recent.get(request_id)
        if known is not None:
            at = Recent.OUTPUT_TOKENS
            self.recent[request_id] = (*known[:at], max(1, output_tokens), *known[at + 1 : Recent.ENDED], self.done)

    def dropped(self, request_id: int) -> None:
        """One was rejected, cancelled or lost: what it would have been is not known."""
        self.recent.pop(request_id, None)

    def copied(self) -> LoadEstimator:
        """A load that goes on from here on its own."""
        return replace(self)

    def scale(self, factor: float, now_s: float) -> None:
        """From now on `factor` times as many requests come: those of the recent past are taken to have come so."""
        n, prompts, outputs = self.sums
        self.sums = (n * factor, prompts * factor, outputs * factor)
        self.recent = OrderedDict(
            (request_id, (now_s - (now_s - values[Recent.ARRIVAL_S]) / factor, *values[1:]))
            for request_id, values in self.recent.items()
        )

    def recent_requests(self) -> Floats:
        """The recent requests in the order of their arrival, shape (requests, values of `Recent`)."""
        return np.array(list(self.recent.values()), dtype=np.float64).reshape(-1, len(Recent))

    def load(self, now_s: float) -> Load | None:
        """The load as it stands; None before half a window has been seen, or `_FEW` requests."""
        if self.first_s is None or now_s <= self.first_s:
            return None
        if now_s - self.first_s < self.window_s / 2 and self.seen < _FEW:
            return None
        n, prompts, outputs = self.sums
        seen_s = self.window_s * (1.0 - math.exp(-(now_s - self.first_s) / self.window_s))
        keep = math.exp(-(now_s - self.last_s) / self.window_s)
        recent = self.recent_requests()[-_RECENT:]
        if not recent.size:
            return None
        predicted_tokens = recent[:, Recent.PREDICTED_TOKENS]
        e2e_s, rate = float(recent[:, Recent.E2E_S].min()), n * keep / seen_s
        long_tokens, truth = _quantile(predicted_tokens, _LONG), 1.0
        if self.done >= _ENOUGH:
            truth = self.output_tokens / self.predicted_tokens
            long_tokens = _quantile(np.array(self.outputs, dtype=np.float64), float(recent[:, Recent.ATTAINMENT].max()))
        return Load(
            requests_per_s=rate,
            prompt_tokens=prompts / n,
            output_tokens=truth * outputs / n,
            long_output_tokens=long_tokens,
            burst=_burst(predicted_tokens, rate * (e2e_s if math.isfinite(e2e_s) else self.window_s)),
            e2e_s=e2e_s if math.isfinite(e2e_s) else None,
        )


def _quantile(values: Floats, share: float) -> float:
    """What numpy's `quantile` gives of one row, to the bit, without its 20 µs of preparation."""
    ascending, place = np.sort(values), share * (values.size - 1)
    below = min(int(place), values.size - 2) if values.size > 1 else 0
    low, high = float(ascending[below]), float(ascending[min(below + 1, values.size - 1)])
    part = place - below
    return low + (high - low) * part if part < 0.5 else high - (high - low) * (1.0 - part)


def _burst(output_tokens: Floats, requests: float) -> float:
    """Two standard deviations of a compound Poisson inflow of that many requests, over its mean: (1 + CV^2) / n."""
    variation = float(output_tokens.std() / output_tokens.mean())
    return 1.0 + 2.0 * math.sqrt((1.0 + variation**2) / max(requests, 1.0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Steady:
    """What a load means if it goes on: mean watts of the engine at each clock, inf where the clock does not hold it,
    and the factor by which prompts that are yet to come stretch every iteration, shape (clocks,) each.
    """

    watts: Floats
    stretch: Floats


def steady(load: Load, table: PerformanceTable, spec: EngineSpec, *, reserve: float) -> Steady:
    """Where the engine settles at each clock if `load` went on for ever.

    A clock holds a load if the load's bursts leave 0.15 of the KV blocks and a tenth of the batch free, and if a long
    output still comes within the E2E SLO less `reserve` of it.
    """
    batches = _batches(load, table, spec)
    burst, mean = _settle(load, load.burst, batches, table, spec), _settle(load, 1.0, batches, table, spec)
    held = burst.held
    if load.e2e_s is not None:
        held = held & (load.long_output_tokens * burst.token_s <= load.e2e_s * (1.0 - reserve))
    return Steady(watts=np.where(held, mean.watts, np.inf), stretch=mean.stretch)


def settled(load: Load, table: PerformanceTable, spec: EngineSpec) -> Steady:
    """The same of the mean load, whether or not a clock holds its bursts."""
    mean = _settle(load, 1.0, _batches(load, table, spec), table, spec)
    return Steady(watts=mean.watts, stretch=mean.stretch)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Settled:
    """Mean watts, seconds between two tokens of a sequence, stretch by prompts, and whether the engine keeps up at all,
    shape (clocks,) each.
    """

    watts: Floats
    token_s: Floats
    stretch: Floats
    held: Bools


class _Batches(NamedTuple):
    """Mean numbers of sequences in the system, shape (means,), and what the table says of the batch that each comes to:
    KV blocks, cells of iterations without and with a prompt, and of these, shape (means, clocks), the seconds of one
    without, and how much longer the other takes.
    """

    mean: Floats
    kv: Ints
    decode: Ints
    mixed: Ints
    step_s: Floats
    prompt_s: Floats


def _batches(load: Load, table: PerformanceTable, spec: EngineSpec) -> _Batches:
    mean = _MEAN_SEQUENCES[0.9 * spec.max_batch > _MEAN_SEQUENCES]
    batch = np.maximum(np.round(mean / -np.expm1(-mean)), 1).astype(np.int64)
    kv = np.round(batch * ((load.prompt_tokens + load.output_tokens / 2) / spec.block_tokens + 0.5)).astype(np.int64)
    prompt = np.full(batch.size, max(1, round(load.prompt_tokens)), dtype=np.int64)
    decode, mixed = table.cells(batch, kv, np.zeros_like(batch)), table.cells(batch, kv, prompt)
    step_s = table.seconds[decode].astype(np.float64)
    return _Batches(mean, kv, decode, mixed, step_s, np.maximum(table.seconds[mixed] - step_s, 0.0))


def _settle(load: Load, times: float, batches: _Batches, table: PerformanceTable, spec: EngineSpec) -> _Settled:
    """Where the engine settles at each clock under `times` the load, by the theory above."""
    mean, kv, decode, mixed, step_s, prompt_s = batches
    rate = load.requests_per_s * times
    prefill = np.minimum(rate * prompt_s, 0.99)
    stretch = 1.0 / (1.0 - prefill)
    fits = (kv <= 0.85 * spec.kv_blocks)[:, None] & (prefill < 0.99)
    enough = (mean[:, None] >= rate * load.output_tokens * step_s * stretch) & fits
    at = enough.argmax(axis=0), np.arange(step_s.shape[1])
    idle = np.exp(-mean[at[0]])
    prefill_w = np.minimum(prefill[at] / np.maximum(1.0 - idle, 1e-9), 1.0)
    active_w = table.watts[decode[at[0]], at[1]] * (1.0 - prefill_w) + table.watts[mixed[at[0]], at[1]] * prefill_w
    return _Settled(
        watts=(1.0 - idle) * active_w + idle * spec.idle_w,
        token_s=(step_s * stretch)[at],
        stretch=stretch[at],
        held=np.asarray(enough.any(axis=0)),
    )
