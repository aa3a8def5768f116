"""The clock of each engine: plans it, and decides when a planned clock is worth a switch.

A higher clock is set at once; a lower one only after the minimum dwell and, where energy is the aim, only if it is
worth a switch. What is not known (clock, table, hull) means the maximum clock, and the plan gives the reason.
Knows nothing of the queue but that a request waits.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import replace

import numpy as np

from throttllem.core.clocks.hindsight import Switching, known_well_enough, pace_in_hindsight, renewed
from throttllem.core.clocks.policy import (
    Bools,
    ClockPolicy,
    Floats,
    ThrottleOptions,
    at_least,
    feasible,
    least_energy,
    lowest_feasible,
    unmeetable,
)
from throttllem.core.clocks.request_chain import chain
from throttllem.core.clocks.steady_load import LoadEstimator, Steady, settled
from throttllem.core.engine_state import EngineState
from throttllem.core.forecast.horizon import Horizon, look_ahead
from throttllem.core.forecast.margins import InForce, Margins
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.forecast.projection import project
from throttllem.core.forecast.table_drift import Span
from throttllem.core.types import EngineSpec, FrequencyPlan, Reason, SetClock

_LEAST_STEPS_DOWN, _FINE = 2, 0.02
"""A lower clock is this many profiled clocks lower at least, where those are closer than this part of the maximum; a
profile of a few clocks has them farther apart."""
_RENEW_S = 30.0
"""Time between two searches for the pace."""


class ClockController:
    """Plans the clocks of one controller's engines."""

    def __init__(self, options: ThrottleOptions, load: LoadEstimator, margins: Margins) -> None:
        self.options = options
        self._load = load
        self._margins = margins

    def plan(self, engine: EngineState, now_s: float, *, waiting: int) -> SetClock | None:
        """Plan the clock of a ready engine after a change; a command if another clock is to be set.

        `waiting`: requests that this engine should serve and that could not be admitted yet.
        """
        spec, policy = engine.spec, self.options.policy
        assert spec is not None
        maximum = spec.clocks_mhz[-1]
        engine.replan_s = math.inf
        if policy is ClockPolicy.TOP:
            plan = FrequencyPlan(mhz=maximum, why=Reason.FIXED)
        elif policy is ClockPolicy.FIXED:
            plan = FrequencyPlan(mhz=self.options.fixed_mhz or maximum, why=Reason.FIXED)
        elif engine.clock_mhz is None:
            plan = FrequencyPlan(mhz=maximum, why=Reason.UNKNOWN_STATE)
        elif engine.table is None:
            plan = FrequencyPlan(mhz=maximum, why=Reason.NO_TABLE)
        elif engine.uncontrolled:
            engine.table_drift.span = None
            plan = FrequencyPlan(mhz=maximum, why=Reason.UNCONTROLLED)
        elif not engine.board.running and not engine.board.pending:
            engine.projection = engine.table_drift.span = None
            plan = FrequencyPlan(mhz=engine.target_mhz or maximum, why=Reason.IDLE)
        else:
            plan = self._plan_busy(engine, spec, self._metered(engine, engine.table), now_s, waiting)
        engine.plan = plan
        if plan.mhz == engine.target_mhz:
            if plan.why is not Reason.IDLE and not engine.uncontrolled:
                self._meter(engine)
            return None
        engine.target_mhz, engine.set_at_s = plan.mhz, now_s
        return SetClock(engine=engine.engine, plan=plan)

    def _metered(self, engine: EngineState, table: PerformanceTable) -> PerformanceTable:
        """The engine's table, corrected by what its iterations took since the last plan."""
        drift = engine.table_drift
        if engine.began_s is None or engine.spec is None:
            drift.span = None
        elif drift.close(table, engine.spec.block_tokens, engine.iteration, engine.began_s):
            engine.table = table = table.corrected(drift.factors())
            engine.steady_at_s = -math.inf
        return table

    def _meter(self, engine: EngineState) -> None:
        """From this plan on, iterations are metered if nothing but the table decides how long they take: decoding
        alone, at the planned clock, which nothing holds down.
        """
        board, table, began_s = engine.board, engine.table, engine.began_s
        alone = board.running and not board.pending and not board.external.batch
        if not alone or table is None or table.limit_mhz is not None or began_s is None:
            return
        if engine.clock_mhz == engine.target_mhz and engine.clock_mhz in table.clocks_mhz:
            engine.table_drift.open(
                Span(
                    first=engine.iteration,
                    began_s=began_s,
                    column=table.clocks_mhz.index(engine.clock_mhz),
                    batch=board.running_sequences,
                    kv_blocks=board.kv_blocks(engine.iteration),
                )
            )

    def _plan_busy(
        self, engine: EngineState, spec: EngineSpec, table: PerformanceTable, now_s: float, waiting: int
    ) -> FrequencyPlan:
        """The plan for an engine that runs requests and has a performance table."""
        board, maximum = engine.board, spec.clocks_mhz[-1]
        base_s = now_s if engine.began_s is None else engine.began_s
        engine.replan_s = now_s + self.options.replan_s
        engine.projection = projection = project(board, spec, first=engine.iteration)
        least = self.options.policy is ClockPolicy.LEAST_ENERGY
        ahead = self._ahead(engine, spec, table, base_s)
        if not ahead.inside_hull:
            return FrequencyPlan(mhz=maximum, why=Reason.OUTSIDE_HULL)
        if engine.table_drift.beyond_since_s is not None:
            return FrequencyPlan(mhz=maximum, why=Reason.TABLE_DRIFT)
        steady = self._steady(engine, spec, table, now_s) if least else None
        if steady is None and (waiting or board.lost_requests):
            plan = FrequencyPlan(mhz=maximum, why=Reason.WAITING)
        else:
            plan = self._choose(engine, spec, table, ahead, steady, now_s, waiting)
            if plan.why is not Reason.INFEASIBLE:
                return plan
        emptying = look_ahead(board, spec, table, projection, base_s=base_s) if least else ahead
        delay_s = engine.maximum_clock_delay_s(now_s, self.options.switch_latency_s)
        lost = unmeetable(emptying, board, table, delay_s)
        for sequence in lost:
            board.mark_lost(sequence)
        if steady is None:
            return FrequencyPlan(mhz=maximum, why=Reason.LOST_RUNNING) if board.lost_requests else plan
        if lost:  # they bind no clock now, and are served at the one that suits the load
            ahead = self._ahead(engine, spec, table, base_s)
            return self._choose(engine, spec, table, ahead, steady, now_s, waiting)
        return plan

    def _ahead(self, engine: EngineState, spec: EngineSpec, table: PerformanceTable, base_s: float) -> Horizon:
        """The paper, and a gathering: the batch empties, and every output is as long as its bound. Ours: the batch
        stays as it is, since others come as these go. Most outputs end before their bound, so the clock is asked to
        give the tokens that are expected, early enough for the maximum clock to give the rest.
        """
        board, projection = engine.board, engine.projection
        assert projection is not None
        if self.options.policy is not ClockPolicy.LEAST_ENERGY or engine.gathers:
            return look_ahead(board, spec, table, projection, base_s=base_s)
        unsure = board.unsure
        if board.pending:
            unsure = np.concatenate([unsure, [sequence.unsure_tokens for sequence in board.pending.values()]])
        firsts = np.concatenate([np.zeros(projection.ends.size - projection.starts.size, np.int64), projection.starts])
        ends = np.maximum(projection.ends - unsure, firsts + 1)
        ahead = look_ahead(board, spec, table, replace(projection.replenished(), ends=ends), base_s=base_s)
        rest_s = (projection.ends - ends) * float(table.seconds[table.with_prompt(int(ahead.cells[0]), 0), -1])
        return replace(ahead, deadline_s=ahead.deadline_s - rest_s)

    def _choose(
        self,
        engine: EngineState,
        spec: EngineSpec,
        table: PerformanceTable,
        ahead: Horizon,
        steady: Steady | None,
        now_s: float,
        waiting: int,
    ) -> FrequencyPlan:
        """The paper: the lowest clock that meets every SLO of the requests at hand. Ours: the one of least mean power
        for so many requests at the present load, or the next higher one that meets every SLO though requests go on
        coming; of a gathering whose requests are all in time, the one of least energy beyond what the engine would draw
        idle in that time.
        """
        least, keep = self.options.policy is ClockPolicy.LEAST_ENERGY, self._in_force(engine)
        delay_s = self._delays(engine, spec, now_s)
        # The reserve for requests yet to come may be used when nothing else will do.
        stretch = 1.0 if steady is None else steady.stretch
        tries = [(keep.margin, keep.reserve, stretch)]
        if least:
            tries.append((keep.spent, 0.0, 1.0))
        for margin, reserve, stretch in tries:
            holds, run = feasible(
                ahead,
                engine.board,
                table,
                delay_s=delay_s,
                margin=margin,
                reserve=reserve,
                stretch=stretch,
                each_step=steady is None,
            )
            if steady is None:
                holds = holds & self._first_token_in_time(engine, spec, ahead, table, margin)
            if holds.any():
                break
        binding = None if run is None else ahead.binding(engine.board, run)
        if not least:
            return self._after_dwell(engine, lowest_feasible(holds, spec, binding), now_s)
        if steady is None or (engine.gathers and not engine.board.lost_requests):
            cost = ahead.joules(table, spec.idle_w)
            plan = self._after_dwell(engine, least_energy(holds, cost, spec, binding), now_s)
            return self._if_worth_it(engine, spec, plan, cost)
        assert engine.hindsight is not None
        by_requests = engine.hindsight.by_requests
        column = int(by_requests[min(len(engine.board) + waiting, by_requests.size - 1)])
        plan = at_least(holds, column, spec, binding)
        return self._if_steps_down(engine, spec, self._after_dwell(engine, plan, now_s))

    def _first_token_in_time(
        self, engine: EngineState, spec: EngineSpec, ahead: Horizon, table: PerformanceTable, margin: float
    ) -> Bools:
        """Clocks at which the next request has its first token in time: a prompt is under way at this clock, then the
        clock is switched, and its own runs at the maximum. A TTFT SLO that its own prompt alone violates there binds no
        clock. The paper, which knows no TTFT: three prompts at this clock.
        """
        ttft_s, prompt_tokens = self._load_of(engine).first_token
        prompt_s = table.seconds[table.with_prompt(int(ahead.cells[0]), prompt_tokens)]
        unmeetable = float(prompt_s[-1]) > ttft_s
        if self.options.policy is ClockPolicy.LEAST_ENERGY:
            needed_s = prompt_s + prompt_s[-1]
            needed_s[:-1] += engine.switch_latency.to_s(
                spec.clocks_mhz, spec.clocks_mhz[-1], self.options.switch_latency_s
            )
        else:
            needed_s = 3.0 * prompt_s
        in_time: Bools = (needed_s <= ttft_s * (1.0 - margin)) | unmeetable
        return in_time

    def _load_of(self, engine: EngineState) -> LoadEstimator:
        """What the engine is given: all that comes, unless it is one of several."""
        return self._load if engine.load is None else engine.load

    def _in_force(self, engine: EngineState) -> InForce:
        """The margins that the requests in an engine need."""
        begun = self.options
        return self._margins.of_clocks(
            engine.board.classes, margin=begun.margin, reserve=begun.reserve, disturbed=engine.disturbed
        )

    def _delays(self, engine: EngineState, spec: EngineSpec, now_s: float) -> Floats:
        """Seconds until each clock is in force; a lower one is never late."""
        clocks = spec.clocks_mhz
        delays = engine.switch_latency.to_each_s(clocks, self.options.switch_latency_s)
        delays[: bisect_right(clocks, engine.clock_mhz or 0)] = 0.0
        target = bisect_left(clocks, engine.target_mhz or 0)
        if target < len(clocks) and clocks[target] == engine.target_mhz:
            latency_s = float(delays[target])
            delays[target] = min(latency_s, max(0.0, engine.set_at_s + latency_s - now_s))
        return delays

    def _steady(self, engine: EngineState, spec: EngineSpec, table: PerformanceTable, now_s: float) -> Steady | None:
        """What the load means if it goes on; None while it is unknown, or too much for every clock. With it the pace
        of the engine is renewed.
        """
        before, requests = engine.hindsight, self._load_of(engine)
        age_s = now_s - engine.steady_at_s
        if age_s < self.options.replan_s:
            return engine.steady
        if before is None or age_s > _RENEW_S or renewed(requests, before.requests, age_s):
            engine.steady_at_s = now_s
            engine.steady = engine.hindsight = None
            load = requests.load(now_s) if known_well_enough(requests) else None
            states = None if load is None else chain(load, table, spec)
            if load is None or states is None:
                return None
            engine.steady = settled(load, table, spec)
            maximum_s = engine.switch_latency.to_s(spec.clocks_mhz, spec.clocks_mhz[-1], self.options.switch_latency_s)
            engine.hindsight = pace_in_hindsight(
                requests,
                load,
                states,
                table,
                spec,
                external=engine.board.external,
                switching=Switching(
                    latency_s=maximum_s, dwell_s=self.options.dwell_s, fewest_steps=_least_steps_down(spec)
                ),
                keep=1.0 - self._in_force(engine).learned,
                ended_before=before.ended if before else 0,
            )
            self._margins.forgive(engine.hindsight.late_at_maximum)
        return engine.steady

    def _after_dwell(self, engine: EngineState, plan: FrequencyPlan, now_s: float) -> FrequencyPlan:
        """A lower clock waits until the last one has been in force for the minimum dwell."""
        dwells_until_s = engine.set_at_s + self.options.dwell_s
        if engine.target_mhz is None or plan.mhz >= engine.target_mhz or now_s >= dwells_until_s:
            return plan
        engine.replan_s = min(engine.replan_s, dwells_until_s)
        return FrequencyPlan(mhz=engine.target_mhz, why=Reason.DWELL, binding=plan.binding)

    def _if_steps_down(self, engine: EngineState, spec: EngineSpec, plan: FrequencyPlan) -> FrequencyPlan:
        """A lower clock is set only if it is some profiled clocks lower."""
        if engine.target_mhz is None or plan.mhz >= engine.target_mhz:
            return plan
        lower, present = (bisect_left(spec.clocks_mhz, mhz) for mhz in (plan.mhz, engine.target_mhz))
        if present - lower >= _least_steps_down(spec):
            return plan
        return FrequencyPlan(mhz=engine.target_mhz, why=Reason.NOT_WORTH, binding=plan.binding)

    def _if_worth_it(self, engine: EngineState, spec: EngineSpec, plan: FrequencyPlan, cost: Floats) -> FrequencyPlan:
        """A lower clock is set only if it saves `min_saving` of the cost at least."""
        if engine.target_mhz is None or plan.mhz >= engine.target_mhz:
            return plan
        clocks = np.asarray(spec.clocks_mhz)
        now, then = (float(cost[int(np.searchsorted(clocks, mhz))]) for mhz in (engine.target_mhz, plan.mhz))
        if then <= now * (1.0 - self.options.min_saving):
            return plan
        return FrequencyPlan(mhz=engine.target_mhz, why=Reason.NOT_WORTH, binding=plan.binding)


def _least_steps_down(spec: EngineSpec) -> int:
    """How many profiled clocks lower a clock must be to be worth a switch."""
    clocks = spec.clocks_mhz
    return _LEAST_STEPS_DOWN if clocks[-1] - clocks[0] < _FINE * clocks[-1] * (len(clocks) - 1) else 1
