"""What the comparison found, as a section of the evaluation. Knows nothing of how it was run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from textwrap import fill
from typing import NamedTuple

from tools.loop.outcome import Figures, Found, Simulated, saving
from tools.loop.plan import (
    BASELINE,
    BLOCK_TOKENS,
    BUDGET_TOKENS,
    CAPACITY_RPS,
    KIND,
    LONGEST_TOKENS,
    MAX_BATCH,
    MODEL,
    OURS,
    SWITCH_S,
    kv_blocks,
    words,
)
from tools.testbed.report import Section, Table

PICTURE = "loop.png"
WIDTH = 120
_TEXT = """\
**What is real.** vLLM (scheduler, batching, KV cache, API server), the gateway, the keeper, the client (`aiperf`) and
NVML's callers, each a separate process. **What is not:** the GPU. `libnvidia-ml.so.1` is a fake one whose clock
and energy are a file (`tools/nvml`), and a plug-in in vLLM (`vllm_pace`) makes each step last as long as
[the physics](../physics.md) computes for its batch on {kind} with {model} at the clock that the fake GPU has in that
moment, and sets its watts. vLLM's own model is the least there is: what it computes means nothing, and is over long
before the step is. So this measures the loop (engine, telemetry, decisions, clock commands, switches), **not a GPU:
seconds and watts are those of the simulation, and no saving here is one of real hardware.**

**Load.** {load}; `azure-conv-like`, seed {seed}, requests of more than {longest:,} tokens left out; {share} of what the
engine bears (`throttllem characterize`: {capacity}/s). Answers are as long as their `max_tokens` (`ignore_eos`), which
the gateway takes as their length. No prefix caching. SLOs: E2E {e2e:g} s (the p99 there, rounded up), {tbt:g} ms
mean between tokens. Energy is NVML's counter, read through pynvml, over the {window:.0f} s after the first request: the
same window for all, the idle end in it.

**Engine.** Batch {batch}, {budget:,} tokens a step, {blocks:,} blocks of {block} tokens (what the modelled GPU has room
for), chunked prompts; the simulated one likewise. Clocks {lowest} to {highest} MHz, the keeper allows no others. The
gateway's table comes from `throttllem profile --gpus` at {clocks} clocks on this very set-up ({profile:.0f} s) and
`train`; that of the simulation from its own simulated profile. Switches take 1.6 to 13 ms; both assume {switch:g} ms.

**Found** on {date}. {found}

**How far to trust it.** {quiet}A first token has {first:.0f} ms more behind it than in the simulation: client,
gateway and vLLM's API server share a core. What else differs comes from the tables: each gateway learned from points of
its own. With the live one's table the simulation is at most {informed} from the measured energy and {informed_mhz} MHz
from the mean clock: in virtual time the same controller does the same.
"""


QUIET = "Engine, keeper, gateway and client ran in Linux's real-time class: what else the machine did had to wait. "


def section(found: Found, versions: Mapping[str, str]) -> Section:
    """The document."""
    tables = [measured_table(found), compared_table(found), saving_table(found), cost_table(found), trust_table(found)]
    return Section(
        title="The loop closed live, on a modelled GPU",
        text=_text(found),
        tables=tuple(table for table in tables if table.rows),
        results={
            "plan": asdict(found.plan),
            "runs": [run.as_dict() for run in found.runs],
            "simulated": {name: asdict(one) for name, one in found.simulated.items()},
            "simulated_with_its_table": {name: asdict(one) for name, one in found.informed.items()},
        },
        versions=versions,
        pictures=(PICTURE,),
    )


def _text(found: Found) -> str:
    plan, count = found.plan, len(found.sent)
    text = _TEXT.format(
        kind=KIND,
        model=MODEL,
        load=words(found.sent),
        seed=plan.seed,
        longest=LONGEST_TOKENS,
        share=f"{count / found.sent[-1].at_s / CAPACITY_RPS:.0%}",
        capacity=f"{CAPACITY_RPS:.2f}",
        e2e=plan.e2e_s,
        tbt=plan.tbt_s * 1e3,
        window=plan.window_s,
        batch=MAX_BATCH,
        budget=BUDGET_TOKENS,
        blocks=kv_blocks(),
        block=BLOCK_TOKENS,
        lowest=plan.lowest_mhz,
        highest=max(plan.clocks_mhz),
        clocks=len(plan.clocks_mhz),
        profile=plan.profile_s,
        switch=SWITCH_S * 1e3,
        quiet=QUIET if all(run.trust.quiet for run in found.runs) else "",
        date=time.strftime("%Y-%m-%d", time.gmtime(found.runs[0].began_s)),
        first=_first_token_ms(found),
        informed=f"{_farthest(found, found.informed):.1%}",
        informed_mhz=f"{max(_clocks_apart(found), default=float('nan')):.0f}",
        found=_found(found),
    )
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return "\n\n".join(
        fill(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False) for paragraph in paragraphs
    )


def _found(found: Found) -> str:
    """The answers, in sentences."""
    words = []
    for policy in (name for name in found.plan.policies if name != BASELINE and BASELINE in found.plan.policies):
        live = saving(found.middle(policy), found.middle(BASELINE))
        virtual = saving(found.simulated[policy], found.simulated[BASELINE])
        words.append(f"`{policy}` took {live:.1%} less energy than `{BASELINE}` (simulated {virtual:.1%})")
    sentences = [f"{'; '.join(words)}."] if words else []
    if found.simulated:
        sentences.append(f"Energy is at most {_farthest(found, found.simulated):.1%} from the simulation's.")
    if (dry_run := found.the_dry_run()) is not None and words:
        live = saving(found.middle(OURS), found.middle(BASELINE))
        sentences.append(f"A dry run predicted {dry_run.predicted:.1%} for `{OURS}`; {live:.1%} was measured.")
    freed_ms = math.ceil(max(run.trust.freed_s for run in found.runs) * 1e3)
    sentences.append(f"After each of {len(found.runs)} runs the GPU was free {freed_ms} ms after its gateway at most.")
    return " ".join(sentences)


def _farthest(found: Found, simulation: Simulated) -> float:
    """Of the measured energy from the simulated one, over the policies."""
    apart = (abs(found.middle(name).energy_j / one.energy_j - 1) for name, one in simulation.items())
    return max(apart, default=float("nan"))


def _clocks_apart(found: Found) -> list[float]:
    return [abs(found.middle(name).clock_mhz - one.clock_mhz) for name, one in found.informed.items()]


def _first_token_ms(found: Found) -> float:
    """What the median time to it is above the simulated one."""
    apart = [found.middle(name).ttft_p50_s - one.ttft_p50_s for name, one in found.simulated.items()]
    return 1e3 * median(apart) if apart else float("nan")


# ---- tables --------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A figure in a table. `scale` and `form` make its text; `relative`: a difference is in %, else in its unit."""

    title: str
    read: Callable[[Figures], float]
    scale: float
    form: str
    relative: bool = True

    def text(self, value: float) -> str:
        """The figure."""
        return self.form.format(value * self.scale)

    def difference(self, of: float, to: float) -> str:
        """How far it is from another."""
        if self.relative:
            return f"{of / to - 1:+.1%}"
        return ("-" if of < to else "+") + self.text(abs(of - to))


COLUMNS = (
    Column("energy, kJ", lambda one: one.energy_j, 1e-3, "{:.2f}"),
    Column("tokens/J", lambda one: one.tokens_per_j, 1, "{:.3f}"),
    Column("TTFT p50, ms", lambda one: one.ttft_p50_s, 1e3, "{:,.0f}", relative=False),
    Column("TTFT p99, ms", lambda one: one.ttft_p99_s, 1e3, "{:,.0f}", relative=False),
    Column("ITL mean, ms", lambda one: one.itl_mean_s, 1e3, "{:.1f}"),
    Column("E2E p50, s", lambda one: one.e2e_p50_s, 1, "{:.2f}"),
    Column("E2E p99, s", lambda one: one.e2e_p99_s, 1, "{:.2f}"),
    Column("both SLOs met, %", lambda one: one.attainment, 1e2, "{:.1f}", relative=False),
    Column("clock, MHz", lambda one: one.clock_mhz, 1, "{:,.0f}", relative=False),
)
HEAD = tuple(column.title for column in COLUMNS)


def measured_table(found: Found) -> Table:
    """Medians over the rounds, with the least and the most."""
    rows = []
    for policy in found.plan.policies:
        runs = found.of(policy)
        rows.append((policy, *(_ranged(column, [column.read(run.figures) for run in runs]) for column in COLUMNS)))
    caption = f"Measured: medians of {found.plan.rounds} rounds (least to most); latencies and SLOs by the client"
    return Table(caption=caption, head=("policy", *HEAD), rows=rows)


def compared_table(found: Found) -> Table:
    """Measured, simulated, and how far they are apart."""
    rows = []
    for policy in found.simulated:
        live = found.middle(policy)
        rows.append((policy, "measured", *(column.text(column.read(live)) for column in COLUMNS)))
        for title, simulation in (("simulated", found.simulated), ("with the gateway's table", found.informed)):
            virtual = simulation[policy]
            rows.append(("", title, *(column.text(column.read(virtual)) for column in COLUMNS)))
            apart = (column.difference(column.read(live), column.read(virtual)) for column in COLUMNS)
            rows.append(("", "measured is", *apart))
    caption = "Measured against `throttllem simulate` on the same requests, energy of the same window"
    return Table(caption=caption, head=("policy", "", *HEAD), rows=rows)


def saving_table(found: Found) -> Table:
    """What each policy saves against the top clock: measured, simulated, and what a dry run predicted."""
    rows = []
    for policy in found.plan.policies:
        if policy == BASELINE or BASELINE not in found.plan.policies:
            continue
        live = saving(found.middle(policy), found.middle(BASELINE))
        virtual = saving(found.simulated[policy], found.simulated[BASELINE]) if found.simulated else None
        dry_run = found.the_dry_run() if policy == OURS else None
        predicted = "" if dry_run is None else f"{dry_run.predicted:.1%}"
        rows.append((policy, f"{live:.1%}", "" if virtual is None else f"{virtual:.1%}", predicted))
    head = ("policy", "measured", "simulated", "predicted by a dry run")
    return Table(caption=f"Energy saved against `{BASELINE}`", head=head, rows=rows)


def cost_table(found: Found) -> Table:
    """What the control costs, by policy."""
    rows = []
    for policy in found.plan.policies:
        costs = [run.cost for run in found.of(policy)]
        rows.append(
            (
                policy,
                f"{median(cost.commands for cost in costs):,.0f}",
                _milliseconds(cost.command_p50_s for cost in costs),
                _milliseconds(cost.command_p99_s for cost in costs),
                f"{median(cost.decisions for cost in costs):,.0f}",
                _milliseconds(cost.decision_p50_s for cost in costs),
                _milliseconds(cost.decision_p99_s for cost in costs),
                f"{median(cost.gateway_share for cost in costs):.1%}",
                f"{median(cost.keeper_share for cost in costs):.1%}",
            )
        )
    head = (
        *("policy", "clock commands", "event to command p50, ms", "p99, ms"),
        *("decisions", "decision p50, ms", "p99, ms", "gateway, of a core", "keeper, of a core"),
    )
    caption = "What the control costs: medians over the rounds, percentiles within the buckets of the gateway's metrics"
    return Table(caption=caption, head=head, rows=rows)


def trust_table(found: Found) -> Table:
    """What the runs rest on, each on its own."""
    rows = [
        (
            f"{run.policy}{'' if run.clocks == 'on' else ', dry run'}",
            str(run.round + 1),
            f"{run.answered} of {run.requests}",
            f"{run.trust.steps:,}",
            f"{run.trust.overruns:.2%}",
            f"{run.trust.real_share:.0%}",
            f"{run.trust.host_share:.0%}",
            f"{run.figures.energy_j / 1e3:.2f}",
            "" if run.trust.aiperf_j is None else f"{run.trust.aiperf_j / 1e3:.2f}",
            f"{run.trust.hook_j / 1e3:.2f}",
            f"{run.trust.freed_s * 1e3:.0f}",
            f"{run.trust.load:.1f}",
        )
        for run in found.runs
    ]
    head = (
        *("run", "round", "answered", "steps", "overruns", "vLLM computes", "its host takes", "NVML, kJ", "aiperf, kJ"),
        *("steps alone, kJ", "GPU free after, ms", "load"),
    )
    caption = (
        "What the runs rest on. *Overruns*: steps that took this machine longer than the modelled GPU. *vLLM "
        "computes*, *its host takes*: shares of the steps' time, hidden in it. *aiperf*: what its telemetry counted "
        "between its first and its last request. *GPU free after*: from the gateway's end to the end of its lock."
    )
    return Table(caption=caption, head=head, rows=rows)


def _ranged(column: Column, values: Sequence[float]) -> str:
    texts = [column.text(value) for value in (median(values), min(values), max(values))]
    return texts[0] if len(set(texts)) == 1 else f"{texts[0]} ({texts[1]} to {texts[2]})"


def _milliseconds(values: Iterable[float | None]) -> str:
    seconds = [value for value in values if value is not None]
    return f"{median(seconds) * 1e3:.2f}" if seconds else ""
