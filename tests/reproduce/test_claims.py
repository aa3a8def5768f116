from __future__ import annotations

import json

import pytest

from throttllem.reproduce.claims import CLOSE, OURS, PAPER, Claim, Figure, Form, Outcome, Rule, Standing

IDS = [
    *("model-r2", "model-mae", "model-mape", "projection-batch", "projection-kv", "kv-tbt", "kv-throughput"),
    *("sweet-spot", "too-low", "throttle-energy", "throttle-tpj", "scale-only", "throttle-only-tp4"),
    *("both-oracle", "both-30", "baseline-tpj", "slo", "tp1"),
]


def claim(rule: Rule = Rule.GAIN, *, papers: tuple[float, ...] = (0.3,)) -> Claim:
    figures = tuple(Figure(paper=paper, rule=rule, form=Form.LESS) for paper in papers)
    return Claim(id="one", text="a claim", figures=figures)


def outcome(ours: tuple[float, ...], *, of: Claim | None = None, **words: str) -> Outcome:
    return Outcome(claim=of or claim(), ours=ours, basis=("a run",), **words)


def test_every_claim_of_the_paper_is_there_once_and_ours_are_marked() -> None:
    assert [found.id for found in PAPER] == IDS
    assert all(found.id.startswith("ours-") for found in OURS)


@pytest.mark.parametrize(
    ("rule", "paper", "ours", "standing"),
    [
        (Rule.ABOVE, 0.97, 0.971, Standing.REPRODUCED),
        (Rule.ABOVE, 0.97, 0.97, Standing.NOT_REPRODUCED),
        (Rule.BELOW, 1.0, 0.99, Standing.REPRODUCED),
        (Rule.BELOW, 1.0, 1.0, Standing.NOT_REPRODUCED),
        (Rule.GAIN, 0.3, 0.31, Standing.BETTER),
        (Rule.GAIN, 0.3, 0.3, Standing.REPRODUCED),
        (Rule.GAIN, 0.3, CLOSE * 0.3, Standing.REPRODUCED),
        (Rule.GAIN, 0.3, 0.25, Standing.NOT_REPRODUCED),
        (Rule.GAIN, 0.3, -0.4, Standing.NOT_REPRODUCED),
        (Rule.ERROR, 0.0019, 0.0018, Standing.BETTER),
        (Rule.ERROR, 0.0019, 0.0019, Standing.REPRODUCED),
        (Rule.ERROR, 0.0019, 0.002, Standing.NOT_REPRODUCED),
        (Rule.AT_MOST, 0.5, 0.4, Standing.REPRODUCED),
        (Rule.AT_MOST, 0.5, 0.5, Standing.REPRODUCED),
        (Rule.AT_MOST, 0.5, 0.51, Standing.NOT_REPRODUCED),
        (Rule.STRENGTH, -0.92, -0.99, Standing.REPRODUCED),
        (Rule.STRENGTH, -0.92, 0.99, Standing.NOT_REPRODUCED),
        (Rule.STRENGTH, 0.92, 0.7, Standing.NOT_REPRODUCED),
        (Rule.EVERY, 1.0, 1.0, Standing.REPRODUCED),
        (Rule.EVERY, 1.0, 0.99, Standing.NOT_REPRODUCED),
        (Rule.NEAR, 1.0, 0.9, Standing.REPRODUCED),
        (Rule.NEAR, 1.0, 0.8, Standing.NOT_REPRODUCED),
        (Rule.WITHIN, 0.69, 0.6, Standing.REPRODUCED),
        (Rule.WITHIN, 0.69, 0.79, Standing.REPRODUCED),
        (Rule.WITHIN, 0.69, 0.58, Standing.NOT_REPRODUCED),
        (Rule.WITHIN, 0.69, 0.8, Standing.NOT_REPRODUCED),
        (Rule.SHOWN, 0.0, 5.0, Standing.OURS),
    ],
)
def test_rules(rule: Rule, paper: float, ours: float, standing: Standing) -> None:
    assert rule.judge(paper, ours) is standing


def test_no_rule_takes_a_figure_that_is_not_a_number() -> None:
    for rule in Rule:
        assert rule.judge(0.3, float("nan")) in {Standing.NOT_REPRODUCED, Standing.OURS}


def test_a_claim_stands_as_its_worst_figure() -> None:
    both = claim(papers=(0.3, 0.4))
    assert both.judge((0.31, 0.41)) is Standing.BETTER
    assert both.judge((0.31, 0.39)) is Standing.REPRODUCED
    assert both.judge((0.31, 0.1)) is Standing.NOT_REPRODUCED
    with pytest.raises(ValueError, match="2 figures, and 1 were measured"):
        both.judge((0.31,))


def test_a_shown_figure_does_not_weigh() -> None:
    mape = next(found for found in PAPER if found.id == "model-mape")
    assert mape.judge((0.9, 0.05)) is Standing.BETTER
    assert mape.judge((0.01, 0.06)) is Standing.NOT_REPRODUCED


def test_a_figure_outside_its_range_says_the_range() -> None:
    found = outcome((0.9,), of=claim(Rule.WITHIN, papers=(0.5,)), reason="Missed by far.", detail="More.")
    assert found.why == "-90.0 % where -42.5 % to -57.5 % (15 % around -50.0 %) is required. Missed by far. More."


def test_slo_violations_undo_a_saving() -> None:
    assert outcome((0.5,)).standing is Standing.BETTER
    found = outcome((0.5,), violations="Attainment fell.", reason="Unneeded.")
    assert found.standing is Standing.NOT_REPRODUCED
    assert found.why == "Attainment fell.", "the figure itself holds"


def test_a_failure_names_the_criterion_and_the_reason() -> None:
    found = outcome((0.1,), reason="The load was low.", detail="More.")
    assert found.why == "-10.0 % where at least -25.5 % (85 % of -30.0 %) is required. The load was low. More."
    assert found.ours_text == "-10.0 %"


def test_close_is_quantified() -> None:
    assert outcome((0.27,)).why == "Close: 10 % below the paper's -30.0 %."
    assert outcome((0.33,)).why == ""


def test_forms() -> None:
    written = [form.text(0.0625) for form in (Form.LESS, Form.MORE, Form.FACTOR, Form.SHARE, Form.FINE)]
    assert written == ["-6.2 %", "+6.2 %", "1.06x", "6.2 %", "6.25 %"]
    assert Form.LESS.text(1e-6) == Form.LESS.text(-1e-6) == "+0.0 %"
    assert Form.MILLISECONDS.text(0.035) == "35.00 ms"


def test_the_papers_figures_are_written_as_it_gives_them() -> None:
    texts = {found.id: found.paper_text for found in PAPER}
    assert texts["model-r2"] == "> 0.97"
    assert texts["model-mae"] == "< 1 iterations/s"
    assert texts["both-30"] == "-41.7 %, 1.71x tokens/J"
    assert texts["throttle-energy"] == "-24.7 % mean, -30.7 % best"
    assert texts["slo"] == "E2E met, TBT met"


def test_json_holds_numbers_and_words() -> None:
    entry = json.loads(json.dumps(outcome((0.27,), detail="More.").to_json(), allow_nan=False))
    assert entry["verdict"] == "reproduced" and entry["ours_values"] == [0.27] and entry["paper_values"] == [0.3]
    assert entry["reason"].endswith("More.") and entry["basis"] == ["a run"] and entry["criterion"]
