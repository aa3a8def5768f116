"""Promises at work: twice the engine's capacity, vLLM alone, vLLM behind its best limit, and the gateway.

Rules written before the runs decide what capacity is, what is promised, how the limit is tuned, who is judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.lengths.online import OnlineLengthPredictor
from throttllem.files import write_aside
from tools.engines.vllm_server import tiny_model
from tools.evaluation.machine import version_of
from tools.evaluation.overload_load import Lengths, Outcome, Promise, jobs, judge, send
from tools.evaluation.overload_pace import LAW
from tools.evaluation.overload_simulated import GPU, LIMITS, MODEL, TP, bench, learned
from tools.evaluation.overload_systems import QUICK, House, Plan
from tools.evaluation.section import ROOT, Section, Table, Workshop

ALONE, LIMITED, GATEWAY = "vLLM", "vLLM, best limit", "gateway"
ENDLESS = Promise(e2e_s=1e9, tbt_s=1e9)
TARGET = 1.25
PICTURE = "overload.png"
HEAD = (
    *("system", "seed", "goodput, requests/s", "kept tokens/s", "accepted", "kept of accepted"),
    *("E2E p50, s", "E2E p99, s", "TBT p50, ms", "TBT p99, ms", "mean answer, tokens"),
)
_TEXT = """\
**Load.** An open loop: Poisson arrivals at twice the capacity, lengths drawn from Azure's chat trace ({lengths}),
random prompts. Clients ask for `max_tokens` 512 and do not know how long the answer will be: the random model is made
to end each answer at the trace's length by `min_tokens` and `logit_bias` in the request, which the gateway passes on
unread. So its length predictor knows no more than that of a service would; like the limit, it was tuned on a run of
another seed (it keeps what it learned). The client is a process of its own; all systems are judged by its clock.

**Rules.** *Capacity*: requests/s of a burst that never lets the engine idle ({capacity:.2f}/s). *Promises*: E2E twice
the p99 at half that rate ({e2e:.2f} s), mean TBT 1.5 times the median at capacity ({tbt:.1f} ms). *Limit*: the
`--max-num-queued-reqs` of the highest goodput on the tuning seed; in this vLLM it counts running and waiting
requests, so it limits the batch too. *Goodput*: requests/s that kept both promises, of those sent after the first
{warm:.0f} s. A refusal (429, 503) counts as not served. The three systems take turns on each seed.

**Engine.** A real vLLM with a tiny model whose steps are stretched by a law in the place of a GPU's speed: {law}. On
a few shared cores a step would else last as long as whoever else computes there likes. Batching, KV cache, API and
refusals are vLLM's own. It batches 256 requests at most (`--max-num-seqs`), as it does by default on most GPUs and as
the simulated one does. With 64 a limit of 64 leaves nothing to gain: in a first, shortened run it kept 99.8 % at the
engine's capacity, and the gateway's goodput was 1.02 to 1.06 times as much.

**Gateway.** `throttllem profile --url` ({profile:.0f} s) and `train`, then `serve --policy throttllem
--set admission.unmeetable=reject` with the plug-in's steps. Everything else is as shipped.

**Found.** Goodput of the gateway over that of the best limit, on vLLM: {ratio:.2f} (by seed {ratios}; target {target}:
{met}); kept tokens/s {tokens:.2f}. Simulated: {simulated:.2f} (by seed {simulated_ratios}: {simulated_met}); kept
tokens/s {simulated_tokens:.2f}. Where the ratio of tokens is the smaller one, the rest of the lead is in shorter
answers: the gateway refuses long requests more often, and lets lighter ones pass those that have to wait.{edge}

**How far to trust it.** The engine's capacity is {bound:.2f} times the goodput of the best limit on vLLM, and
{simulated_bound:.2f} times on the simulated one: whoever serves the mix as it is offered cannot gain more than that;
a choice of shorter requests can. The gateway's rules under overload (who is held back too long is rejected, lighter
ones pass; margin and patience where requests are refused) were developed in simulation on this trace, on the A100 and
on an engine with the law above, after earlier rules had failed, on seeds 1 and 2. The seeds here are others.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One comparison: rules, the tuning of the limit, and outcomes by system and seed."""

    capacity_rps: float
    promise: Promise
    limit: int
    tuning: Mapping[int, Outcome]
    outcomes: Mapping[str, Sequence[Outcome]]

    def ratios(self) -> list[float]:
        """Goodput of the gateway over that of the best limit, seed by seed."""
        pairs = zip(self.outcomes[GATEWAY], self.outcomes[LIMITED], strict=True)
        return [ours.goodput_rps / theirs.goodput_rps for ours, theirs in pairs if theirs.goodput_rps]

    def ratio(self) -> float:
        """Of the mean goodputs."""
        ours, theirs = (mean(each.goodput_rps for each in self.outcomes[name]) for name in (GATEWAY, LIMITED))
        return ours / theirs if theirs else float("nan")

    def bound(self) -> float:
        """Capacity over the mean goodput of the best limit: what serving more of the same requests can gain at most."""
        theirs = mean(each.goodput_rps for each in self.outcomes[LIMITED])
        return self.capacity_rps / theirs if theirs else float("nan")

    def token_ratio(self) -> float:
        """Of the mean kept tokens/s, which gains nothing from shorter answers."""
        ours, theirs = (mean(each.kept_tokens_per_s for each in self.outcomes[name]) for name in (GATEWAY, LIMITED))
        return ours / theirs if theirs else float("nan")


def section(workshop: Workshop) -> Section:
    """Both comparisons."""
    plan = QUICK if workshop.quick else Plan()
    venv = workshop.environment("vllm")
    simulated = _simulated(workshop, plan)
    model = tiny_model(venv, workshop.folder / "model")
    house = House(workshop=workshop, venv=venv, model=model, plan=plan, lengths=Lengths())
    found = _measured(house)
    if not workshop.quick:
        _draw(found, simulated)
    return Section(
        title="Overload: promises at twice the capacity",
        text=_text(found, simulated, house),
        tables=(
            _table(f"vLLM with stretched steps; best limit {found.limit}", found, plan.seeds),
            _table(f"Simulated {MODEL} on {TP} {GPU}; best limit {simulated.limit}", simulated, plan.seeds),
            _tuning(found),
        ),
        results={"measured": _as_dict(found), "simulated": _as_dict(simulated), "plan": asdict(plan)},
        versions={"vLLM": version_of(venv, "vllm")},
        pictures=(PICTURE,),
    )


# ---- the real engine -----------------------------------------------------------------------------------------


def _measured(house: House) -> Found:
    plan, say = house.plan, house.workshop.say
    with house.vllm() as server:
        capacity, tbt_s = _capacity(house, server.url, server.cores)
        promise = Promise(e2e_s=2 * _half_load_e2e_s(house, server.url, server.cores, capacity), tbt_s=1.5 * tbt_s)
        say(f"capacity {capacity:.2f}/s, E2E {promise.e2e_s:.2f} s, TBT {promise.tbt_s * 1e3:.1f} ms")
        house.learn(server)
        with house.gateway(server) as url:
            said = house.run(url, server.cores, rate=2 * capacity, seed=plan.tuning_seed, promise=promise)
            say(f"gateway, learning: {said.goodput_rps:.2f}/s")
    tuning = {limit: _limited(house, limit, plan.tuning_seed, capacity, promise) for limit in plan.limits}
    limit = max(tuning, key=lambda tried: tuning[tried].goodput_rps)
    outcomes: dict[str, list[Outcome]] = {ALONE: [], LIMITED: [], GATEWAY: []}
    for seed in plan.seeds:
        with house.vllm() as server:
            with house.gateway(server) as url:
                found = house.run(url, server.cores, rate=2 * capacity, seed=seed, promise=promise)
            outcomes[GATEWAY].append(found)
            say(f"gateway, seed {seed}: {found.goodput_rps:.2f}/s, {found.attainment:.1%} of accepted")
            found = house.run(server.url, server.cores, rate=2 * capacity, seed=seed, promise=promise)
            outcomes[ALONE].append(found)
            say(f"vLLM, seed {seed}: {found.goodput_rps:.2f}/s")
        outcomes[LIMITED].append(_limited(house, limit, seed, capacity, promise))
    return Found(capacity_rps=capacity, promise=promise, limit=limit, tuning=tuning, outcomes=outcomes)


def _capacity(house: House, url: str, cores: frozenset[int]) -> tuple[float, float]:
    """Requests/s between the first and the last fifth of a burst's ends, and the median TBT under it."""
    seed = house.plan.tuning_seed
    for number in (8, house.plan.burst):  # the first few warm it up
        load = jobs(house.lengths, rate=1e4, seconds=number / 1e4, seed=seed)
        results = send(url, load, house.folder, cores)
    ends = sorted(float(str(each["at_s"])) + float(str(each["ended_s"])) for each in results)
    low, high = len(ends) // 5, len(ends) * 4 // 5
    whole = judge(results, ENDLESS, from_s=0, to_s=1e9)
    return (high - low) / (ends[high] - ends[low]), whole.tbt_p50_s


def _half_load_e2e_s(house: House, url: str, cores: frozenset[int], capacity: float) -> float:
    seed = house.plan.tuning_seed + 1
    return house.run(url, cores, rate=capacity / 2, seed=seed, promise=ENDLESS).e2e_p99_s


def _limited(house: House, limit: int, seed: int, capacity: float, promise: Promise) -> Outcome:
    with house.vllm(limit) as server:
        found = house.run(server.url, server.cores, rate=2 * capacity, seed=seed, promise=promise)
    house.workshop.say(f"limit {limit}, seed {seed}: {found.goodput_rps:.2f}/s, {found.attainment:.1%} of accepted")
    return found


# ---- the simulated one ---------------------------------------------------------------------------------------


def _simulated(workshop: Workshop, plan: Plan) -> Found:
    hardware = bench(workshop.folder / "cache")
    policy = ClockPolicy.THROTTLLEM
    tuning = {limit: hardware.limited(limit, plan.tuning_seed) for limit in LIMITS}
    limit = max(tuning, key=lambda tried: tuning[tried].goodput_rps)
    known = learned(hardware, plan.tuning_seed, policy).state()
    outcomes = {
        ALONE: [hardware.limited(None, seed) for seed in plan.seeds],
        LIMITED: [hardware.limited(limit, seed) for seed in plan.seeds],
        GATEWAY: [hardware.gateway(OnlineLengthPredictor.from_state(known), seed, policy) for seed in plan.seeds],
    }
    found = Found(
        capacity_rps=hardware.capacity_rps, promise=hardware.promise, limit=limit, tuning=tuning, outcomes=outcomes
    )
    workshop.say(f"simulated: best limit {limit}, ratios {', '.join(f'{ratio:.2f}' for ratio in found.ratios())}")
    return found


# ---- words and pictures --------------------------------------------------------------------------------------


def _text(found: Found, simulated: Found, house: House) -> str:
    return _TEXT.format(
        lengths=house.lengths.told(),
        capacity=found.capacity_rps,
        e2e=found.promise.e2e_s,
        tbt=found.promise.tbt_s * 1e3,
        warm=house.plan.warm_s,
        profile=house.plan.profile_s,
        ratio=found.ratio(),
        ratios=", ".join(f"{ratio:.2f}" for ratio in found.ratios()),
        target=TARGET,
        met=_met(found),
        tokens=found.token_ratio(),
        law=f"{LAW[0] * 1e3:g} ms, {LAW[1] * 1e3:g} ms per decoding request and {LAW[2] * 1e3:g} ms per prompt token",
        edge=_edge(found),
        bound=found.bound(),
        simulated_bound=simulated.bound(),
        simulated=simulated.ratio(),
        simulated_met=_met(simulated),
        simulated_tokens=simulated.token_ratio(),
        simulated_ratios=", ".join(f"{ratio:.2f}" for ratio in simulated.ratios()),
    )


def _met(found: Found) -> str:
    return "met" if found.ratio() >= TARGET else "**not met**"


def _edge(found: Found) -> str:
    """A best limit at the end of those that were tried may not be the best."""
    if found.limit not in (min(found.tuning), max(found.tuning)):
        return ""
    return f" The best limit, {found.limit}, is the last that was tried on its side: another may be better."


def _table(caption: str, found: Found, seeds: Sequence[int]) -> Table:
    said = f"E2E {found.promise.e2e_s:.2f} s, TBT {found.promise.tbt_s * 1e3:.1f} ms, {2 * found.capacity_rps:.1f}/s"
    rows = [
        (name, str(seed), *_cells(outcome))
        for name, outcomes in found.outcomes.items()
        for seed, outcome in zip(seeds, outcomes, strict=True)
    ]
    return Table(caption=f"{caption} ({said} offered)", head=HEAD, rows=rows)


def _tuning(found: Found) -> Table:
    rows = [(f"limit {limit}", "tuning", *_cells(outcome)) for limit, outcome in found.tuning.items()]
    return Table(caption="How the limit was tuned, on vLLM", head=HEAD, rows=rows)


def _cells(outcome: Outcome) -> tuple[str, ...]:
    return (
        f"{outcome.goodput_rps:.2f}",
        f"{outcome.kept_tokens_per_s:,.0f}",
        f"{outcome.accepted:.1%}",
        f"{outcome.attainment:.1%}",
        f"{outcome.e2e_p50_s:.2f}",
        f"{outcome.e2e_p99_s:.2f}",
        f"{outcome.tbt_p50_s * 1e3:.1f}",
        f"{outcome.tbt_p99_s * 1e3:.1f}",
        f"{outcome.output_tokens:.0f}",
    )


def _as_dict(found: Found) -> dict[str, Any]:
    return {
        "capacity_rps": found.capacity_rps,
        "promise": asdict(found.promise),
        "limit": found.limit,
        "ratios": found.ratios(),
        "tuning": {limit: asdict(outcome) for limit, outcome in found.tuning.items()},
        "outcomes": {name: [asdict(each) for each in outcomes] for name, outcomes in found.outcomes.items()},
    }


def _draw(found: Found, simulated: Found) -> None:
    """Goodput by system, a point for each seed, beside the tuning of the limit."""
    with matplotlib.rc_context({"axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "font.size": 10}):
        figure = Figure(figsize=(9, 4), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (title, one) in zip(
            figure.subplots(1, 2),
            (("vLLM, stretched steps", found), (f"simulated {TP} x A100", simulated)),
            strict=True,
        ):
            limits = list(one.tuning)
            axes.plot(
                limits, [one.tuning[limit].goodput_rps for limit in limits], "o-", color="0.6", label="limit (tuning)"
            )
            for name, colour in ((ALONE, "tab:red"), (LIMITED, "tab:orange"), (GATEWAY, "tab:green")):
                rates = [each.goodput_rps for each in one.outcomes[name]]
                axes.axhline(mean(rates), color=colour, label=name)
                axes.plot([limits[-1] * (1 + 0.03 * number) for number in range(len(rates))], rates, ".", color=colour)
            axes.set(title=title, xlabel="--max-num-queued-reqs", ylabel="goodput, requests/s", ylim=(0, None))
        axes.legend(fontsize=8)
        with write_aside(ROOT / "docs/evaluation" / PICTURE) as aside:
            figure.savefig(aside, format="png", dpi=110, metadata={"Software": None})
