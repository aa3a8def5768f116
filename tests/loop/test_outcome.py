"""From logs, exports and metrics to figures."""

import json

import numpy as np
import pytest

from tests.loop.samples import PLAN, answered, meter, recorded, run, steps
from tools.loop import outcome, readings
from tools.loop.readings import EXPORT, Meter, Replayed, Steps, parsed
from tools.loop.runs import check
from tools.testbed.engines.vllm_pace import Step


def page(below, within, beyond):
    """A histogram with edges at 1 ms and 10 ms."""
    seen = {"0.001": below, "0.01": below + within, "+Inf": below + within + beyond}
    lines = [f'x_seconds_bucket{{le="{edge}"}} {count}' for edge, count in seen.items()]
    return "\n".join([*lines, f"x_seconds_count {seen['+Inf']}", ""]).encode()


PAGES = (page(0, 0, 0), page(4, 4, 2))


def test_a_run_is_judged_by_the_client_and_the_counter():
    few = (
        answered(100.0),
        answered(101.0, e2e_s=6.0),
        answered(102.0, itl_s=0.3),
        answered(103.0, tokens=1, itl_s=None),
    )
    found = outcome.measured(Replayed(answered=few, energy_j=None), meter(), steps(), PLAN, requests=5)
    assert found.energy_j == pytest.approx(300.0 * PLAN.window_s)
    assert found.tokens_per_j == pytest.approx(151 / 4500)
    assert found.attainment == pytest.approx(2 / 5)
    assert found.itl_mean_s == pytest.approx((0.02 + 0.02 + 0.3) / 3)
    assert found.clock_mhz == 1050


def test_nothing_answered_is_no_run():
    with pytest.raises(ValueError, match="no request"):
        outcome.measured(Replayed(answered=(), energy_j=None), meter(), steps(), PLAN, requests=5)


def test_both_slos_have_to_be_met():
    assert outcome.met([answered(), answered(e2e_s=5.1), answered(itl_s=0.21)], 5.0, 0.2) == 1


def test_a_simulation_idles_to_the_end_of_the_window():
    quantiles = {"mean": 0.02, "p50": 1.0, "p99": 2.0}
    entry = {
        "energy_j": 1000.0,
        "duration_s": 12.0,
        "generated_tokens": 500,
        "mean_clock_mhz": 900.0,
        "slo": {"attainment": 0.9},
        **dict.fromkeys(("ttft_s", "tpot_s", "e2e_s"), quantiles),
    }
    found = outcome.simulated(entry, PLAN, idle_w=50.0)
    assert found.energy_j == 1000.0 + 3.0 * 50.0
    assert found.tokens_per_j == pytest.approx(500 / 1150)
    assert (found.itl_mean_s, found.e2e_p99_s, found.attainment) == (0.02, 2.0, 0.9)


def test_medians_and_savings():
    few = [run(policy).figures for policy in ("triton", "throttllem", "least-energy")]
    assert outcome.middle(few).energy_j == pytest.approx(3000.0)
    assert outcome.saving(few[1], few[0]) == pytest.approx(0.3)


def test_quantiles_are_straight_within_a_bucket():
    assert readings.count(*PAGES, "x_seconds") == 10
    assert readings.quantile(*PAGES, "x_seconds", 0.2) == pytest.approx(0.0005)
    assert readings.quantile(*PAGES, "x_seconds", 0.5) == pytest.approx(0.001 + 0.009 / 4)
    assert readings.quantile(*PAGES, "x_seconds", 0.99) == 0.01
    assert readings.quantile(PAGES[1], PAGES[1], "x_seconds", 0.5) is None
    assert readings.quantile(*PAGES, "y_seconds", 0.5) is None


def test_costs_are_shares_of_a_core():
    found = outcome.cost(b"", b"", meter(), 102.0, 112.0)
    assert (found.gateway_share, found.keeper_share) == (pytest.approx(0.1), pytest.approx(0.01))
    assert (found.commands, found.command_p50_s) == (0, None)


def test_what_a_run_rests_on():
    found = outcome.trust(steps(), Replayed(answered=(), energy_j=4000.0), freed_s=0.1, load=2.0, quiet=False)
    assert (found.steps, found.overruns) == (14, pytest.approx(1 / 14))
    assert (found.real_share, found.host_share) == (pytest.approx(0.3), pytest.approx(0.2))
    assert (found.hook_j, found.aiperf_j) == (4200.0, 4000.0)


def test_the_chain_works_or_it_is_said_what_does_not():
    assert check(recorded("throttllem"), PLAN) == []
    assert "were not answered" in check(recorded("throttllem", answered=9), PLAN)[0]
    still = recorded("throttllem")
    still.meter.clock_mhz[:] = 1410
    assert "did not move" in check(still, PLAN)[0]
    assert check(recorded("triton"), PLAN) == []


def test_logs_are_read_up_to_a_line_that_was_cut_off(tmp_path):
    file = tmp_path / "meter.csv"
    file.write_text("100,0,55,1410,0,0\n101,300,300,1410,0.5,0.1\n102,60")
    found = Meter.read(file)
    assert found.joules(100.0, 100.5) == 150.0
    assert found.clocks(100, 101) == {1410}
    assert found.watts(np.array([100.0, 101.0]), 3.0).tolist() == [300.0]
    file = tmp_path / "steps.csv"
    few = [Step(10.0, 0.5, 0.1, 0.2, 0, 1410, 4, 100, 0, 20.0), Step(11.0, 1.0, 0.1, 0.2, 1, 1050, 8, 100, 0, 30.0)]
    file.write_text("".join(",".join(map(str, step)) + "\n" for step in few) + "12,1")
    read = Steps.read(file, 100.0)
    assert read.ended_s.tolist() == [110.0, 111.0]
    assert read.mean_clock_mhz() == pytest.approx((0.5 * 1410 + 1050) / 1.5)
    assert read.between(110.5, 120.0).rows.tolist() == [8.0]
    series = read.series(read.rows, np.array([109.0, 110.5, 111.5, 112.5]))
    assert series[:2].tolist() == [4.0, 8.0] and np.isnan(series[2])


def test_the_clients_own_export_is_what_counts():
    line = {
        "metadata": {"request_start_ns": 5_000_000_000},
        "metrics": {
            "usage_prompt_tokens": {"value": 1604},
            "usage_completion_tokens": {"value": 40},
            "time_to_first_token": {"value": 197.0},
            "request_latency": {"value": 857.0},
            "inter_token_latency": {"value": 16.9},
        },
    }
    found = parsed(json.loads(json.dumps(line)))
    assert (found.sent_s, found.tokens, found.ttft_s, found.e2e_s) == (5.0, 40, 0.197, 0.857)
    assert found.itl_s == pytest.approx(0.0169)
    assert EXPORT.endswith(".jsonl")
