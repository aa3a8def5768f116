"""The document and the picture."""

import json

from tests.loop.samples import PLAN, found, recorded
from tools.loop.document import (
    COLUMNS,
    compared_table,
    cost_table,
    measured_table,
    saving_table,
    section,
    trust_table,
)
from tools.loop.outcome import Found
from tools.loop.picture import draw
from tools.testbed.report import write_document


def test_measured_figures_are_medians_with_their_range():
    rows = {row[0]: row for row in measured_table(found()).rows}
    assert rows["triton"][1] == "4.04 (4.00 to 4.08)"
    assert rows["triton"][2] == "1.500"
    assert list(rows) == list(PLAN.policies)


def test_differences_are_relative_or_in_their_unit():
    rows = compared_table(found()).rows
    titles = ["measured", "simulated", "measured is", "with the gateway's table", "measured is"]
    assert [row[1] for row in rows] == titles * 3
    assert rows[2][2] == "+1.0%"
    first_token = COLUMNS[2]
    assert (first_token.difference(0.15, 0.1), first_token.difference(0.1, 0.15)) == ("+50", "-50")


def test_savings_are_measured_simulated_and_predicted():
    rows = saving_table(found()).rows
    assert rows == [("throttllem", "30.0%", "30.0%", ""), ("least-energy", "25.0%", "25.0%", "30.0%")]


def test_what_is_not_known_stays_empty():
    some = found()
    none = [run for run in some.runs if run.policy == "triton"]
    alone = Found(plan=PLAN, sent=some.sent, runs=none, simulated={}, informed={})
    assert compared_table(alone).rows == []
    bare = cost_table(some).rows[0]
    assert bare[:4] == ("triton", "9", "2.00", "9.00")


def test_every_run_is_accounted_for():
    rows = trust_table(found()).rows
    assert len(rows) == 10
    assert rows[-1][0] == "least-energy, dry run"
    assert rows[0][2] == "10 of 10"


def test_the_document_says_what_is_real_and_what_was_found(tmp_path):
    said = section(found(), {"vLLM": "1"})
    write_document(said, tmp_path / "loop.md", command="make loop")
    text = " ".join((tmp_path / "loop.md").read_text().split())
    assert "no saving here is one of real hardware" in text
    assert "`throttllem` took 30.0% less energy than `triton` (simulated 30.0%)" in text
    assert "predicted 30.0% for `least-energy`; 25.0% was measured" in text
    assert "![The loop closed live, on a modelled GPU](loop.png)" in text
    assert "{" not in text
    json.dumps(dict(said.results))


def test_the_picture_is_drawn(tmp_path):
    some = found()
    draw(some, {policy: recorded(policy) for policy in PLAN.policies}, tmp_path / "loop.png")
    assert (tmp_path / "loop.png").read_bytes().startswith(b"\x89PNG")
