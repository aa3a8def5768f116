"""The paper's claims as judged by the last run: its JSON, its page, and the score in the README."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from throttllem.files import write_aside
from throttllem.physics.catalogue import Catalogue
from throttllem.reproduce.run import reproduce, reproduction_json
from tools.testbed.report import markdown_rows, replace_between

COMMAND = "make numbers NUMBERS='--only claims'"
BEGIN, END = f"<!-- claims: written by `{COMMAND}` -->", "<!-- /claims -->"
RESULTS, PAGE = "docs/evaluation/claims.json", "docs/evaluation/claims.md"


def score(found: Mapping[str, Any]) -> str:
    """The score as the README has it."""
    failed = [f"`{claim['id']}`" for claim in found["claims"] if claim["verdict"] == "not reproduced"]
    rest = f" Not reproduced: {', '.join(failed)}." if failed else ""
    return f"{found['score']}{rest}\n"


def page(found: Mapping[str, Any]) -> str:
    """Every claim, its verdict and the reason; and every run."""
    head = ("claim", "", "paper", "ours (simulated)", "verdict")
    rows = [
        (f"`{claim['id']}`", claim["claim"], claim["paper"], claim["ours"], claim["verdict"])
        for claim in found["claims"]
    ]
    reasons = "\n".join(f"- `{claim['id']}`: {claim['reason']}" for claim in found["claims"] if claim["reason"])
    statement = found["basis"]["statement"]
    return "\n\n".join(
        (statement, f"**{found['score']}**", markdown_rows(head, rows), "## Why", reasons, "## Every run", _runs(found))
    )


def _runs(found: Mapping[str, Any]) -> str:
    head = (
        *("engine", "lengths", "policy", "kJ", "SLO met, %", "TTFT p50, s", "TTFT p99, s"),
        *("TPOT p50, ms", "TPOT p99, ms", "E2E p50, s", "E2E p99, s"),
    )
    rows = [
        (
            *(run["engine"], run["lengths"], f"`{run['policy']}`"),
            *(f"{run['energy_j'] / 1e3:,.0f}", f"{run['slo']['attainment'] * 100:.1f}"),
            *(f"{run['ttft_s'][at]:.2f}" for at in ("p50", "p99")),
            *(f"{run['tpot_s'][at] * 1e3:.0f}" for at in ("p50", "p99")),
            *(f"{run['e2e_s'][at]:.1f}" for at in ("p50", "p99")),
        )
        for run in found["runs"]
    ]
    return markdown_rows(head, rows)


def fill(root: Path, found: Mapping[str, Any]) -> None:
    """Put a run's score and claims into README and page."""
    replace_between(root / "README.md", BEGIN, END, score(found))
    replace_between(root / PAGE, BEGIN, END, page(found) + "\n")


def write(root: Path, catalogue: Catalogue, cache_dir: Path, workers: int) -> None:
    """Run the paper's evaluation, and write it down."""
    found = reproduction_json(reproduce(catalogue, cache_dir, workers=workers, seed=0))
    with write_aside(root / RESULTS) as aside:
        aside.write_text(json.dumps(found, indent=1) + "\n")
    fill(root, json.loads((root / RESULTS).read_text()))
