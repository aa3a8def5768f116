"""Runs of one engine under clocks, and release times, that are known beforehand: what a search compares.

Knows nothing of cells and of how schedules are found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from throttllem.config import Noise
from throttllem.core.types import EngineSpec, Request, Slo
from throttllem.physics.engine import EnginePhysics
from throttllem.report.metrics import ATTAINMENT_SLACK
from throttllem.sim.schedule import Held, Requests, ScheduledEngine

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def least_met(baseline_met: int, arrived: int) -> int:
    """Requests that must meet their SLOs."""
    return math.ceil(baseline_met - ATTAINMENT_SLACK * arrived - 1e-9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holds:
    """When requests are held back: those that arrive from `border_s[i]` to `border_s[i + 1]` reach the engine at the
    latter, where `held[i]`.
    """

    border_s: Floats
    held: Bools

    def release_s(self, arrival_s: Floats) -> Floats:
        """When each request reaches the engine. The order of requests stays."""
        interval = np.searchsorted(self.border_s, arrival_s, side="right") - 1
        inside = (interval >= 0) & (interval < self.held.size)
        at = np.clip(interval, 0, self.held.size - 1)
        released: Floats = np.where(inside & self.held[at], self.border_s[at + 1], arrival_s)
        return released


def every(period_s: float, until_s: float) -> Holds:
    """Requests are gathered for `period_s` again and again."""
    border_s = np.arange(0.0, until_s + period_s, period_s)
    return Holds(border_s=border_s, held=np.ones(border_s.size - 1, dtype=np.bool_))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is decided beforehand: the clock (index) of each `segment_s`, and which requests are held back."""

    segment_s: float
    clocks: Ints
    holds: Holds | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Achieved:
    """What a plan comes to: joules over the window, and requests that met their SLOs."""

    plan: Plan
    energy_j: float
    met: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Serve `requests` with least energy over `window_s`, so that `least_met` of them meet `slo`.

    `engine` has been given the same requests; those that can never fit it meet nothing.
    """

    engine: ScheduledEngine
    clocks_mhz: tuple[int, ...]
    requests: Requests
    slo: Slo
    window_s: float
    least_met: int

    def advance(self, run: Held, plan: Plan, until_s: float = math.inf) -> Held:
        """Move a run on by a plan; it is changed, and returned."""
        from_s = [0.0, *(plan.segment_s * number for number in range(1, plan.clocks.size))]
        clocks = list(zip(from_s, (self.clocks_mhz[clock] for clock in plan.clocks.tolist()), strict=True))
        release_s = None if plan.holds is None else plan.holds.release_s(self.requests.arrival_s)
        return self.engine.run(run, clocks, until_s=until_s, release_s=release_s)

    def outcome(self, run: Held, plan: Plan) -> Achieved:
        """Of a run that has ended."""
        return Achieved(plan=plan, energy_j=self.energy_j(run), met=self.met(run))

    def run(self, plan: Plan) -> Achieved:
        """One whole run."""
        return self.outcome(self.advance(self.engine.begin(), plan), plan)

    def energy_j(self, run: Held) -> float:
        """Joules over the window: idle after the run's end, or all of a run that takes longer."""
        return run.energy_j + self.engine.idle_w * max(0.0, self.window_s - run.now_s)

    def met(self, run: Held) -> int:
        """Requests that met their SLOs, counted as a simulation counts them."""
        first_s, last_s, slo = run.first_token_s, run.ended_s, self.slo
        met = ~np.isnan(last_s)
        if slo.e2e_s is not None:
            met &= last_s - self.requests.arrival_s <= slo.e2e_s
        if slo.ttft_s is not None:
            met &= first_s - self.requests.arrival_s <= slo.ttft_s
        if slo.tbt_s is not None:
            met &= (last_s - first_s) / np.maximum(1, self.requests.output_tokens - 1) <= slo.tbt_s
        return int(met.sum())


def task_of(
    spec: EngineSpec,
    physics: EnginePhysics,
    requests: Sequence[Request],
    *,
    slo: Slo,
    window_s: float,
    seed: int,
    noise: Noise,
) -> Task:
    """The task of one engine and its requests, ascending in arrival: as many must meet `slo` as at the maximum clock,
    less what may be given up.
    """
    columns = Requests(
        arrival_s=np.array([request.arrival_s for request in requests], dtype=np.float64),
        prompt_tokens=np.array([request.prompt_tokens for request in requests], dtype=np.int64),
        output_tokens=np.array([request.output_tokens for request in requests], dtype=np.int64),
        max_tokens=np.array([request.max_tokens for request in requests], dtype=np.int64),
    )
    task = Task(
        engine=ScheduledEngine(spec, physics, columns, seed=seed, noise=noise),
        clocks_mhz=spec.clocks_mhz,
        requests=columns,
        slo=slo,
        window_s=window_s,
        least_met=0,
    )
    baseline = task.run(static(len(spec.clocks_mhz) - 1))
    return replace(task, least_met=least_met(baseline.met, len(requests)))


def static(clock: int, holds: Holds | None = None) -> Plan:
    """One clock, from the beginning to the end."""
    return Plan(segment_s=math.inf, clocks=np.array([clock], dtype=np.int64), holds=holds)


def every_static(task: Task) -> list[Achieved]:
    """A run at each clock, ascending."""
    return [task.run(static(clock)) for clock in range(len(task.clocks_mhz))]


def cheapest(task: Task, outcomes: list[Achieved]) -> Achieved:
    """The one of least energy among those that meet enough. Raises ValueError if none does."""
    enough = [outcome for outcome in outcomes if outcome.met >= task.least_met]
    if not enough:
        raise ValueError(f"no clock meets the SLOs of {task.least_met} of {task.requests.arrival_s.size} requests")
    return min(enough, key=lambda outcome: outcome.energy_j)
