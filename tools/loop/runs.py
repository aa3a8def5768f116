"""Run after run: a gateway of one policy in front of the engine, the client's replay, what was read meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tools.loop import outcome, readings
from tools.loop.bed import LoopBed, LoopError
from tools.loop.meter import EVERY_S
from tools.loop.outcome import Run
from tools.loop.plan import BASELINE, OURS, Plan, physics
from tools.loop.readings import Meter, Steps, replay
from tools.testbed.trace import Sent

ON, DRY_RUN = "on", "dry-run"
CLIENT_S, GATEWAY_S, ENGINE_S, TRAIN_S, SIMULATE_S = 25.0, 8.0, 60.0, 10.0, 60.0
"""About how long each takes to start, or in all."""
TOLERANCE = 0.05
"""Of the energy, between the counter and the steps' own sum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One run to be made."""

    policy: str
    clocks: str
    round: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.policy}-{self.clocks}-{self.round}"

    def words(self) -> str:
        """In words."""
        return f"round {self.round + 1}, {self.policy}{'' if self.clocks == ON else ', dry run'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A run, and the files that it left."""

    run: Run
    meter: Meter
    steps: Steps


def turns(plan: Plan) -> list[Turn]:
    """All runs in order; each policy is first, second and third equally often. The dry run comes in the middle."""
    found = []
    for number in range(plan.rounds):
        first = number % len(plan.policies)
        order = (*plan.policies[first:], *plan.policies[:first])
        found += [Turn(policy=policy, clocks=ON, round=number) for policy in order]
    if plan.dry_run:
        found.insert(len(found) // 2, Turn(policy=OURS, clocks=DRY_RUN, round=0))
    return found


def run_s(plan: Plan) -> float:
    """About how long a run takes."""
    return GATEWAY_S + CLIENT_S + plan.window_s


def recorded(bed: LoopBed, sent: Sequence[Sent], todo: Sequence[Turn]) -> Iterator[Recorded]:
    """Make the runs. Raises LoopError, ProcessError."""
    report, plan = bed.workspace.report, bed.plan
    for number, turn in enumerate(todo):
        left_min = (len(todo) - number) * run_s(plan) / 60
        report(f"run {number + 1} of {len(todo)}: {turn.words()}; about {left_min:.0f} min left")
        found = one(bed, sent, turn)
        report(_found(found.run))
        yield found


def one(bed: LoopBed, sent: Sequence[Sent], turn: Turn) -> Recorded:
    """One run; afterwards its gateway is gone and the GPU is free."""
    plan, folder, load = bed.plan, bed.folder / turn.name, os.getloadavg()[0]
    with bed.quiet() as quiet, bed.gateway(turn.policy, turn.clocks, folder) as up:
        with bed.meter(folder / "meter.csv", up):
            before = readings.page(up.url)
            replayed = replay(bed.clients, up.url, sent, bed.tokenizer, folder / "client", bed.machine)
            if not replayed.answered:
                raise LoopError(
                    f"{turn.words()}: no request was answered; the gateway's log:\n{up.process.last_lines()}"
                )
            from_s = outcome.began(replayed.answered)
            to_s = from_s + plan.window_s
            time.sleep(max(0.0, to_s + 2 * EVERY_S - time.time()))
            after = readings.page(up.url)
        meter = Meter.read(folder / "meter.csv")
    freed_s = bed.freed()
    steps = Steps.read(bed.steps, time.time() - time.monotonic()).between(from_s, to_s)
    run = Run(
        policy=turn.policy,
        clocks=turn.clocks,
        round=turn.round,
        requests=len(sent),
        answered=len(replayed.answered),
        began_s=from_s,
        figures=outcome.measured(replayed, meter, steps, plan, len(sent)),
        cost=outcome.cost(before, after, meter, from_s, to_s),
        trust=outcome.trust(steps, replayed, freed_s=freed_s, load=load, quiet=quiet),
        predicted=readings.gauge(after, "throttllem_dry_run_saving_ratio") if turn.clocks == DRY_RUN else None,
    )
    return Recorded(run=run, meter=meter, steps=steps)


def check(found: Recorded, plan: Plan) -> list[str]:
    """What a run shows of the chain that it should not; nothing if it works."""
    run, wrong = found.run, []
    if run.answered < run.requests:
        wrong.append(f"{run.requests - run.answered} of {run.requests} requests were not answered")
    counted_j, drawn_j = run.figures.energy_j, run.trust.hook_j
    if not drawn_j * (1 - TOLERANCE) < counted_j < drawn_j * (1 + TOLERANCE) + physics().idle_w() * plan.window_s:
        wrong.append(f"the counter rose by {counted_j:.0f} J, steps drew {drawn_j:.0f} J")
    clocks = found.meter.clocks(run.began_s, run.began_s + plan.window_s)
    if (
        run.clocks == ON and run.policy != BASELINE and not clocks - {max(plan.clocks_mhz)}
    ):  # it may keep to a lower one
        wrong.append(f"the clock did not move: {clocks}")
    return wrong


def _found(run: Run) -> str:
    found = run.figures
    return (
        f"  {found.energy_j / 1e3:.1f} kJ, {found.tokens_per_j:.2f} tokens/J, {found.clock_mhz:.0f} MHz, "
        f"SLOs met {found.attainment:.1%}, E2E p99 {found.e2e_p99_s:.1f} s, overruns {run.trust.overruns:.1%}, "
        f"GPU free after {run.trust.freed_s * 1e3:.0f} ms"
    )
