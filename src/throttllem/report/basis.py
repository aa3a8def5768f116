"""What the figures of a simulation rest on, and how certain they are: the sentences above and below every table.

A simulation measures nothing: requests run in virtual time, on engines whose seconds and watts the physics computes.
Knows nothing of how figures are laid out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from throttllem.report.certainty import saving_interval
from throttllem.report.metrics import ABSENT, baseline_of, percent
from throttllem.sim.result import RunResult

SIMULATED = "Simulated on a modelled GPU: no clock was set, nothing was measured."
_NOTEWORTHY = 0.005


def headline(scenario: Mapping[str, Any]) -> str:
    """The first line of every output: simulated, and by which prediction of output lengths."""
    return f"{SIMULATED} Output lengths: {lengths(scenario)}."


def lengths(scenario: Mapping[str, Any]) -> str:
    """How the output lengths were predicted."""
    length = scenario.get("options", {}).get("length", {})
    match length.get("predictor"):
        case "online":
            return "predicted online, as the gateway does"
        case "oracle":
            error = length.get("p95_error") or 0.0
            about = f"with {error:.0%} error at p95, as in the paper" if error else "known in advance"
            return f"an ORACLE, {about}; no gateway has it"
        case "max-tokens":
            return "each request's max_tokens; nothing is predicted"
        case _:
            return "not stated"


def physics(scenario: Mapping[str, Any], runs: Sequence[RunResult]) -> list[str]:
    """Of the largest engine's seconds and watts: measured, calibrated or modelled, and for how much of the time each
    run was outside the range in which that holds.
    """
    if not (engines := scenario.get("engines")):
        return []
    engine = engines[-1]
    return [f"{figure} {_reach(reach, runs)}" for figure, reach in engine["physics"].items()]


def _reach(reach: Mapping[str, Any], runs: Sequence[RunResult]) -> str:
    if reach["why"]:
        return f"modelled, not measured ({reach['why']})"
    low, high = reach["clocks_mhz"]
    outside = {run.policy: _share_outside(run, low, high) for run in runs}
    ran = ", ".join(f"{share:.0%} of {policy}'s time" for policy, share in outside.items() if share >= _NOTEWORTHY)
    limits = [
        *([f"modelled for {ran}"] if ran else []),
        *([f"below the top clock modelled: {reach['below_top']}"] if reach["below_top"] else []),
    ]
    return f"{reach['kind']} from {low} to {high} MHz" + (f" ({'; '.join(limits)})" if limits else "")


def _share_outside(run: RunResult, low_mhz: int, high_mhz: int) -> float:
    """Fraction of the time of a run's iterations at clocks outside that range."""
    busy_s = sum(run.busy_s_by_mhz.values())
    outside_s = sum(seconds for mhz, seconds in run.busy_s_by_mhz.items() if not low_mhz <= mhz <= high_mhz)
    return outside_s / busy_s if busy_s else 0.0


# ---- certainty -------------------------------------------------------------------------------------------------


def certainty(scenario: Mapping[str, Any], runs: Sequence[RunResult]) -> str:
    """How far the savings can be trusted: the scatter of the run, and the error of the physics, which is the larger."""
    return " ".join(_certainty(scenario, runs, baseline_of(runs)))


def _certainty(scenario: Mapping[str, Any], runs: Sequence[RunResult], baseline: RunResult) -> Iterator[str]:
    found = {run.policy: each for run in runs if (each := saving_interval(run, baseline)) is not None}
    seed = scenario.get("seed", ABSENT)
    if found:
        widest = max(width for width, _ in found.values())
        yield (
            f"Certainty: one run (seed {seed}). Its own scatter is at most ±{widest * 100:.1f} points of the saving "
            f"(95 %, between {next(iter(found.values()))[1]} stretches of the run)."
        )
    else:
        widest = None
        yield f"Certainty: one run (seed {seed}), too short for an interval."
    errors = {
        figure: reach.get("error")
        for figure, reach in (scenario.get("engines") or [{"physics": {}}])[-1]["physics"].items()
    }
    known = [f"{figure} {percent(error)} % off where held out" for figure, error in errors.items() if error]
    unknown = [figure for figure, error in errors.items() if not error]
    parts = [*known, *([f"the error of {' and '.join(unknown)} on this engine is not known"] if unknown else [])]
    if parts:
        scatters = widest is not None and known and not unknown and widest > max(filter(None, errors.values()))
        yield f"{'The scatter' if scatters else 'The physics'} dominates the error: {'; '.join(parts)}."
    yield "How far a real GPU is from it is not known before a profile of that GPU."
