"""The comparison of one run with the baseline, in numbers and in one plain sentence; honest where it is worse."""

from __future__ import annotations

from collections.abc import Sequence

from throttllem.sim.result import RunResult

ATTAINMENT_SLACK = 0.005
"""How far attainment may lie under the baseline's and still count as kept: half a point."""

_SAME = 5e-4
"""A difference in energy below 0.05 % is written as none: it would print as 0.0 %."""


def baseline_of(runs: Sequence[RunResult]) -> RunResult:
    """The run that the others are compared with: `triton`, else the first `triton+...`, else the first.

    Raises ValueError where there is no run.
    """
    if not runs:
        raise ValueError("no runs: there is nothing to report")
    exact = [run for run in runs if run.policy == "triton"]
    scaled = [run for run in runs if run.policy.startswith("triton+")]
    return (exact or scaled or list(runs))[0]


def saved(run: RunResult, baseline: RunResult) -> float | None:
    """Fraction of the baseline's energy that the run did not use; negative where it used more."""
    return 1 - run.energy_j / baseline.energy_j if baseline.energy_j > 0 else None


def factor(run: RunResult, baseline: RunResult) -> float | None:
    """Tokens per joule as a multiple of the baseline's."""
    return run.tokens_per_joule / baseline.tokens_per_joule if baseline.tokens_per_joule > 0 else None


def is_promise_kept(run: RunResult, baseline: RunResult) -> bool:
    """Whether attainment is at most half a point under the baseline's."""
    return run.slo.attainment >= baseline.slo.attainment - ATTAINMENT_SLACK - 1e-12


def verdict(run: RunResult, baseline: RunResult) -> str:
    """One sentence on a run: energy, tokens per joule and attainment against the baseline, and what it cost."""
    attainment = f"attainment {run.slo.attainment:.1%}".replace("%", " %")
    if run is baseline:
        return (
            f"{run.policy}: the baseline, {run.energy_j / 1e3:,.1f} kJ, "
            f"{run.tokens_per_joule:.3f} tokens per joule, {attainment}"
        )
    ratio = factor(run, baseline)
    parts = [
        f"{run.policy}: {_energy(run, baseline)}",
        *([] if ratio is None else [f"{ratio:.2f}x tokens per joule"]),
        f"{attainment} ({baseline.policy} {baseline.slo.attainment * 100:.1f} %)",
    ]
    costs = _costs(run, baseline)
    return ", ".join(parts) + (f"; but {' and '.join(costs)}" if costs else "")


def _energy(run: RunResult, baseline: RunResult) -> str:
    fraction = saved(run, baseline)
    if fraction is None:
        return f"{run.energy_j / 1e3:,.1f} kJ ({baseline.policy} used none)"
    if abs(fraction) < _SAME:
        return f"the same energy as {baseline.policy}"
    return f"{abs(fraction) * 100:.1f} % {'less' if fraction > 0 else 'more'} energy than {baseline.policy}"


def _costs(run: RunResult, baseline: RunResult) -> list[str]:
    """What a saving must not hide: broken promises, and work that was not done."""
    costs = []
    if not is_promise_kept(run, baseline):
        points = (baseline.slo.attainment - run.slo.attainment) * 100
        costs.append(f"keeps fewer promises ({points:.1f} points under {baseline.policy})")
    undone = baseline.completed - run.completed
    if undone > 0:
        costs.append(f"completed {undone:,} {'request' if undone == 1 else 'requests'} fewer")
    return costs
