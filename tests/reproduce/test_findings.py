from __future__ import annotations

from dataclasses import replace

import pytest
from report.factory import make_run, quantiles

from throttllem.reproduce.claims import OURS, PAPER, Outcome, Standing
from throttllem.reproduce.evidence import Evidence, draw, time_by_size, violations
from throttllem.reproduce.findings import outcomes
from throttllem.sim.result import ProjectionError

from .evaluation import evidence


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
    assert by_id["tp1"].ours == pytest.approx((2.4 * 6.2 / 16.0, 1.02 / 1.08))
    assert by_id["kv-tbt"].ours == pytest.approx((0.94,))
    assert by_id["model-mae"].standing is Standing.REPRODUCED


def test_a_saving_with_slo_violations_is_not_reproduced() -> None:
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
    assert by_id["projection-kv"].standing is Standing.REPRODUCED, "ours is less than half, and still not better"
    for claim_id in ("projection-batch", "projection-kv"):
        assert by_id[claim_id].why.count("proves little and never counts") == 1


def test_one_late_run_breaks_the_slo_claim_and_is_named() -> None:
    assert found(evidence())["slo"].standing is Standing.REPRODUCED
    whole = evidence()
    late = replace(whole.sizes.runs["throttllem+autoscale"], e2e_s=quantiles(7.0))
    sizes = replace(whole.sizes, runs=whole.sizes.runs | {"throttllem+autoscale": late})
    outcome = found(replace(whole, sizes=sizes))["slo"]
    assert outcome.standing is Standing.NOT_REPRODUCED
    assert outcome.ours_text == "E2E 19 of 20 runs, TBT 20 of 20"
    assert (
        "llama-2-13b TP 1,2,4 throttllem+autoscale (lengths online) E2E p99 16.8 s of 16.0 s (triton 14.9 s)"
        in outcome.why
    )


def test_a_request_is_held_to_its_own_time_between_tokens() -> None:
    """The mean over all gaps is small in this run: a claim on it would hold."""
    whole = evidence()
    slow = replace(whole.sizes.runs["throttllem"], tpot_s=quantiles(0.1))
    assert slow.tbt_s.mean is not None and slow.tbt_s.mean < 0.2
    sizes = replace(whole.sizes, runs=whole.sizes.runs | {"throttllem": slow})
    outcome = found(replace(whole, sizes=sizes))["slo"]
    assert outcome.standing is Standing.NOT_REPRODUCED
    assert outcome.ours_text == "E2E 20 of 20 runs, TBT 19 of 20"
    assert "llama-2-13b TP 1,2,4 throttllem (lengths online) mean TBT p99 240 ms of 200 ms" in outcome.why


def test_tp_1_saves_little_only_at_half_of_tp_4() -> None:
    assert (outcome := found(evidence())["tp1"]).standing is Standing.NOT_REPRODUCED, "a little less is not little"
    assert "saves 30.6 % at TP 1 and 32.4 % at TP 4" in outcome.why and "at most 50.0 % is required" in outcome.why
    for energy, standing in ((0.84, Standing.REPRODUCED), (0.83, Standing.NOT_REPRODUCED)):
        assert found(saving(1, energy))["tp1"].standing is standing
    assert found(saving(4, 1.1))["tp1"].standing is Standing.NOT_REPRODUCED, "there is no half of nothing"


def saving(tp: int, energy: float) -> Evidence:
    """Evidence in which throttllem uses that much of the baseline's energy at one size."""
    whole = evidence()
    engines = []
    for each in whole.engines:
        run = each.runs["throttllem"]
        if (each.study.model, each.study.sizes) == ("llama-2-13b", (tp,)):
            run = replace(run, energy_j=energy * each.baseline.energy_j)
        engines.append(replace(each, runs=each.runs | {"throttllem": run}))
    return replace(whole, engines=tuple(engines))


def test_every_saving_says_once_what_its_watts_rest_on() -> None:
    by_id = found(evidence())
    throttled = ("throttle-energy", "throttle-tpj", "throttle-only-tp4", "both-oracle", "both-30")
    assert {claim_id for claim_id, outcome in by_id.items() if "Nothing is fitted to the paper" in outcome.why} == set(
        throttled
    )
    assert all(by_id[claim_id].why.count("Nothing is fitted to the paper") == 1 for claim_id in throttled)


@pytest.mark.parametrize(("ours", "standing"), [(0.7, Standing.REPRODUCED), (0.897, Standing.NOT_REPRODUCED)])
def test_the_baseline_is_judged_and_its_gap_is_explained_in_watts(ours: float, standing: Standing) -> None:
    whole = evidence()
    four = whole.engine(4)
    changed = replace(four, runs=four.runs | {"triton": replace(four.baseline, tokens_per_joule=ours)})
    engines = tuple(changed if each is four else each for each in whole.engines)
    baseline = found(replace(whole, engines=engines))["baseline-tpj"]
    assert baseline.standing is standing
    assert ("W per GPU, ours" in baseline.why) is (standing is Standing.NOT_REPRODUCED)


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
