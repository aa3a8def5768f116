from __future__ import annotations

from dataclasses import replace

import pytest

from throttllem.report.claim_list import OURS, PAPER
from throttllem.report.claims import Outcome, Standing
from throttllem.report.evidence import Evidence, draw, time_by_size, violations
from throttllem.report.findings import outcomes
from throttllem.sim.result import ProjectionError

from .evaluation import evidence
from .factory import make_run, quantiles


def found(of: Evidence) -> dict[str, Outcome]:
    return {outcome.claim.id: outcome for outcome in outcomes(of)}


def test_every_claim_has_one_outcome_in_order_with_a_basis() -> None:
    all_of_them = outcomes(evidence())
    assert [outcome.claim.id for outcome in all_of_them] == [claim.id for claim in (*PAPER, *OURS)]
    assert all(outcome.basis for outcome in all_of_them)


def test_savings_are_of_the_runs() -> None:
    by_id = found(evidence())
    # 30 % times 1.02, 1.04, 1.08, 1.02, 1.16 of the five engines.
    assert by_id["throttle-energy"].ours == pytest.approx((0.3 * 1.064, 0.3 * 1.16))
    assert by_id["throttle-only-tp4"].ours == pytest.approx((0.3 * 1.08,))
    assert by_id["scale-only"].ours == pytest.approx((0.21 * 1.08,))
    energy = 1 - 0.45 * 1.08
    assert by_id["both-oracle"].ours == pytest.approx((1 - energy, 1 / energy - 1))
    assert by_id["ours-least-energy-autoscale"].ours[0] == pytest.approx(0.5 * 1.08)
    assert by_id["tp1"].ours == pytest.approx((2.4 * 6.2 / 16.0, 0.3 * 0.06))
    assert by_id["kv-tbt"].ours == pytest.approx((0.94,))
    assert by_id["model-mae"].standing is Standing.REPRODUCED


def test_a_saving_with_broken_promises_is_not_reproduced() -> None:
    by_id = found(evidence(attainment=0.9))
    for claim_id in ("throttle-energy", "throttle-tpj", "throttle-only-tp4", "both-oracle", "both-30", "scale-only"):
        assert by_id[claim_id].standing is Standing.NOT_REPRODUCED, claim_id
        assert "half a point" in by_id[claim_id].why
    assert by_id["throttle-energy"].why.count("30 % length error") == 0, "that claim is on oracle lengths alone"
    assert by_id["ours-least-energy"].standing is Standing.OURS
    assert "half a point" in by_id["ours-least-energy"].why


def test_the_model_fails_with_its_engines_named() -> None:
    outcome = found(evidence(mae=1.2))["model-mae"]
    assert outcome.standing is Standing.NOT_REPRODUCED
    assert "llama-3-70b TP 8 1.20" in outcome.why


def test_projection_is_that_of_tp_4_with_oracle_lengths() -> None:
    whole = evidence()
    engines = []
    for each in whole.engines:
        error = ProjectionError(batch=0.003 if each.study.sizes == (4,) else 9.0, kv=0.01)
        runs = each.runs | {"throttllem": replace(each.runs["throttllem"], projection_error=error)}
        engines.append(replace(each, runs=runs))
    by_id = found(replace(whole, engines=tuple(engines)))
    assert by_id["projection-batch"].ours == (0.003,)
    assert by_id["projection-batch"].standing is Standing.NOT_REPRODUCED
    assert by_id["projection-kv"].standing is Standing.BETTER


def test_one_late_run_breaks_the_slo_claim_and_is_named() -> None:
    assert found(evidence())["slo"].standing is Standing.REPRODUCED
    whole = evidence()
    late = replace(whole.sizes.runs["throttllem+autoscale"], e2e_s=quantiles(7.0))
    sizes = replace(whole.sizes, runs=whole.sizes.runs | {"throttllem+autoscale": late})
    outcome = found(replace(whole, sizes=sizes))["slo"]
    assert outcome.standing is Standing.NOT_REPRODUCED
    assert outcome.ours_text == "E2E 12 of 13 runs, TBT 13 of 13"
    assert "llama-2-13b TP 1,2,4 throttllem+autoscale E2E p99 16.8 s of 16.0 s (triton 14.9 s)" in outcome.why


def test_the_draw_names_a_cheaper_clock_only_where_there_is_one() -> None:
    whole = evidence()
    assert "least-energy saves 32.4 % there" not in draw(whole.sizes, "throttllem"), "that policy was not run there"
    assert "least-energy saves 37.8 % there" in draw(whole.engine(4), "throttllem")
    assert "cheapest" not in draw(whole.sizes, "triton+autoscale")


def test_time_by_size_adds_up() -> None:
    text = time_by_size(evidence().sizes, "throttllem+autoscale")
    assert "TP 2 33 %, TP 4 67 % (2 changes)" in text
    assert "TP 1 2.00, TP 2 4.00, TP 4 8.00 (taken up to 90 % of them)" in text


def test_violations_by_cause() -> None:
    run = replace(make_run(requests=1000, rejected=20, attainment=0.95), lost=3)
    text = violations([run, run])
    assert text.startswith("2,000 requests: 40 rejected (the queue is full), ")
    assert "56 finished past their E2E SLO" in text and "48 over the TBT SLO" in text and "6 marked lost" in text
