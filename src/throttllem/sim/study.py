"""From the options of a simulation to its results: `Study` (what to simulate), `Scenario` (resolved), `RunResult`s.

`Study.prepare` resolves every input and does what is slow once (train, characterise; both cached), `Scenario.run`
simulates one policy, `run_all` several side by side. Knows nothing of the command line or the report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Literal

from throttllem.config import LengthOptions, Options
from throttllem.core.clocks.policy import Policy
from throttllem.core.clocks.savings_estimate import SavingsEstimate
from throttllem.core.controller import Controller
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.lengths.online import OnlineLengthOptions, OnlineLengthPredictor
from throttllem.core.lengths.prediction import LengthPredictor, MaxTokens, Noisy, Oracle
from throttllem.core.options import ControllerOptions
from throttllem.core.pool.pool import PoolOptions
from throttllem.core.types import Request, Slo
from throttllem.engines.simulated.fleet import Fleet, build_fleet
from throttllem.engines.simulated.presets import batching
from throttllem.physics.catalogue import Catalogue
from throttllem.physics.estimate import reach
from throttllem.profiling.tables import Progress, performance_tables
from throttllem.sim import parallel
from throttllem.sim.characterize import Capacity, capacities, limited
from throttllem.sim.driver import Machine, Simulation, Watch
from throttllem.sim.own_policy import made, named_policy
from throttllem.sim.recorder import Recorder
from throttllem.sim.result import RunResult
from throttllem.sim.traces.trace import Trace, load_trace

MAXIMUM = "max"
SLO_TBT_S = 0.2
"""A simulation's TBT SLO where none is set."""
_BINS = 500
_SECTIONS = ("throttle", "admission", "autoscale", "length", "batching", "noise", "faults", "cost")
"""Of the options, those that a simulation and its report depend on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What to simulate; None stands for the contract's default.

    `peak_rps`: requests/s of the busiest minute, "max" for the maximum load of the largest engine (of all that fit a
    pool), None for the trace as it is. `columns`: those of a trace file (`traces.formats.parse_columns`). `gpus`: those
    of a pool of engines; None: one engine at a time. `engines`: how many of each size the pool begins with; None: as
    many of the largest as fit. `slo_e2e_s` None: the E2E p99 that `characterize` finds for the
    largest engine. `slo_tbt_s` None: SLO_TBT_S.
    """

    gpu: str
    model: str
    sizes: tuple[int, ...]
    trace: str
    policies: tuple[str, ...]
    slo_e2e_s: float | None = None
    slo_tbt_s: float | None = None
    slo_ttft_s: float | None = None
    slo_batch: bool = False
    peak_rps: float | str | None = None
    seconds: float | None = None
    columns: str | None = None
    seed: int = 0
    count_freed_gpus: bool = False
    gpus: int | None = None
    engines: Mapping[int, int] | None = None
    options: Options = field(default_factory=Options)

    def prepare(
        self,
        catalogue: Catalogue,
        cache_dir: Path,
        progress: Progress = lambda *_: None,
        loaded: Callable[[Trace], None] = lambda _: None,
    ) -> tuple[Scenario, list[Policy]]:
        """The scenario and its policies. Raises ValueError (what, where, what to do) before anything slow begins.

        `loaded` gets the trace as soon as it is read, and scaled where `peak_rps` is a number.
        """
        tbt_s = SLO_TBT_S if self.slo_tbt_s is None else self.slo_tbt_s
        slo = Slo(e2e_s=self.slo_e2e_s, tbt_s=tbt_s, ttft_s=self.slo_ttft_s)
        if not self.policies:
            raise ValueError("no policy given: name one or more, as in --policy triton,throttllem")
        if len(set(self.policies)) < len(self.policies):
            raise ValueError(f"--policy {','.join(self.policies)}: a policy is named twice")
        fleet = build_fleet(catalogue, self.gpu, self.model, self.sizes, self.options.batching)
        choices = fleet.sizes * (1 if self.gpus is None else self.gpus)  # a pool also chooses how many of a size
        policies = [named_policy(name, fleet.clocks_mhz, choices) for name in self.policies]
        self._check_pool(fleet, policies)
        rate = None if self.peak_rps in (None, MAXIMUM) else float(self.peak_rps or 0)
        whole = load_trace(self.trace, columns=self.columns, seed=self.seed, rescaled=self.peak_rps is not None)
        trace = self._cut(whole if rate is None else whole.scaled(peak_rps=rate))
        loaded(trace)
        found = capacities(fleet, whole, self.options, cache_dir, seed=self.seed, slo=slo, progress=progress)
        largest = found[fleet.sizes[-1]]
        if self.peak_rps == MAXIMUM:
            if not largest.max_rps:
                raise ValueError(
                    f"--peak-rps {MAXIMUM}: TP {largest.tp} sustains no load under these SLOs; loosen --slo-e2e, "
                    "--slo-tbt or --slo-ttft, or give a rate"
                )
            engines = 1 if self.gpus is None else self.gpus // largest.tp
            trace = self._cut(whole.scaled(peak_rps=largest.max_rps * engines))
        # Last, as training takes longest; the baselines need no predictions.
        trained = any(policy.needs_tables for policy in policies)
        tables = performance_tables(fleet, cache_dir, seed=self.seed, progress=progress) if trained else {}
        length = replace(self.options.length, predictor=self.options.length.simulated)
        scenario = Scenario(
            fleet=fleet,
            trace=trace,
            tables=tables,
            capacities=found,
            slo=replace(slo, e2e_s=slo.e2e_s or largest.e2e_p99_s, batch=self.slo_batch),
            slo_assumed=tuple(name for name in ("e2e_s", "tbt_s", "ttft_s") if getattr(self, f"slo_{name}") is None),
            options=self.options.model_copy(update={"length": length}),
            seed=self.seed,
            count_freed_gpus=self.count_freed_gpus,
            gpus=self.gpus,
            engines=self.engines,
        )
        return scenario, policies

    def _check_pool(self, fleet: Fleet, policies: Sequence[Policy]) -> None:
        """Raise ValueError for what a pool cannot do."""
        if self.gpus is None:
            if self.engines is not None:
                raise ValueError("--engines: is for a pool; give its GPUs with --gpus")
            return
        for tp in self.engines or ():
            if tp not in fleet.sizes:
                raise ValueError(f"--engines: TP {tp} is none of --sizes {','.join(map(str, fleet.sizes))}")
        taken = sum(tp * count for tp, count in (self.engines or {}).items())
        if taken > self.gpus:
            raise ValueError(f"--engines: need {taken} GPUs, and there are --gpus {self.gpus}")
        if self.gpus < fleet.sizes[-1]:
            raise ValueError(f"--gpus {self.gpus}: an engine of TP {fleet.sizes[-1]} does not fit; give more, or --tp")
        if self.options.faults.gpus_per_host < fleet.sizes[-1]:
            raise ValueError(
                f"faults.gpus_per_host = {self.options.faults.gpus_per_host}: an engine of TP {fleet.sizes[-1]} is on "
                "one host; give more, or smaller --sizes"
            )
        for policy in policies:
            if policy.own is not None or policy.gathers:
                raise ValueError(
                    f"--policy {policy.name} --gpus {self.gpus}: a pool runs under triton, throttllem, least-energy or "
                    "fixed:<MHz>, each also with +autoscale; leave --gpus out, or take one of these"
                )

    def _cut(self, trace: Trace) -> Trace:
        return trace if self.seconds is None else trace.cut(self.seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One trace on one fleet under one set of SLOs, the same for every policy."""

    fleet: Fleet
    trace: Trace
    tables: dict[int, PerformanceTable]
    capacities: dict[int, Capacity]
    slo: Slo
    options: Options
    seed: int
    count_freed_gpus: bool = False
    gpus: int | None = None
    engines: Mapping[int, int] | None = None
    slo_assumed: tuple[str, ...] = ()
    """The fields of `slo` that nobody set."""

    def with_lengths(self, predictor: Literal["online", "oracle", "max-tokens"]) -> Scenario:
        """The same scenario with another prediction of output lengths."""
        length = LengthOptions(predictor=predictor, exceed=self.options.length.exceed)
        return replace(self, options=self.options.model_copy(update={"length": length}))

    @property
    def largest(self) -> int:
        """The engine size that every policy begins with; without autoscaling it is the only one."""
        return self.fleet.sizes[-1]

    @property
    def pool(self) -> PoolOptions | None:
        """The pool: with the engines asked for, or full of those of the largest size; None: one engine at a time."""
        if self.gpus is None:
            return None
        bare_w = self.fleet.physics[self.largest].gpu.power.bare_idle_w
        engines = self.engines or {self.largest: self.gpus // self.largest}
        return PoolOptions(gpus=self.gpus, engines=engines, free_w=bare_w)

    def run(
        self, policy: Policy, progress: Callable[[float], None] = lambda _: None, watch: Watch | None = None
    ) -> RunResult:
        """Simulate one policy. Deterministic but for the decision times."""
        controller = self.controller(policy)
        table = None if policy.autoscale or self.gpus is not None else self.tables.get(self.largest)
        estimate = SavingsEstimate(table=table, spec=self.fleet.specs[self.largest]) if table is not None else None
        recorder = Recorder(bin_s=max(1.0, self.trace.duration_s / _BINS), estimate=estimate)
        simulation = Simulation(controller, self.machine(), recorder, seed=self.seed, watch=watch)
        simulation.run(
            self.requests(batch=policy.gathers),
            max(self.engines or (self.largest,)),
            lambda arrived: progress(arrived / self.trace.requests),
        )
        return recorder.result(
            policy=policy.name,
            slo=self.slo,
            duration_s=simulation.now_s,
            energy_j=simulation.energy_j,
            idle_energy_j=simulation.idle_energy_j,
            lost=controller.snapshot().counts.lost,
            preemptions=simulation.preemptions,
        )

    def requests(self, *, batch: bool = False) -> Iterator[Request]:
        """The trace's requests with the scenario's SLO and the client's output limit; `batch`: each may be held."""
        slo = replace(self.slo, batch=True) if batch else self.slo
        numbers = count()
        for block in limited(self.trace, self.fleet, self.options):
            for at_s, prompt, output, limit in zip(*(column.tolist() for column in block), strict=True):
                yield Request(
                    id=next(numbers),
                    arrival_s=at_s,
                    prompt_tokens=prompt,
                    output_tokens=output,
                    max_tokens=limit,
                    slo=slo,
                )

    def controller(self, policy: Policy) -> Controller:
        """A new controller for one policy."""
        capacity = {tp: capacity.max_rps for tp, capacity in self.capacities.items()}
        return Controller(
            ControllerOptions(
                throttle=replace(self.options.throttle, policy=policy.clock, fixed_mhz=policy.fixed_mhz),
                slo_aware=policy.slo_aware,
                admission=self.options.admission,
                autoscale=replace(self.options.autoscale, capacity_rps=capacity) if policy.autoscale else None,
                pool=self.pool,
                predictor=self._predictor() if policy.slo_aware or policy.own is not None else Oracle(),
                inflation=self.options.length.factor,
                specs=self.fleet.specs,
                tables=self.tables,
            ),
            own=made(policy),
        )

    def _predictor(self) -> LengthPredictor:
        length = self.options.length
        match length.predictor:
            case "online":
                return OnlineLengthPredictor(OnlineLengthOptions(exceed=length.exceed))
            case "max-tokens":
                return MaxTokens()
            case _:
                return Noisy(p95_error=length.error, seed=self.seed) if length.error else Oracle()

    def machine(self) -> Machine:
        """The simulated GPUs."""
        gpu = self.fleet.physics[self.largest].gpu
        return Machine(
            specs=self.fleet.specs,
            physics=self.fleet.physics,
            switch_latency_s=self.options.throttle.switch_latency_s,
            startup_w=gpu.startup_w,
            gpus=self.gpus or self.largest,
            freed_w=gpu.power.bare_idle_w if self.count_freed_gpus or self.gpus is not None else None,
            faults=self.options.faults if self.gpus is not None else None,
            noise=self.options.noise,
        )

    def described(self) -> dict[str, object]:
        """Every input, resolved, for the JSON and the report."""
        return {
            "gpu": self.fleet.gpu,
            "model": self.fleet.physics[self.largest].model.name,
            "batching": batching(self.options.batching, self.fleet.physics[self.largest].gpu).described,
            "sizes": list(self.fleet.sizes),
            "trace": {
                "name": self.trace.name,
                "source": self.trace.source,
                "sha256": self.trace.sha256,
                "requests": self.trace.requests,
                "seconds": self.trace.duration_s,
                "mean_rps": self.trace.mean_rps,
                "peak_rps": self.trace.peak_rps,
                "reading": None if self.trace.reading is None else asdict(self.trace.reading),
            },
            "slo": asdict(self.slo),
            "slo_assumed": list(self.slo_assumed),
            "capacities": [asdict(self.capacities[tp]) for tp in sorted(self.capacities)],
            "engines": [
                {key: value for key, value in asdict(self.fleet.specs[tp]).items() if key != "clocks_mhz"}
                | {"physics": reach(self.fleet.physics[tp], self.trace.mean_context_tokens)}
                for tp in self.fleet.sizes
            ],
            "options": {name: asdict(getattr(self.options, name)) for name in _SECTIONS},
            "count_freed_gpus": self.count_freed_gpus,
            "gpus": self.gpus,
            "engines_at_start": None if self.pool is None else dict(self.pool.engines),
            "seed": self.seed,
        }


def run_all(
    jobs: Sequence[tuple[Scenario, Policy]], *, workers: int, progress: parallel.Progress = lambda *_: None
) -> list[RunResult]:
    """Simulate every job, `workers` at a time."""
    tasks = [functools.partial(scenario.run, policy) for scenario, policy in jobs]
    return parallel.side_by_side(tasks, workers=workers, progress=progress)
