"""The paper's evaluation as studies: engines, traces and policies, and the runs of each study compared.

Every comparison carries the `throttllem simulate` line that repeats it. Knows nothing of claims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from throttllem.config import BatchingOptions, LengthOptions, Options
from throttllem.core.clocks.policy import Policy
from throttllem.physics.catalogue import Catalogue
from throttllem.profiling.tables import Progress
from throttllem.sim.characterize import Capacity
from throttllem.sim.parallel import Progress as TaskProgress
from throttllem.sim.result import RunResult
from throttllem.sim.study import MAXIMUM, SLO_TBT_S, Scenario, Study, run_all

GPU = "a100-40gb-sxm"
"""The paper's: AWS p4d.24xlarge."""
ENGINES = (("llama-2-13b", 1), ("llama-2-13b", 2), ("llama-2-13b", 4), ("llama-3-8b", 1), ("llama-3-70b", 8))
"""The paper's models, with their tensor parallel degrees."""
MAIN_MODEL, SIZES = "llama-2-13b", (1, 2, 4)
"""The model and the sizes of the paper's autoscaling test."""
ORACLE, ERROR = LengthOptions(predictor="oracle"), LengthOptions(p95_error=0.3)
"""The paper's two predictors: one that knows the output's length, and the same with 30 % error at p95."""
TRACE = "azure-conv-like:seconds=3600"
"""In place of the paper's Azure trace, if no file is given."""
SECONDS = 1800.0
"""A small engine would otherwise take half a day for the trace, scaled to its own maximum load."""
HALF_RPS = 4.0
"""Busiest minute of a lighter load, about half of TP 4's maximum: there an autoscaler has a choice."""
BASELINE = "triton"
BATCHING = BatchingOptions(engine="tensorrt-llm", block_tokens=64, max_batch=256, no_evict=False)
"""TensorRT-LLM as of the paper: blocks of 64 tokens, MAX_UTILIZATION."""
BATCHING_SETTINGS = " ".join(
    f"--set batching.{name}={str(value).lower()}" for name, value in asdict(BATCHING).items() if value is not None
)
"""The same on the command line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The runs of one study, by policy, and the capacities of its engines."""

    study: Study
    capacities: dict[int, Capacity]
    runs: dict[str, RunResult]

    @property
    def name(self) -> str:
        """Model and sizes."""
        return f"{self.study.model} TP {','.join(map(str, self.study.sizes))}"

    @property
    def length_error(self) -> float:
        """Of an oracle's length predictions, at p95."""
        return self.study.options.length.error

    @property
    def lengths(self) -> str:
        """How output lengths were predicted, in a word."""
        predictor = self.study.options.length.simulated
        return f"{predictor}, {self.length_error:.0%} error" if self.length_error else predictor

    @property
    def baseline(self) -> RunResult:
        """The run that all others are compared with."""
        return self.runs[BASELINE]

    def saved(self, policy: str) -> float:
        """Fraction of the baseline's energy that a policy did not use."""
        return 1 - self.runs[policy].energy_j / self.baseline.energy_j

    def gained(self, policy: str) -> float:
        """Tokens per joule over the baseline's, less one."""
        return self.runs[policy].tokens_per_joule / self.baseline.tokens_per_joule - 1

    @property
    def command(self) -> str:
        """The command that repeats this comparison."""
        study = self.study
        sizes = f"--tp {study.sizes[0]}" if len(study.sizes) == 1 else f"--sizes {','.join(map(str, study.sizes))}"
        length = self.study.options.length
        error = f" --length-error {self.length_error:g}" if self.length_error else f" --lengths {length.simulated}"
        return (
            f"throttllem simulate --gpu {study.gpu} --model {study.model} {sizes} --trace {study.trace} "
            f"--peak-rps {study.peak_rps} --seconds {study.seconds:g} --seed {study.seed}{error} "
            f"{BATCHING_SETTINGS} --policy {','.join(study.policies)}"
        )

    @property
    def basis(self) -> str:
        """The command and how many requests it ran."""
        return f"{self.command}  # {self.baseline.requests:,} requests"


def engine_studies(trace: str, *, lengths: LengthOptions, seconds: float, seed: int) -> list[Study]:
    """One study for each engine: the trace scaled to its own maximum load, its own E2E SLO."""
    policies = (BASELINE, "throttllem", "least-energy")
    return [_study(model, (tp,), policies, trace, lengths, seconds, seed) for model, tp in ENGINES]


def size_study(trace: str, *, lengths: LengthOptions, seconds: float, seed: int) -> Study:
    """The autoscaling test: sizes 1, 2 and 4 under the E2E SLO and the maximum load of TP 4."""
    both = ("throttllem+autoscale", "least-energy+autoscale")
    policies = (BASELINE, *both) if lengths.error else (BASELINE, "triton+autoscale", "throttllem", *both)
    return _study(MAIN_MODEL, SIZES, policies, trace, lengths, seconds, seed)


def half_load_study(trace: str, *, lengths: LengthOptions, seconds: float, seed: int) -> Study:
    """The autoscaling test again at a load that TP 4 is too large for."""
    full = size_study(trace, lengths=lengths, seconds=seconds, seed=seed)
    return replace(full, peak_rps=HALF_RPS)


def _study(
    model: str,
    sizes: tuple[int, ...],
    policies: tuple[str, ...],
    trace: str,
    lengths: LengthOptions,
    seconds: float,
    seed: int,
) -> Study:
    return Study(
        gpu=GPU,
        model=model,
        sizes=sizes,
        trace=trace,
        policies=policies,
        peak_rps=MAXIMUM,
        slo_tbt_s=SLO_TBT_S,
        seconds=seconds,
        seed=seed,
        options=Options(length=lengths, batching=BATCHING),
    )


def compare(
    studies: Sequence[Study], catalogue: Catalogue, cache_dir: Path, *, workers: int, progress: Progress
) -> list[Comparison]:
    """Run every policy of every study, all side by side. Tables and capacities should be in the cache already."""
    prepared = [study.prepare(catalogue, cache_dir) for study in studies]
    jobs = [(scenario, policy) for scenario, policies in prepared for policy in policies]
    # The longest first, so that the last ones to end are short.
    order = sorted(range(len(jobs)), key=lambda index: _effort(*jobs[index]), reverse=True)
    whole = summed(f"simulating {len(jobs)} runs", len(jobs), progress)
    done = run_all([jobs[index] for index in order], workers=workers, progress=whole)
    results = iter(run for _, run in sorted(zip(order, done, strict=True), key=lambda pair: pair[0]))
    return [
        Comparison(
            study=study, capacities=scenario.capacities, runs={policy.name: next(results) for policy in policies}
        )
        for study, (scenario, policies) in zip(studies, prepared, strict=True)
    ]


def summed(what: str, tasks: int, progress: Progress) -> TaskProgress:
    """The progress of tasks of equal weight, reported as that of one."""
    shares = [0.0] * tasks
    progress(what, 0.0)

    def report(index: int, share: float) -> None:
        shares[index] = share
        progress(what, sum(shares) / tasks)

    return report


def _effort(scenario: Scenario, policy: Policy) -> int:
    """Grows with the time that a run takes: an SLO-aware policy decides on every request."""
    return scenario.trace.requests * (4 if policy.slo_aware else 1)
