"""All that a whole comparison found, and what follows from several of its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tools.evaluation.trace import Sent
from tools.loop.outcome import Figures, Run, middle
from tools.loop.plan import Plan

Simulated = Mapping[str, Figures]


class Found(NamedTuple):
    """Runs in the order in which they were made; the simulation by policy, and that with the live gateway's table (both
    empty: none was made).
    """

    plan: Plan
    sent: Sequence[Sent]
    runs: Sequence[Run]
    simulated: Simulated
    informed: Simulated

    def of(self, policy: str) -> list[Run]:
        """The runs of a policy that set clocks."""
        return [run for run in self.runs if run.policy == policy and run.clocks == "on"]

    def middle(self, policy: str) -> Figures:
        """Their medians."""
        return middle([run.figures for run in self.of(policy)])

    def advice(self) -> Run | None:
        """The run that only advised."""
        return next((run for run in self.runs if run.advised is not None), None)
