"""SLOs at work: twice the engine's capacity, vLLM alone, vLLM behind its best limit, and the gateway.

Rules written before the runs decide what capacity is, which SLOs hold, how the limit is tuned, and what is judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.lengths.online import OnlineLengthPredictor
from throttllem.files import write_aside
from tools.evaluation.overload_load import Lengths, Outcome, Slos, jobs, judge, send
from tools.evaluation.overload_simulated import GPU, LIMITS, MODEL, TP, bench, learned
from tools.testbed.engines.vllm import FLAGS, Vllm, tiny_model, vllm
from tools.testbed.engines.vllm_pace import Settings, install
from tools.testbed.gateway import gateway, throttllem
from tools.testbed.report import ROOT, Section, Table, Workspace, version_of

ALONE, LIMITED, GATEWAY = "vLLM", "vLLM, best limit", "gateway"
ENDLESS = Slos(e2e_s=1e9, tbt_s=1e9)
TARGET = 1.25
PICTURE = "overload.png"
HEAD = (
    *(
        "system",
        "seed",
        "goodput, requests/s",
        "tokens/s of requests that met both SLOs",
        "accepted",
        "SLOs met, of accepted",
    ),
    *("E2E p50, s", "E2E p99, s", "TBT p50, ms", "TBT p99, ms", "mean answer, tokens"),
)
_TEXT = """\
**Load.** An open loop: Poisson arrivals at twice the capacity, lengths drawn from Azure's chat trace ({lengths}),
random prompts. Clients ask for `max_tokens` 512 and do not know how long the answer will be: the random model is made
to end each answer at the trace's length by `min_tokens` and `logit_bias` in the request, which the gateway passes on
unread. So its length predictor knows no more than that of a service would; like the limit, it was tuned on a run of
another seed (it keeps what it learned). The client is a separate process; all systems are judged by its clock.

**Rules.** *Capacity*: requests/s of a burst that never lets the engine idle ({capacity:.2f}/s). *SLOs*: E2E twice
the p99 at half that rate ({e2e:.2f} s), mean TBT 1.5 times the median at capacity ({tbt:.1f} ms). *Limit*: the
`--max-num-queued-reqs` of the highest goodput on the tuning seed; in this vLLM it counts running and waiting
requests, so it limits the batch too. *Goodput*: requests/s that met both SLOs, of those sent after the first
{warm:.0f} s. A refusal (429, 503) counts as not served. The three systems take turns on each seed.

**Engine.** A real vLLM with a tiny model whose steps are stretched by a law in the place of a GPU's speed: {law}. On
a few shared cores other work on the machine would else decide how long a step lasts. Batching, KV cache, API and
refusals are vLLM's own. It batches 256 requests at most (`--max-num-seqs`), as it does by default on most GPUs and as
the simulated one does. With 64 a limit of 64 leaves nothing to gain: in a first, shortened run 99.8 % met their SLOs at
the engine's capacity, and the gateway's goodput was 1.02 to 1.06 times as much.

**Gateway.** `throttllem profile --url` ({profile:.0f} s) and `train`, then `serve --policy throttllem
--set admission.unmeetable=reject` with the plug-in's steps. Everything else is as shipped.

**Found.** Goodput of the gateway over that of the best limit, on vLLM: {ratio:.2f} (by seed {ratios}; target {target}:
{met}); their tokens/s {tokens:.2f}. Simulated: {simulated:.2f} (by seed {simulated_ratios}: {simulated_met});
their tokens/s {simulated_tokens:.2f}. Where the ratio of tokens is the smaller one, the rest of the lead is in shorter
answers: the gateway refuses long requests more often, and lets lighter ones pass those that have to wait.{edge}

**How far to trust it.** The engine's capacity is {bound:.2f} times the goodput of the best limit on vLLM, and
{simulated_bound:.2f} times on the simulated one: a system that serves the mix as it is offered cannot gain more; a
choice of shorter requests can. The gateway's rules under overload (requests held back too long are rejected, lighter
ones pass; margin and patience where requests are refused) were developed in simulation on this trace, on the A100 and
on an engine with the law above, after earlier rules had failed, on seeds 1 and 2. The seeds here are others.
"""


LINE = (0.015, 0.00035, 0.00007)
"""Seconds of a step of the paced vLLM, of each decoding request, of each prompt token."""
CATALOGUE = ("--gpu", "a100-40gb-sxm", "--model", "llama-3-8b", "--tp", "1")
"""Of the simulated GPU; the speed is learned."""
SEQUENCES = 256
"""What vLLM would batch on most GPUs, and the simulated engine does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Seconds of each run (the first `warm_s` are not judged), of the profile, and the limits that are tried."""

    warm_s: float = 30.0
    judged_s: float = 60.0
    burst: int = 800
    profile_s: float = 100.0
    limits: tuple[int, ...] = (72, 88, 112, 144)
    seeds: tuple[int, ...] = (11, 12, 13)
    tuning_seed: int = 100


QUICK = Plan(warm_s=3.0, judged_s=10.0, burst=300, profile_s=60.0, limits=(64,), seeds=(11,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Systems:
    """The systems, each started for its runs."""

    workspace: Workspace
    venv: Path
    model: Path
    plan: Plan
    lengths: Lengths

    @property
    def folder(self) -> Path:
        """A place for files of the runs."""
        return self.workspace.folder

    @contextmanager
    def vllm(self, limit: int | None = None) -> Iterator[Vllm]:
        """vLLM, on one core."""
        flags = [*FLAGS, "--max-num-seqs", str(SEQUENCES), "--enable-logging-iteration-details"]
        flags += [] if limit is None else ["--max-num-queued-reqs", str(limit)]
        paced = install(Settings(line=LINE), self.folder / "pace")
        with vllm(self.venv, self.folder, model=self.model, flags=flags, environment=paced) as up:
            yield up

    @contextmanager
    def gateway(self, server: Vllm) -> Iterator[str]:
        """The gateway in front of it; what it learned of lengths stays for the next one."""
        settings = ("--set", "admission.unmeetable=reject", "--set", f"engines.0.stats={server.stats}")
        arguments = ["--engine", server.url, *CATALOGUE, "--tables", str(self.folder / "tables"), *settings]
        with gateway([*arguments, "--policy", "throttllem"], self.folder / "gateway") as up:
            yield up.url

    def learn(self, server: Vllm) -> None:
        """Profile the engine and train its table, as a user would."""
        profile, tables = self.folder / "profile.csv", self.folder / "tables"
        seconds = ("--seconds", str(self.plan.profile_s), "--stats", server.stats)
        throttllem("profile", profile, "--url", server.url, *CATALOGUE, *seconds)
        throttllem("train", profile, "--out", tables)

    def run(self, url: str, *, rate: float, seed: int, slo: Slos) -> Outcome:
        """One run of one system."""
        plan = self.plan
        load = jobs(self.lengths, rate=rate, seconds=plan.warm_s + plan.judged_s, seed=seed)
        results = send(url, load, self.folder, slo)
        return judge(results, slo, from_s=plan.warm_s, to_s=plan.warm_s + plan.judged_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One comparison: rules, the tuning of the limit, and outcomes by system and seed."""

    capacity_rps: float
    slo: Slos
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
        """Of the mean tokens/s of requests that met both SLOs, which gains nothing from shorter answers."""
        ours, theirs = (mean(each.met_tokens_per_s for each in self.outcomes[name]) for name in (GATEWAY, LIMITED))
        return ours / theirs if theirs else float("nan")


def section(workspace: Workspace) -> Section:
    """Both comparisons."""
    plan = QUICK if workspace.quick else Plan()
    venv = workspace.environment("vllm")
    simulated = _simulated(workspace, plan)
    model = tiny_model(venv, workspace.folder / "model")
    systems = Systems(workspace=workspace, venv=venv, model=model, plan=plan, lengths=Lengths())
    found = _measured(systems)
    if not workspace.quick:
        _draw(found, simulated)
    return Section(
        title="Overload: SLOs at twice the capacity",
        text=_text(found, simulated, systems),
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


def _measured(systems: Systems) -> Found:
    plan, report = systems.plan, systems.workspace.report
    with systems.vllm() as server:
        capacity, tbt_s = _capacity(systems, server.url)
        slo = Slos(e2e_s=2 * _half_load_e2e_s(systems, server.url, capacity), tbt_s=1.5 * tbt_s)
        report(f"capacity {capacity:.2f}/s, E2E {slo.e2e_s:.2f} s, TBT {slo.tbt_s * 1e3:.1f} ms")
        systems.learn(server)
        with systems.gateway(server) as url:
            learning = systems.run(url, rate=2 * capacity, seed=plan.tuning_seed, slo=slo)
            report(f"gateway, learning: {learning.goodput_rps:.2f}/s")
    tuning = {limit: _limited(systems, limit, plan.tuning_seed, capacity, slo) for limit in plan.limits}
    limit = max(tuning, key=lambda tried: tuning[tried].goodput_rps)
    outcomes: dict[str, list[Outcome]] = {ALONE: [], LIMITED: [], GATEWAY: []}
    for seed in plan.seeds:
        with systems.vllm() as server:
            with systems.gateway(server) as url:
                found = systems.run(url, rate=2 * capacity, seed=seed, slo=slo)
            outcomes[GATEWAY].append(found)
            report(f"gateway, seed {seed}: {found.goodput_rps:.2f}/s, {found.attainment:.1%} of accepted")
            found = systems.run(server.url, rate=2 * capacity, seed=seed, slo=slo)
            outcomes[ALONE].append(found)
            report(f"vLLM, seed {seed}: {found.goodput_rps:.2f}/s")
        outcomes[LIMITED].append(_limited(systems, limit, seed, capacity, slo))
    return Found(capacity_rps=capacity, slo=slo, limit=limit, tuning=tuning, outcomes=outcomes)


def _capacity(systems: Systems, url: str) -> tuple[float, float]:
    """Requests/s between the first and the last fifth of a burst's ends, and the median TBT under it."""
    seed = systems.plan.tuning_seed
    for number in (8, systems.plan.burst):  # the first few warm it up
        load = jobs(systems.lengths, rate=1e4, seconds=number / 1e4, seed=seed)
        results = send(url, load, systems.folder)
    ends = sorted(float(str(each["at_s"])) + float(str(each["ended_s"])) for each in results)
    low, high = len(ends) // 5, len(ends) * 4 // 5
    whole = judge(results, ENDLESS, from_s=0, to_s=1e9)
    return (high - low) / (ends[high] - ends[low]), whole.tbt_p50_s


def _half_load_e2e_s(systems: Systems, url: str, capacity: float) -> float:
    seed = systems.plan.tuning_seed + 1
    return systems.run(url, rate=capacity / 2, seed=seed, slo=ENDLESS).e2e_p99_s


def _limited(systems: Systems, limit: int, seed: int, capacity: float, slo: Slos) -> Outcome:
    with systems.vllm(limit) as server:
        found = systems.run(server.url, rate=2 * capacity, seed=seed, slo=slo)
    systems.workspace.report(
        f"limit {limit}, seed {seed}: {found.goodput_rps:.2f}/s, {found.attainment:.1%} of accepted"
    )
    return found


# ---- the simulated one ---------------------------------------------------------------------------------------


def _simulated(workspace: Workspace, plan: Plan) -> Found:
    hardware = bench(workspace.folder / "cache")
    policy = ClockPolicy.THROTTLLEM
    tuning = {limit: hardware.limited(limit, plan.tuning_seed) for limit in LIMITS}
    limit = max(tuning, key=lambda tried: tuning[tried].goodput_rps)
    known = learned(hardware, plan.tuning_seed, policy).state()
    outcomes = {
        ALONE: [hardware.limited(None, seed) for seed in plan.seeds],
        LIMITED: [hardware.limited(limit, seed) for seed in plan.seeds],
        GATEWAY: [hardware.gateway(OnlineLengthPredictor.from_state(known), seed, policy) for seed in plan.seeds],
    }
    found = Found(capacity_rps=hardware.capacity_rps, slo=hardware.slo, limit=limit, tuning=tuning, outcomes=outcomes)
    workspace.report(f"simulated: best limit {limit}, ratios {', '.join(f'{ratio:.2f}' for ratio in found.ratios())}")
    return found


# ---- words and pictures --------------------------------------------------------------------------------------


def _text(found: Found, simulated: Found, systems: Systems) -> str:
    return _TEXT.format(
        lengths=systems.lengths.words(),
        capacity=found.capacity_rps,
        e2e=found.slo.e2e_s,
        tbt=found.slo.tbt_s * 1e3,
        warm=systems.plan.warm_s,
        profile=systems.plan.profile_s,
        ratio=found.ratio(),
        ratios=", ".join(f"{ratio:.2f}" for ratio in found.ratios()),
        target=TARGET,
        met=_met(found),
        tokens=found.token_ratio(),
        law="{:g} ms, {:g} ms per decoding request and {:g} ms per prompt token".format(*(each * 1e3 for each in LINE)),
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
    offered = f"E2E {found.slo.e2e_s:.2f} s, TBT {found.slo.tbt_s * 1e3:.1f} ms, {2 * found.capacity_rps:.1f}/s"
    rows = [
        (name, str(seed), *_cells(outcome))
        for name, outcomes in found.outcomes.items()
        for seed, outcome in zip(seeds, outcomes, strict=True)
    ]
    return Table(caption=f"{caption} ({offered} offered)", head=HEAD, rows=rows)


def _tuning(found: Found) -> Table:
    rows = [(f"limit {limit}", "tuning", *_cells(outcome)) for limit, outcome in found.tuning.items()]
    return Table(caption="How the limit was tuned, on vLLM", head=HEAD, rows=rows)


def _cells(outcome: Outcome) -> tuple[str, ...]:
    return (
        f"{outcome.goodput_rps:.2f}",
        f"{outcome.met_tokens_per_s:,.0f}",
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
        "slo": asdict(found.slo),
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
