from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from report.factory import make_run
from rich.console import Console

from throttllem.physics.catalogue import Catalogue
from throttllem.reproduce.claims import OURS, PAPER, Outcome, Standing
from throttllem.reproduce.findings import outcomes
from throttllem.reproduce.run import (
    Reproduction,
    check_completed,
    claims_table,
    reproduce,
    reproduction_json,
    runs_table,
    tally,
)

from .evaluation import evidence


def show(found: list[Outcome], width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(claims_table(found, width))
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("attainment", [0.9, 0.999])
def test_the_table_shows_every_claim_whole(width: int, attainment: float) -> None:
    found = outcomes(evidence(attainment=attainment))
    lines = show(found, width)
    text = "".join(lines)
    assert max(len(line.rstrip()) for line in lines) <= width
    assert "…" not in text, "a cell was cut"
    for outcome in found:
        start = outcome.claim.id[:18]
        rows = [line for line in lines if line.strip().startswith(start) and outcome.standing.value in line]
        assert rows, outcome.claim.id
    words = set(text.replace("\n", " ").split())
    assert set(found[-1].why.split()) <= words, "the reasons are listed"


def test_the_tally_leaves_out_what_is_ours() -> None:
    found = outcomes(evidence())
    counts = tally(found)
    assert sum(counts.values()) == len(found)
    assert counts["ours"] == len(OURS)
    good = counts["reproduced"] + counts["better"]
    assert any(line.startswith(f"{good} of {len(PAPER)} claims reproduced") for line in show(found, 100))


def test_json_is_of_the_contracts_schema() -> None:
    found = Reproduction(outcomes=tuple(outcomes(evidence())), evidence=evidence())
    entry = json.loads(json.dumps(reproduction_json(found), allow_nan=False))
    assert entry["basis"]["lengths"] == "online" and "predicted" not in entry["basis"]["statement"][:9]
    assert {run["lengths"] for run in entry["runs"]} == {"online", "oracle", "oracle, 30% error"}
    assert all(run["ttft_s"]["p95"] and run["tpot_s"]["p99"] for run in entry["runs"])
    assert entry["schema"] == 1
    assert [claim["id"] for claim in entry["claims"]] == [claim.id for claim in (*PAPER, *OURS)]
    assert {claim["verdict"] for claim in entry["claims"]} <= {standing.value for standing in Standing}


def test_a_trace_that_is_not_there_is_refused_before_anything_runs(tmp_path) -> None:
    with pytest.raises((ValueError, OSError), match=r"missing\.csv"):
        reproduce(Catalogue.load(), tmp_path / "cache", workers=1, seed=0, trace=str(tmp_path / "missing.csv"))
    assert not (tmp_path / "cache").exists()


def test_a_run_that_completed_nothing_is_refused() -> None:
    whole = evidence()
    check_completed(whole.comparisons)
    none = replace(whole.sizes, runs=whole.sizes.runs | {"throttllem": make_run(requests=20, rejected=20)})
    with pytest.raises(
        ValueError,
        match=r"TP 1,2,4 throttllem \(lengths online\): none of 20 requests was completed; give a longer trace",
    ):
        check_completed((*whole.engines, none))


@pytest.mark.slow
def test_the_real_thing_on_a_short_trace(tmp_path) -> None:
    seen: dict[str, float] = {}
    made = reproduce(Catalogue.load(), tmp_path, workers=2, seed=0, seconds=60.0, progress=seen.__setitem__)
    found = made.outcomes
    assert [outcome.claim.id for outcome in found] == [claim.id for claim in (*PAPER, *OURS)]
    assert set(seen.values()) == {1.0}, "every stage came to its end"
    for outcome in found:
        assert outcome.standing is not Standing.NOT_REPRODUCED or outcome.why
    by_id = {outcome.claim.id: outcome for outcome in found}
    for claim_id in ("model-r2", "projection-batch", "projection-kv", "kv-tbt", "kv-throughput"):
        assert by_id[claim_id].standing in {Standing.REPRODUCED, Standing.BETTER}, by_id[claim_id].why
    json.dumps(reproduction_json(made), allow_nan=False)


def test_every_run_stands_in_a_table_with_ttft_tpot_and_e2e() -> None:
    console = Console(width=120, file=io.StringIO(), force_terminal=False)
    console.print(runs_table(evidence()))
    text = console.file.getvalue()
    assert all(head in text for head in ("TTFT s", "TPOT ms", "E2E s"))
    assert "throttllem, oracle, 30% error" in text and "least-energy+autoscale, online" in text
