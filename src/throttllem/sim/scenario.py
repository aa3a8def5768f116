"""A scenario: everything a simulation needs, resolved, and one run of one policy on it.

`Scenario.prepare` does what is slow once (profile, train, bake, characterise; cached by their inputs), `Scenario.run`
one policy. Knows nothing of the command line or the report.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from throttllem.config import Options
from throttllem.core.clocks.names import Policy
from throttllem.core.controller import Controller
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.lengths.prediction import LengthPredictor, MaxTokens, Noisy, Oracle
from throttllem.core.options import ControllerOptions
from throttllem.core.types import Request, Slo
from throttllem.engines.simulated.fleet import Fleet
from throttllem.physics.estimate import reach
from throttllem.sim.characterize import Capacity, answer_limits
from throttllem.sim.driver import Machine, Simulation, Watch
from throttllem.sim.recorder import Recorder
from throttllem.sim.result import RunResult
from throttllem.sim.traces import Trace

_BINS = 500
_SECTIONS = ("throttle", "admission", "autoscale", "length", "batching", "noise")
"""Of the options, those that a simulation depends on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One trace on one fleet under one set of promises. Every policy runs on the same."""

    fleet: Fleet
    trace: Trace
    tables: dict[int, PerformanceTable]
    capacities: dict[int, Capacity]
    slo: Slo
    options: Options
    seed: int
    count_freed_gpus: bool = False

    def requests(self) -> list[Request]:
        """The trace's requests, with the promises and the limit that a client would ask for."""
        trace = self.trace
        limits = answer_limits(trace, self.fleet, self.options).tolist()
        columns = zip(
            trace.arrival_s.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), limits, strict=True
        )
        return [
            Request(id=i, arrival_s=at_s, prompt_tokens=prompt, output_tokens=answer, max_tokens=limit, slo=self.slo)
            for i, (at_s, prompt, answer, limit) in enumerate(columns)
        ]

    def controller(self, policy: Policy) -> Controller:
        """A controller for one policy, with everything it may know."""
        capacity = {tp: capacity.max_rps for tp, capacity in self.capacities.items()}
        return Controller(
            ControllerOptions(
                throttle=replace(self.options.throttle, policy=policy.clock, fixed_mhz=policy.fixed_mhz),
                slo_aware=policy.slo_aware,
                admission=self.options.admission,
                autoscale=replace(self.options.autoscale, capacity_rps=capacity) if policy.autoscale else None,
                predictor=self._predictor(),
                inflation=self.options.length.factor,
                specs=self.fleet.specs,
                tables=self.tables,
            )
        )

    def _predictor(self) -> LengthPredictor:
        length = self.options.length
        if length.predictor == "max-tokens":
            return MaxTokens()
        return Noisy(p95_error=length.p95_error, seed=self.seed) if length.p95_error else Oracle()

    @property
    def largest(self) -> int:
        """The size that a policy without autoscaling runs, and every policy begins with."""
        return self.fleet.sizes[-1]

    def machine(self) -> Machine:
        """The simulated GPUs."""
        gpu = self.fleet.physics[self.largest].gpu
        return Machine(
            specs=self.fleet.specs,
            physics=self.fleet.physics,
            switch_latency_s=self.options.throttle.switch_latency_s,
            startup_w=gpu.startup_w,
            gpus=self.largest,
            freed_w=gpu.power.bare_idle_w if self.count_freed_gpus else None,
            noise=self.options.noise,
        )

    def run(
        self, policy: Policy, progress: Callable[[float], None] = lambda _: None, watch: Watch | None = None
    ) -> RunResult:
        """Simulate one policy. Deterministic but for the decision times."""
        controller = self.controller(policy)
        recorder = Recorder(bin_s=max(1.0, self.trace.duration_s / _BINS))
        simulation = Simulation(controller, self.machine(), recorder, seed=self.seed, watch=watch)
        simulation.run(self.requests(), self.largest, progress)
        return recorder.result(
            policy=policy.name,
            slo=self.slo,
            duration_s=simulation.now_s,
            energy_j=simulation.energy_j,
            idle_energy_j=simulation.idle_energy_j,
            lost=controller.snapshot().counts.lost,
            preemptions=simulation.preemptions,
        )

    def described(self) -> dict[str, object]:
        """Every input, resolved, for the JSON and the report."""
        return {
            "gpu": self.fleet.gpu,
            "model": self.fleet.model,
            "sizes": list(self.fleet.sizes),
            "trace": {
                "name": self.trace.name,
                "source": self.trace.source,
                "sha256": self.trace.sha256,
                "requests": self.trace.requests,
                "seconds": self.trace.duration_s,
                "peak_rps": self.trace.peak_rps,
            },
            "slo": asdict(self.slo),
            "capacities": [asdict(self.capacities[tp]) for tp in sorted(self.capacities)],
            "engines": [
                {key: value for key, value in asdict(self.fleet.specs[tp]).items() if key != "clocks_mhz"}
                | {"physics": reach(self.fleet.physics[tp], self.trace.mean_context_tokens)}
                for tp in self.fleet.sizes
            ],
            "options": {name: asdict(getattr(self.options, name)) for name in _SECTIONS},
            "count_freed_gpus": self.count_freed_gpus,
            "seed": self.seed,
        }
