"""How far *Saved (estimate)* is from the truth: simulations with the policy and at the maximum clock.

A gateway cannot serve the same requests twice; a simulation can. Each run is fed to the class that a gateway uses.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from throttllem.files import write_aside
from throttllem.physics.catalogue import Catalogue
from throttllem.sim.study import MAXIMUM, Study, run_all
from tools.testbed.report import markdown_rows, replace_between

COMMAND = "make numbers NUMBERS='--only estimate'"
BEGIN, END = f"<!-- estimate: written by `{COMMAND}` -->", "<!-- /estimate -->"
POLICIES = ("throttllem", "least-energy", "fixed:1050")
SECONDS, SEEDS = 600.0, (0,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One scenario: an engine, a trace, and its busiest minute."""

    title: str
    trace: str
    peak_rps: float | str | None
    gpu: str = "a100-40gb-sxm"
    model: str = "llama-2-13b"
    tp: int = 4
    slo_ttft_s: float | None = None

    def study(self, seed: int) -> Study:
        """The simulation of this scenario."""
        return Study(
            gpu=self.gpu,
            model=self.model,
            sizes=(self.tp,),
            trace=self.trace,
            policies=("triton", *POLICIES),
            peak_rps=self.peak_rps,
            slo_ttft_s=self.slo_ttft_s,
            seconds=SECONDS,
            seed=seed,
        )


_CHAT, _CODE = "azure-conv-like:seconds=1800", "azure-code-like:seconds=1800"
CELLS = (
    Cell(title="chat, maximum load", trace=_CHAT, peak_rps=MAXIMUM),
    Cell(title="chat, about half of it", trace=_CHAT, peak_rps=4.0),
    Cell(title="chat, about a quarter", trace=_CHAT, peak_rps=2.0),
    Cell(title="chat, half, TTFT SLO 1 s", trace=_CHAT, peak_rps=4.0, slo_ttft_s=1.0),
    Cell(title="code, light", trace=_CODE, peak_rps=4.0),
    Cell(
        title="one request every 3 s",
        trace="poisson:rate=0.3,input=800,output=200,seconds=900",
        peak_rps=None,
    ),
    Cell(
        title="chat, H100, 8B at TP 1",
        gpu="h100-80gb-sxm",
        model="llama-3-8b",
        tp=1,
        trace=_CHAT,
        peak_rps=4.0,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bias:
    """One policy in one scenario, mean over the seeds; fractions of the energy at the maximum clock."""

    cell: str
    policy: str
    saved: float
    estimated: float

    @property
    def bias(self) -> float:
        """Estimated less saved."""
        return self.estimated - self.saved


def measure(cells: Sequence[Cell], catalogue: Catalogue, cache_dir: Path, workers: int) -> list[Bias]:
    """Every policy in every cell."""
    found = []
    for cell in cells:
        prepared = [cell.study(seed).prepare(catalogue, cache_dir) for seed in SEEDS]
        jobs = [(scenario, policy) for scenario, policies in prepared for policy in policies]
        runs = run_all(jobs, workers=workers)
        each = len(POLICIES) + 1
        groups = [runs[start : start + each] for start in range(0, len(runs), each)]
        for place, policy in enumerate(POLICIES, start=1):
            saved = [1 - group[place].energy_j / group[0].energy_j for group in groups]
            estimated = [group[place].saved_estimate or 0.0 for group in groups]
            found.append(
                Bias(
                    cell=cell.title,
                    policy=policy,
                    saved=fmean(saved),
                    estimated=fmean(estimated),
                )
            )
            print(f"  {cell.title}, {policy}: saved {fmean(saved):+.1%}, estimated {fmean(estimated):+.1%}", flush=True)
    return found


def markdown(found: Sequence[Bias]) -> str:
    """The table and what it comes to."""
    head = ("scenario", "policy", "saved, %", "estimated, %", "bias, points")
    rows = [
        (
            each.cell,
            f"`{each.policy}`",
            f"{each.saved * 100:.1f}",
            f"{each.estimated * 100:.1f}",
            f"{each.bias * 100:+.1f}",
        )
        for each in found
    ]
    worst = max(found, key=lambda each: abs(each.bias))
    ours = [each.bias for each in found if each.policy == "least-energy"]
    text = (
        f"With `least-energy` the bias is {min(ours) * 100:+.1f} to {max(ours) * 100:+.1f} points, "
        f"{fmean(ours) * 100:+.1f} on the mean. The worst of all is {worst.bias * 100:+.1f} points "
        f"({worst.cell}, `{worst.policy}`)."
    )
    return f"{text}\n\n{markdown_rows(head, rows)}\n"


def write(root: Path, catalogue: Catalogue, cache_dir: Path, workers: int) -> None:
    """Run every cell, and fill the page and its JSON."""
    found = measure(CELLS, catalogue, cache_dir, workers)
    page = root / "docs/evaluation/estimate.md"
    replace_between(page, BEGIN, END, markdown(found))
    cells = [
        {"cell": one.cell, "policy": one.policy, "saved": one.saved, "estimated": one.estimated, "bias": one.bias}
        for one in found
    ]
    with write_aside(page.with_suffix(".json")) as aside:
        aside.write_text(json.dumps({"seconds": SECONDS, "seeds": SEEDS, "cells": cells}, indent=1) + "\n")
