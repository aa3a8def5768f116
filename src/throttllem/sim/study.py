"""From what a user asks for to scenarios that can run: names looked up, tables trained, engines characterised.

Everything that can be refused is refused here, before anything slow begins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from throttllem.config import Options
from throttllem.core.clocks.names import Policy, parse_policy
from throttllem.core.types import Slo
from throttllem.engines.simulated.fleet import build_fleet
from throttllem.physics.catalogue import Catalogue
from throttllem.profiling.tables import Progress, performance_tables
from throttllem.sim.prepare import capacities
from throttllem.sim.scenario import Scenario
from throttllem.sim.traces import Trace, load_trace

MAXIMUM = "max"


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What to simulate, as asked for; None stands for the default that the contract names.

    `peak_rps`: requests/s of the busiest minute, "max" for the maximum load of the largest engine, None for the trace
    as it is. `slo_e2e_s` None: what `characterize` finds for the largest engine.
    """

    gpu: str
    model: str
    sizes: tuple[int, ...]
    trace: str
    policies: tuple[str, ...]
    slo_e2e_s: float | None = None
    slo_tbt_s: float | None = 0.2
    slo_ttft_s: float | None = None
    peak_rps: float | str | None = None
    seconds: float | None = None
    seed: int = 0
    count_freed_gpus: bool = False
    options: Options = field(default_factory=Options)

    def prepare(
        self, catalogue: Catalogue, cache_dir: Path, progress: Progress = lambda *_: None
    ) -> tuple[Scenario, list[Policy]]:
        """The scenario and its policies. Raises ValueError (what, where, how to mend it) for what cannot be."""
        promised = Slo(e2e_s=self.slo_e2e_s, tbt_s=self.slo_tbt_s, ttft_s=self.slo_ttft_s)
        if not self.policies:
            raise ValueError("no policy given: name one or more, as in --policy triton,throttllem")
        if len(set(self.policies)) < len(self.policies):
            raise ValueError(f"--policy {','.join(self.policies)}: a policy is named twice")
        fleet = build_fleet(catalogue, self.gpu, self.model, self.sizes, self.options.batching)
        policies = [parse_policy(name, fleet.clocks_mhz, fleet.sizes) for name in self.policies]
        lengths = load_trace(self.trace, seed=self.seed)
        at_most = None if self.peak_rps in (None, MAXIMUM) else float(self.peak_rps or 0)
        trace = self._cut(lengths if at_most is None else lengths.scaled(peak_rps=at_most))
        found = capacities(
            fleet, lengths, self.options, cache_dir, seed=self.seed, promised=promised, progress=progress
        )
        largest = found[fleet.sizes[-1]]
        if self.peak_rps == MAXIMUM and not largest.max_rps:
            raise ValueError(
                f"--peak-rps {MAXIMUM}: TP {largest.tp} sustains no load at all under these promises; loosen "
                "--slo-e2e, --slo-tbt or --slo-ttft, or give a rate"
            )
        if self.peak_rps == MAXIMUM:
            trace = self._cut(lengths.scaled(peak_rps=largest.max_rps))
        # Last, as it takes longest; and nothing but these policies asks for a prediction.
        learned = any(policy.slo_aware for policy in policies)
        tables = performance_tables(fleet, cache_dir, seed=self.seed, progress=progress) if learned else {}
        scenario = Scenario(
            fleet=fleet,
            trace=trace,
            tables=tables,
            capacities=found,
            slo=Slo(e2e_s=promised.e2e_s or largest.e2e_p99_s, tbt_s=promised.tbt_s, ttft_s=promised.ttft_s),
            options=self.options,
            seed=self.seed,
            count_freed_gpus=self.count_freed_gpus,
        )
        return scenario, policies

    def _cut(self, trace: Trace) -> Trace:
        return trace if self.seconds is None else trace.cut(self.seconds)
