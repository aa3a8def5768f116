"""What the figures of a simulation rest on, and how certain they are: the sentences above and below every table.

A simulation measures nothing: requests run in virtual time, on engines whose seconds and watts the physics computes.
Knows nothing of how figures are laid out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from throttllem.report.certainty import saving_interval
from throttllem.report.metrics import ABSENT, baseline_of, milliseconds, percent, saved, seconds
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


def assumed_slos(scenario: Mapping[str, Any]) -> str | None:
    """Which SLOs nobody set, with their values: a saving depends on how loose they are. None: all were set."""
    slo, assumed = scenario.get("slo") or {}, scenario.get("slo_assumed", ())
    texts = {
        "e2e_s": f"E2E {seconds(slo.get('e2e_s'))} s (p99 of the engine at its maximum load and clock; set --slo-e2e)",
        "tbt_s": f"mean TBT of a request {milliseconds(slo.get('tbt_s'))} ms (set --slo-tbt)",
        "ttft_s": "no TTFT SLO: a first token may be as late as E2E allows (set --slo-ttft)",
    }
    named = [text for name, text in texts.items() if name in assumed]
    return f"SLOs assumed, as none was set: {'; '.join(named)}. The looser, the more is saved." if named else None


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
    outside = _outside(reach, runs)
    limits = [
        *([f"modelled for {outside}"] if outside else []),
        *([f"below the top clock modelled: {reach['below_top']}"] if reach["below_top"] else []),
    ]
    clocks = f"at {high} MHz alone" if low == high else f"from {low} to {high} MHz"
    return f"{reach['kind']} {clocks}" + (f" ({'; '.join(limits)})" if limits else "")


def _outside(reach: Mapping[str, Any], runs: Sequence[RunResult]) -> str:
    """The share of each run's time at clocks outside the range, as text; "" if none is noteworthy."""
    low, high = reach["clocks_mhz"]
    shares = {run.policy: _share_outside(run, low, high) for run in runs}
    return ", ".join(f"{share:.0%} of {policy}'s time" for policy, share in shares.items() if share >= _NOTEWORTHY)


def _share_outside(run: RunResult, low_mhz: int, high_mhz: int) -> float:
    """Fraction of the time of a run's iterations at clocks outside that range."""
    busy_s = sum(run.busy_s_by_mhz.values())
    outside_s = sum(seconds for mhz, seconds in run.busy_s_by_mhz.items() if not low_mhz <= mhz <= high_mhz)
    return outside_s / busy_s if busy_s else 0.0


def dearer(runs: Sequence[RunResult]) -> list[str]:
    """A warning for each run of the paper's policy that took more energy than the maximum clock, with the load."""
    baseline = baseline_of(runs)
    if not baseline.policy.startswith("triton"):
        return []
    others = {run.policy: saved(run, baseline) for run in runs}
    found = []
    for policy, fraction in others.items():
        if policy.partition("+")[0] != "throttllem" or fraction is None or fraction > -_NOTEWORTHY:
            continue
        least = others.get(policy.replace("throttllem", "least-energy"))
        instead = "least-energy takes the cheapest clock" + ("" if least is None else f" ({-least:+.1%} here)")
        found.append(
            f"Warning: {policy} takes {-fraction:.1%} more energy than {baseline.policy} at this load "
            f"({baseline.requests / baseline.duration_s:.2g} requests/s on the mean): it takes the lowest clock, "
            f"whatever the GPU draws at it; {instead}."
        )
    return found


# ---- certainty -------------------------------------------------------------------------------------------------


def certainty(scenario: Mapping[str, Any], runs: Sequence[RunResult]) -> str:
    """How far the savings can be trusted: the scatter of the run, and the error of the physics, which is the larger."""
    return " ".join(_certainty(scenario, runs, baseline_of(runs)))


def _certainty(scenario: Mapping[str, Any], runs: Sequence[RunResult], baseline: RunResult) -> Iterator[str]:
    others = [run for run in runs if run is not baseline]
    found = {run.policy: each for run in others if (each := saving_interval(run, baseline)) is not None}
    seed = scenario.get("seed", ABSENT)
    if found:
        widest = max(width for width, _ in found.values())
        widths = ", ".join(f"{name} ±{width * 100:.1f}" for name, (width, _) in found.items())
        without = [run.policy for run in others if run.policy not in found]
        short = f"; too short for an interval: {', '.join(without)}" if without else ""
        yield (
            f"Certainty: one run (seed {seed}). Its own scatter, in points of the saving: {widths} "
            f"(95 %, between stretches of the run){short}."
        )
    else:
        widest = None
        yield f"Certainty: one run (seed {seed}), too short for an interval."
    reaches = (scenario.get("engines") or [{"physics": {}}])[-1]["physics"]
    errors = {figure: reach.get("error") for figure, reach in reaches.items()}
    beyond = {figure: _outside(reach, runs) for figure, reach in reaches.items() if errors[figure]}
    known = [
        f"{figure} {percent(errors[figure])} % off where held out"
        + (f", not known for {outside} (outside that range)" if outside else "")
        for figure, outside in beyond.items()
    ]
    unknown = [figure for figure, error in errors.items() if not error]
    parts = [*known, *([f"the error of {' and '.join(unknown)} on this engine is not known"] if unknown else [])]
    if parts:
        all_known = known and not unknown and not any(beyond.values())
        scatters = widest is not None and all_known and widest > max(filter(None, errors.values()))
        yield f"{'The scatter' if scatters else 'The physics'} dominates the error: {'; '.join(parts)}."
    yield "How far a real GPU is from it is not known before a profile of that GPU."
