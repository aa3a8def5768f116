from __future__ import annotations

import random
from dataclasses import replace

import pytest

from throttllem.config import CostOptions
from throttllem.report.basis import assumed_slos, certainty, dearer, headline
from throttllem.report.certainty import saving_interval
from throttllem.report.cost import cost, factors
from throttllem.sim.result import RunResult

from .factory import make_run

TRITON = make_run("triton")


def drawn(energy: float, scatter: float, seed: int) -> RunResult:
    """A run of that share of the baseline's power, each bin with an error of its own."""
    dice = random.Random(seed)
    power = [watts * energy * dice.gauss(1, scatter) for watts in TRITON.series.power_w]
    return replace(TRITON, policy="x", series=replace(TRITON.series, power_w=power))


def test_the_interval_covers_what_it_should() -> None:
    """Of 200 runs with a known saving, about 95 % have it in their interval."""
    covered = 0
    for seed in range(200):
        run = drawn(0.7, 0.2, seed)
        found = saving_interval(run, TRITON)
        assert found is not None and found[1] == 20
        saved = 1 - sum(run.series.power_w) / sum(TRITON.series.power_w)
        covered += abs(saved - 0.3) <= found[0]
    assert 180 <= covered <= 199


def test_a_constant_share_has_no_scatter_and_a_short_run_no_interval() -> None:
    width, _ = saving_interval(drawn(0.7, 0.0, 1), TRITON) or (1.0, 0)
    assert width == pytest.approx(0, abs=1e-12)
    slow = replace(TRITON, policy="x", e2e_s=replace(TRITON.e2e_s, p50=300.0))
    assert saving_interval(slow, TRITON) is None
    assert "too short for an interval" in certainty({"seed": 3}, [TRITON, slow])


@pytest.mark.parametrize(
    ("length", "said"),
    [
        ({"predictor": "online"}, "predicted online, as the gateway does"),
        ({"predictor": "oracle", "p95_error": None}, "an ORACLE, known in advance; no gateway has it"),
        ({"predictor": "oracle", "p95_error": 0.3}, "an ORACLE, with 30% error at p95"),
        ({"predictor": "max-tokens"}, "max_tokens; nothing is predicted"),
    ],
)
def test_the_first_line_names_the_predictor(length: dict[str, object], said: str) -> None:
    line = headline({"options": {"length": length}})
    assert line.startswith("Simulated") and said in line


def test_what_dominates_the_error_is_named() -> None:
    def scenario(error: float | None) -> dict[str, object]:
        clocks = {"clocks_mhz": [0, 9999]}
        reach = {"seconds": {"error": 0.03} | clocks, "watts": {"error": error} | clocks}
        return {"seed": 3, "engines": [{"tp": 4, "physics": reach}]}

    runs = [TRITON, drawn(0.7, 0.02, 1)]
    assert "The physics dominates the error: seconds 3.0 % off" in certainty(scenario(0.05), runs)
    assert "the error of watts on this engine is not known" in certainty(scenario(None), runs)
    assert "The scatter dominates" in certainty(scenario(0.01), [TRITON, drawn(0.7, 1.5, 1)])


def test_outside_of_its_range_no_error_is_known() -> None:
    reach = {"error": 0.01, "clocks_mhz": [max(TRITON.busy_s_by_mhz), 9999]}
    slow = replace(drawn(0.7, 1.5, 1), busy_s_by_mhz={min(TRITON.busy_s_by_mhz) - 15: 60.0})
    said = certainty({"engines": [{"physics": {"seconds": reach}}]}, [TRITON, slow])
    assert "1.0 % off where held out, not known for" in said and "100% of x's time" in said
    assert "The physics dominates" in said


def test_only_policies_with_an_interval_are_given_one() -> None:
    short = replace(TRITON, policy="short", e2e_s=replace(TRITON.e2e_s, p50=1e6))
    said = certainty({}, [TRITON, drawn(0.7, 0.2, 1), short])
    assert "x ±" in said and "too short for an interval: short" in said and "short ±" not in said


def test_assumed_slos_are_named() -> None:
    scenario = {"slo": {"e2e_s": 27.9, "tbt_s": 0.2, "ttft_s": 1.0}, "slo_assumed": ["e2e_s"]}
    said = assumed_slos(scenario)
    assert said and "E2E 27.9 s" in said and "TBT" not in said
    assert assumed_slos(scenario | {"slo_assumed": []}) is None


def test_cost_follows_from_the_factors() -> None:
    run = replace(TRITON, energy_j=3.6e6, generated_tokens=500_000, duration_s=3600.0)
    found = cost(run, CostOptions(co2_g_per_kwh=200.0, price_per_kwh=0.25, currency="EUR"), run)
    assert (found.kwh, found.co2_kg, found.price, found.currency) == (1.0, 0.2, 0.25, "EUR")
    assert (found.kwh_per_million_tokens, found.price_per_million_tokens) == (2.0, 0.5)
    assert (found.kwh_per_year, found.price_per_year) == (8760.0, 2190.0)
    assert cost(replace(run, generated_tokens=0), CostOptions(), run).price_per_million_tokens is None


def test_a_slower_run_has_no_cheaper_year() -> None:
    slower = replace(TRITON, energy_j=0.9 * TRITON.energy_j, duration_s=1.2 * TRITON.duration_s)
    years = [cost(run, CostOptions(), TRITON).kwh_per_year for run in (TRITON, slower)]
    assert years[0] and years[1] == pytest.approx(0.9 * years[0])


def test_sources_are_given_for_the_defaults_alone() -> None:
    assert "445 g/kWh (IEA" in factors(CostOptions()) and "(EIA" in factors(CostOptions())
    own = factors(CostOptions(co2_g_per_kwh=56.0, price_per_kwh=0.2, currency="EUR"))
    assert "IEA" not in own and "EIA" not in own and "56 g/kWh" in own


def test_the_papers_policy_is_warned_of_where_it_costs_more_than_the_maximum_clock() -> None:
    worse, least = make_run("throttllem", energy=1.065), make_run("least-energy", energy=0.934)
    (warning,) = dearer([TRITON, worse, least])
    assert "throttllem takes 6.5% more energy than triton at this load (1.1 requests/s on the mean)" in warning
    assert "least-energy takes the cheapest clock (-6.6% here)" in warning
    (alone,) = dearer([TRITON, worse])
    assert alone.endswith("least-energy takes the cheapest clock.")
    assert dearer([TRITON, make_run("throttllem", energy=0.9), make_run("fixed:210", energy=1.3)]) == []
    assert dearer([worse, make_run("fixed:210", energy=0.5)]) == [], "there is no maximum clock to compare with"
