"""The same requests in virtual time: `throttllem simulate` with an engine like the one that is measured; and the same
once more with the table that the gateway decides by, which leaves the loop itself as the only difference.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from throttllem.option_sources import load_options
from throttllem.physics.catalogue import Catalogue
from throttllem.profiling.storage import load_table
from throttllem.sim.study import Study
from tools.loop.bed import CATALOGUE
from tools.loop.outcome import Figures
from tools.loop.outcome import simulated as figures
from tools.loop.plan import BLOCK_TOKENS, BUDGET_TOKENS, KIND, MAX_BATCH, MODEL, SWITCH_S, TP, Plan, physics
from tools.testbed.gateway import throttllem

ENGINE = {
    "batching.chunked": "true",
    "batching.block_tokens": BLOCK_TOKENS,
    "batching.max_batch": MAX_BATCH,
    "batching.prefill_budget_tokens": BUDGET_TOKENS,
    "length.predictor": "oracle",  # the gateway has the lengths as max_tokens
    "noise.time": 0,
    "noise.power": 0,
    "throttle.switch_latency_s": SWITCH_S,
}
CACHE, CATALOGUE_FILE = "cache", "catalogue.toml"


def simulate(trace: Path, plan: Plan, folder: Path) -> dict[str, Figures]:
    """Figures by policy. Raises ProcessError."""
    found, cache = folder / "simulated.json", {"THROTTLLEM_CACHE_DIR": str(folder / CACHE)}
    catalogue = folder / CATALOGUE_FILE
    catalogue.write_text(entry_from(plan.lowest_mhz))
    throttllem(
        *("simulate", *CATALOGUE, "--catalogue", catalogue, "--trace", trace, "--json", found),
        *("--policy", ",".join(plan.policies), "--slo-e2e", f"{plan.e2e_s:g}", "--slo-tbt", f"{plan.tbt_s:g}"),
        *(text for name, value in ENGINE.items() for text in ("--set", f"{name}={value}")),
        environment=cache,
    )
    runs: list[dict[str, Any]] = json.loads(found.read_text())["runs"]
    return {run["policy"]: figures(run, plan, physics().idle_w()) for run in runs}


def simulate_with(tables: Path, trace: Path, plan: Plan, folder: Path) -> dict[str, Figures]:
    """Figures by policy, where the simulated controller knows what the live one does. After `simulate`."""
    study = Study(
        gpu=KIND,
        model=MODEL,
        sizes=(TP,),
        trace=str(trace),
        policies=plan.policies,
        slo_e2e_s=plan.e2e_s,
        slo_tbt_s=plan.tbt_s,
        options=load_options(settings=[f"{name}={value}" for name, value in ENGINE.items()]).options,
    )
    scenario, policies = study.prepare(Catalogue.load(folder / CATALOGUE_FILE), folder / CACHE)
    table = load_table(tables / f"table-tp{TP}.npz")
    fleet = replace(scenario.fleet, specs={TP: replace(scenario.fleet.specs[TP], clocks_mhz=table.clocks_mhz)})
    known = replace(scenario, fleet=fleet, tables={TP: table})
    return {policy.name: figures(known.run(policy).to_json(), plan, physics().idle_w()) for policy in policies}


def entry_from(lowest_mhz: int) -> str:
    """The catalogue's own entry of the GPU, but for its lowest clock: the one that the keeper allows."""
    text = resources.files("throttllem.physics").joinpath("catalogue.toml").read_text(encoding="utf-8")
    begin = text.index(f"[gpu.{KIND}]")
    others = (found.start() for found in re.finditer(r"^\[(?:gpu|model)\.([^\].]+)", text, re.M) if found[1] != KIND)
    end = next((place for place in others if place > begin), len(text))
    return re.sub(r"^clock_min_mhz = \d+", f"clock_min_mhz = {lowest_mhz}", text[begin:end], count=1, flags=re.M)
