from __future__ import annotations

from dataclasses import replace

import pytest

from throttllem.report.metrics import baseline_of, change, gain, saved, slo_met, verdict

from .factory import make_run

TRITON = make_run("triton", attainment=0.989)


def test_a_saving_is_stated_with_the_factor() -> None:
    run = make_run("throttllem", energy=0.688, attainment=0.987)
    assert verdict(run, TRITON) == (
        "throttllem: simulated energy 31.2 % (±1.4) below triton's, 1.45x tokens per joule, attainment 98.7 % "
        "(triton 98.9 %)"
    )


def test_what_a_saving_costs_in_latency_stands_beside_it() -> None:
    slower = replace(TRITON, policy="slow", energy_j=0.7 * TRITON.energy_j, ttft_s=replace(TRITON.ttft_s, p95=6.54))
    assert verdict(slower, TRITON).endswith(f"p95 latency: TTFT {TRITON.ttft_s.p95:.2f} -> 6.54 s")


def test_a_worse_run_is_stated_in_every_respect() -> None:
    run = make_run("fixed:600", energy=1.04, attainment=0.912, rejected=41)
    assert verdict(run, TRITON) == (
        "fixed:600: simulated energy 4.0 % (±0.2) above triton's, 0.94x tokens per joule, attainment 91.2 % "
        "(triton 98.9 %); but meets fewer SLOs (7.7 points below triton) and completed 41 requests fewer"
    )


def test_a_saving_names_the_requests_that_were_not_completed() -> None:
    assert verdict(make_run("x", energy=0.9, rejected=1), TRITON).endswith("; but completed 1 request fewer")


@pytest.mark.parametrize("energy", [1.0, 1.0004, 0.9996])
def test_equal_is_neither_less_nor_more(energy: float) -> None:
    sentence = verdict(make_run("throttllem", energy=energy), TRITON)
    assert "the same simulated energy as triton, 1.00x" in sentence
    assert "but" not in sentence


def test_the_baseline_is_not_compared_with_itself() -> None:
    assert verdict(TRITON, TRITON) == (
        "triton: the baseline, 612.0 kJ simulated, 0.690 tokens per joule, attainment 98.9 %"
    )


def test_half_a_point_is_the_slack_and_no_more() -> None:
    assert slo_met(make_run(attainment=0.984), TRITON)
    assert not slo_met(make_run(attainment=0.9839), TRITON)


def test_a_baseline_without_energy_is_not_divided_by() -> None:
    nothing = make_run("triton", energy=0.0)
    run = make_run("throttllem", energy=0.5)
    assert saved(run, nothing) is None
    assert gain(run, nothing) is None
    assert verdict(run, nothing).startswith("throttllem: 306.0 kJ simulated (triton used none), attainment")


def test_which_run_is_the_baseline() -> None:
    plain, scaled, other = TRITON, make_run("triton+autoscale"), make_run("throttllem")
    assert baseline_of([other, scaled, plain]) is plain
    assert baseline_of([other, scaled]) is scaled
    assert baseline_of([other, make_run("fixed:900")]) is other
    with pytest.raises(ValueError, match="no runs"):
        baseline_of([])


def test_a_change_has_a_sign_unless_it_rounds_to_nothing() -> None:
    assert [change(each) for each in (0.312, -0.04, 1e-6, -1e-6, None)] == ["−31.2", "+4.0", "0.0", "0.0", "–"]
