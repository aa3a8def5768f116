"""The public interface of clock policies: one class of one method, which sees an `EngineView` and returns a clock.

`OwnClock` takes the place of the clock controller for such a policy: it makes the views, asks at every change and at
least once a second, and checks what comes back. How a class is found by its name is outside of the core.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from numbers import Real
from typing import Protocol

import numpy as np
import numpy.typing as npt

from throttllem.core.engine_state import EngineState
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.scoreboard import SequenceState
from throttllem.core.types import EngineSpec, FrequencyPlan, Reason, Request, SetClock, Slo

Floats = npt.NDArray[np.float64]

RECENT_S = 60.0
"""What a view calls recent."""
_MOST_PAST = 10_000
ASK_S = 1.0
"""Longest time between two questions while the engine is up."""


class OwnPolicyError(ValueError):
    """A policy failed, or returned what is no clock of the engine; the message names the policy and the moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptView:
    """A request without a first token: how long since it arrived, and its prompt."""

    age_s: float
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recent:
    """Values of the last RECENT_S seconds, in order: a part of a list that only grows, so that a view costs nothing."""

    every: list[tuple[float, ...]]
    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin

    def column(self, index: int) -> tuple[float, ...]:
        """One value of each."""
        return tuple(row[index] for row in self.every[self.begin : self.end])

    def mean(self, index: int) -> float | None:
        """The mean of a value that is kept as a running sum; None where there are none."""
        if not len(self):
            return None
        before = self.every[self.begin - 1][index] if self.begin else 0.0
        return (self.every[self.end - 1][index] - before) / len(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecentView:
    """The last RECENT_S seconds: when requests arrived, their mean lengths in tokens (None: none arrived, none ended),
    and the latencies of requests: TTFT as first tokens came out, TPOT and E2E as requests ended.
    """

    seen_s: float
    arrivals: Recent
    first_tokens: Recent
    ended: Recent

    @property
    def arrivals_s(self) -> tuple[float, ...]:
        """When requests arrived, ascending."""
        return self.arrivals.column(0)

    @property
    def requests_per_s(self) -> float:
        """Their rate; over one second at least."""
        return len(self.arrivals) / max(1.0, self.seen_s)

    @property
    def prompt_tokens(self) -> float | None:
        """Prompt of a mean request that arrived."""
        return self.arrivals.mean(1)

    @property
    def output_tokens(self) -> float | None:
        """Output of a mean request that ended."""
        return self.ended.mean(1)

    @property
    def ttft_s(self) -> tuple[float, ...]:
        """TTFT of each first token."""
        return self.first_tokens.column(1)

    @property
    def tpot_s(self) -> tuple[float, ...]:
        """Mean time between tokens of each request that ended."""
        return self.ended.column(2)

    @property
    def e2e_s(self) -> tuple[float, ...]:
        """E2E time of each request that ended."""
        return self.ended.column(3)


def percentile(values_s: Collection[float], share: float) -> float | None:
    """The value that `share` (0 to 1) of these do not exceed, by nearest rank; None where there are none."""
    ranked = sorted(values_s)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)] if ranked else None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineView:
    """What a policy may see of one engine, at one moment of the driver's time line.

    `clocks_mhz` ascending; `clock_mhz` is in force, `target_mhz` was set last, and a switch takes `switch_latency_s`.
    `running` sequences decode and hold, with the prompts under way, `kv_blocks` of `kv_capacity_blocks` blocks.
    `prompts` have no first token yet, in order of arrival, whether they wait in the queue or in the engine.
    `slo` holds the tightest SLOs of the recent requests, `tokens` counts output tokens since the engine started.
    `idle_w` is drawn when nothing runs. `table` is the performance table that seconds and watts are looked up in.
    """

    now_s: float
    clocks_mhz: tuple[int, ...]
    clock_mhz: int
    target_mhz: int
    switch_latency_s: float
    running: int
    max_batch: int
    kv_blocks: int
    kv_capacity_blocks: int
    block_tokens: int
    prefill_budget_tokens: int
    prompts: tuple[PromptView, ...]
    slo: Slo
    recent: RecentView
    tokens: int
    idle_w: float
    table: PerformanceTable

    @property
    def power_w(self) -> float:
        """Watts of the engine's GPUs as it is: of the next iteration at the clock in force, idle if nothing runs."""
        if not self.running and not self.prompts:
            return self.idle_w
        return float(self.iteration_w(self.next_prompt_tokens)[self.clocks_mhz.index(self.clock_mhz)])

    @property
    def next_prompt_tokens(self) -> int:
        """Prompt tokens that one iteration could take of those that wait."""
        return min(self.prefill_budget_tokens, sum(prompt.prompt_tokens for prompt in self.prompts))

    def iteration_s(self, prompt_tokens: int = 0, *, running: int | None = None) -> Floats:
        """Seconds of one iteration with `prompt_tokens` at each clock, shape (clocks,). `running`: another number of
        running sequences than the present one, each with the mean KV blocks of the present ones.
        """
        return np.asarray(self.table.seconds[self._cell(prompt_tokens, running)], np.float64)

    def iteration_w(self, prompt_tokens: int = 0, *, running: int | None = None) -> Floats:
        """Watts of the same iteration."""
        return np.asarray(self.table.watts[self._cell(prompt_tokens, running)], np.float64)

    def first_token_s(self) -> Floats:
        """Seconds until the last of `prompts` has its first token at each clock, shape (clocks,)."""
        tokens = sum(prompt.prompt_tokens for prompt in self.prompts)
        whole, rest = divmod(tokens, self.prefill_budget_tokens)
        full_s = whole * self.iteration_s(self.prefill_budget_tokens) if whole else 0.0
        return np.asarray(full_s + (self.iteration_s(rest) if rest else 0.0), np.float64)

    def token_s(self, *, running: int | None = None) -> Floats:
        """Seconds between two tokens of a sequence at each clock, shape (clocks,): an iteration, stretched by prompts
        that arrive meanwhile at the recent rate; inf where prompts alone take all the time.
        """
        alone_s = self.iteration_s(running=running)
        prompt_tokens = round(self.recent.prompt_tokens or 0)
        chunk = min(prompt_tokens, self.prefill_budget_tokens)
        if not chunk:
            return alone_s
        each_s = (self.iteration_s(chunk, running=running) - alone_s) * (prompt_tokens / chunk)
        busy = self.recent.requests_per_s * np.maximum(each_s, 0.0)
        return np.where(busy < 1.0, alone_s / np.maximum(1.0 - busy, 1e-9), np.inf)

    def lowest(self, holds: npt.NDArray[np.bool_]) -> int:
        """The lowest clock of those that hold, shape (clocks,); the maximum where none does."""
        return self.clocks_mhz[int(holds.argmax()) if holds.any() else -1]

    def cheapest(self, holds: npt.NDArray[np.bool_], cost: Floats) -> int:
        """The clock of least cost of those that hold; the maximum where none does."""
        return self.clocks_mhz[int(np.where(holds, cost, np.inf).argmin()) if holds.any() else -1]

    def _cell(self, prompt_tokens: int, running: int | None) -> int:
        batch = self.running if running is None else running
        kv_blocks = self.kv_blocks
        if running is not None:
            each = self.kv_blocks / self.running if self.running else self._typical_blocks()
            kv_blocks = min(self.kv_capacity_blocks, round(each * running))
        return self.table.cell(batch + (1 if prompt_tokens else 0), kv_blocks, prompt_tokens)

    def _typical_blocks(self) -> float:
        tokens = (self.recent.prompt_tokens or 0.0) + (self.recent.output_tokens or 0.0) / 2
        return max(1.0, tokens / self.block_tokens)


class OwnPolicy(Protocol):
    """A clock policy of the public interface. One instance serves one run, and may keep state."""

    def clock_mhz(self, view: EngineView) -> int:
        """The clock to set now: one of `view.clocks_mhz`."""


@dataclass(slots=True)
class _Log:
    """What happened, each with its time first; `begin` is the first recent one."""

    rows: list[tuple[float, ...]] = field(default_factory=list)
    begin: int = 0

    def recent(self, now_s: float) -> Recent:
        """The recent part. Long-past rows are dropped from a list of its own now and then: views keep theirs."""
        while self.begin < len(self.rows) and self.rows[self.begin][0] < now_s - RECENT_S:
            self.begin += 1
        if self.begin > _MOST_PAST:
            self.rows, self.begin = self.rows[self.begin - 1 :], 1
        return Recent(every=self.rows, begin=self.begin, end=len(self.rows))

    def sum(self, index: int) -> float:
        """The running sum so far."""
        return self.rows[-1][index] if self.rows else 0.0


@dataclass(slots=True, kw_only=True)
class OwnClock:
    """Asks a policy for the clock of every engine, and remembers what its views call recent."""

    policy: OwnPolicy
    switch_latency_s: float
    _arrivals: _Log = field(default_factory=_Log)
    _first_tokens: _Log = field(default_factory=_Log)
    _ended: _Log = field(default_factory=_Log)
    _slos: dict[Slo, float] = field(default_factory=dict)
    """When a request with these SLOs arrived last."""
    _began_s: float | None = None

    def arrived(self, request: Request, now_s: float) -> None:
        """A request arrived."""
        self._began_s = now_s if self._began_s is None else self._began_s
        self._slos[request.slo] = now_s
        self._arrivals.rows.append((now_s, self._arrivals.sum(1) + request.prompt_tokens))

    def started(self, sequence: SequenceState, now_s: float) -> None:
        """A request gave its first token, or its first after a preemption, which is no first token."""
        if sequence.first_token_s == now_s:
            self._first_tokens.rows.append((now_s, now_s - sequence.request.arrival_s))

    def finished(self, sequence: SequenceState, tokens: int, now_s: float) -> None:
        """A request gave its last token."""
        first_s = now_s if sequence.first_token_s is None else sequence.first_token_s
        tpot_s = (now_s - first_s) / max(1, tokens - 1)
        e2e_s = now_s - sequence.request.arrival_s
        self._ended.rows.append((now_s, self._ended.sum(1) + tokens, tpot_s, e2e_s))

    def plan(self, engine: EngineState, queue: Collection[SequenceState], now_s: float) -> SetClock | None:
        """Ask the policy; a command if it wants another clock. Raises OwnPolicyError."""
        assert engine.spec is not None
        engine.replan_s = now_s + ASK_S
        maximum = engine.spec.clocks_mhz[-1]
        if engine.clock_mhz is None:
            engine.plan = FrequencyPlan(mhz=maximum, why=Reason.UNKNOWN_STATE)
        elif engine.table is None:
            engine.plan = FrequencyPlan(mhz=maximum, why=Reason.NO_TABLE)
        else:
            view = self._view(engine, engine.spec, engine.table, engine.clock_mhz, queue, now_s)
            engine.plan = FrequencyPlan(mhz=self._asked(view), why=Reason.OWN_POLICY)
        if engine.plan.mhz == engine.target_mhz:
            return None
        engine.target_mhz, engine.set_at_s = engine.plan.mhz, now_s
        return SetClock(engine=engine.engine, plan=engine.plan)

    def _asked(self, view: EngineView) -> int:
        name = type(self.policy).__qualname__
        try:
            clock_mhz = self.policy.clock_mhz(view)
        except (Exception, SystemExit) as error:  # sys.exit() would end the run as if it were done
            raise OwnPolicyError(f"policy {name}: clock_mhz failed at {view.now_s:.3f} s: {error!r}") from error
        if not isinstance(clock_mhz, Real) or clock_mhz not in view.clocks_mhz:
            low, high = view.clocks_mhz[0], view.clocks_mhz[-1]
            raise OwnPolicyError(
                f"policy {name}: clock_mhz returned {clock_mhz!r} at {view.now_s:.3f} s; it must return one of "
                f"view.clocks_mhz, {low} to {high} MHz"
            )
        return int(clock_mhz)

    def _view(
        self,
        engine: EngineState,
        spec: EngineSpec,
        table: PerformanceTable,
        clock_mhz: int,
        queue: Collection[SequenceState],
        now_s: float,
    ) -> EngineView:
        board, iteration = engine.board, engine.iteration
        generated = sum(sequence.generated_tokens(iteration - 1) for sequence in board.running.values())
        return EngineView(
            now_s=now_s,
            clocks_mhz=spec.clocks_mhz,
            clock_mhz=clock_mhz,
            target_mhz=engine.target_mhz or spec.clocks_mhz[-1],
            switch_latency_s=self.switch_latency_s,
            running=board.running_sequences,
            max_batch=spec.max_batch,
            kv_blocks=board.kv_blocks(iteration),
            kv_capacity_blocks=spec.kv_blocks,
            block_tokens=spec.block_tokens,
            prefill_budget_tokens=spec.prefill_budget_tokens,
            prompts=tuple(
                PromptView(age_s=now_s - waits.request.arrival_s, prompt_tokens=waits.computed_tokens)
                for waits in (*board.pending.values(), *queue)
            ),
            slo=self._tightest(now_s),
            recent=RecentView(
                seen_s=min(RECENT_S, now_s - self._began_s) if self._began_s is not None else 0.0,
                arrivals=self._arrivals.recent(now_s),
                first_tokens=self._first_tokens.recent(now_s),
                ended=self._ended.recent(now_s),
            ),
            tokens=int(self._ended.sum(1)) + generated,
            idle_w=spec.idle_w,
            table=table,
        )

    def _tightest(self, now_s: float) -> Slo:
        self._slos = {slo: at_s for slo, at_s in self._slos.items() if at_s >= now_s - RECENT_S}
        slos = self._slos
        return Slo(
            e2e_s=min((slo.e2e_s for slo in slos if slo.e2e_s is not None), default=None),
            tbt_s=min((slo.tbt_s for slo in slos if slo.tbt_s is not None), default=None),
            ttft_s=min((slo.ttft_s for slo in slos if slo.ttft_s is not None), default=None),
        )
