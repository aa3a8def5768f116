"""`/metrics`: every value of the status under its name, with its unit and its line in the documentation."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.statuses import DOWN, EMPTY, HOSTILE, MODEL, STATUS
from throttllem.gateway.telemetry.metrics import Histograms, metrics_page
from throttllem.gateway.telemetry.status import Energy, GatewayStatus

DOCS = Path(__file__).parents[3] / "docs" / "reference" / "metrics.md"
UNITS = {"seconds", "joules", "watts", "hertz", "ratio", "requests", "tokens", "blocks", "sequences", "info", "total"}
PLAIN = {
    "throttllem_clocks_set",
    "throttllem_energy_measured",
    "gen_ai_client_token_usage",
    "throttllem_draining",
    "throttllem_engine_state",
    "throttllem_engine_up",
    "throttllem_recent_slo_violations",
    "throttllem_table_beyond_bounds",
}
AT = {"engine": "a100-0", "model": "llama"}


def page(status: GatewayStatus = STATUS, histograms: Histograms | None = None) -> list:
    kind, body = metrics_page(status, histograms)
    assert kind.startswith("text/plain; version=0.0.4")
    return list(text_string_to_metric_families(body.decode()))


def values(families: list) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    pairs = [
        ((sample.name, tuple(sorted(sample.labels.items()))), sample.value)
        for family in families
        for sample in family.samples
    ]
    assert len(pairs) == len(dict(pairs)), "the same series twice"
    return dict(pairs)


def value(families: list, name: str, **labels: str) -> float | None:
    return values(families).get((name, tuple(sorted(labels.items()))))


def observed() -> Histograms:
    histograms = Histograms()
    ended = {"model": "llama", "queue_s": 0.004, "ttft_s": 0.2, "tbt_s": 0.02, "e2e_s": 3.0}
    histograms.request(**ended, prompt_tokens=100, generated_tokens=50, joules=20.0, met=True, operation="chat")
    absent = dict.fromkeys(ended, None) | {"model": "llama"}
    histograms.request(**absent, prompt_tokens=None, generated_tokens=None, joules=5.0, met=None)
    histograms.decision(0.0003)
    histograms.clock_command(0.0004)
    histograms.http(200)
    histograms.http(999)
    return histograms


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("throttllem_queue_requests", {"model": "llama"}, 5),
        ("throttllem_running_requests", AT, 17),
        ("throttllem_pending_requests", AT, 2),
        ("throttllem_clock_hertz", AT, 1.05e9),
        ("throttllem_planned_clock_hertz", AT, 1.065e9),
        ("throttllem_top_clock_hertz", AT, 1.41e9),
        ("throttllem_power_watts", AT, 187),
        ("throttllem_energy_joules_total", AT, 81_000),
        ("throttllem_idle_energy_joules_total", AT, 9_000),
        ("throttllem_top_clock_energy_joules_total", AT, 100_000),
        ("throttllem_clocks_set", AT, 0),
        ("throttllem_dry_run_clock_hertz", AT, 1.065e9),
        ("throttllem_clock_limit_hertz", AT, 1.05e9),
        ("throttllem_dry_run_energy_joules_total", AT, 72_900),
        ("throttllem_dry_run_saving_ratio", AT, pytest.approx(0.1)),
        ("throttllem_energy_saving_ratio", AT, pytest.approx(0.19)),
        ("throttllem_slo_attainment_ratio", {"model": "llama", "window": "recent"}, 0.985),
        ("throttllem_slo_attainment_ratio", {"model": "llama", "window": "ever"}, 0.985),
        ("throttllem_slo_violations_total", {"model": "llama", "slo": "ttft"}, 4),
        ("throttllem_recent_slo_violations", {"model": "llama", "slo": "e2e"}, 2),
        ("throttllem_slo_requests_total", {"model": "llama"}, 1400),
        ("throttllem_slo_met_requests_total", {"model": "llama"}, 1379),
        ("throttllem_recent_slo_requests", {"model": "llama"}, 200),
        ("throttllem_recent_slo_met_requests", {"model": "llama"}, 197),
        ("throttllem_requests_total", {"model": "llama", "outcome": "rejected"}, 6),
        ("throttllem_lost_requests_total", {"model": "llama"}, 8),
        ("throttllem_generated_tokens_total", {"model": "llama"}, 180_000),
        ("throttllem_kv_blocks", AT, 1234),
        ("throttllem_kv_capacity_blocks", AT, 2310),
        ("throttllem_reported_kv_blocks", AT, 1230),
        ("throttllem_drift_kv_blocks", AT, -4),
        ("throttllem_mean_drift_requests", AT, 0.25),
        ("throttllem_corrections_total", AT, 21),
        ("throttllem_external_sequences", AT, 3),
        ("throttllem_engine_state", {**AT, "state": "up"}, 1),
        ("throttllem_engine_state", {**AT, "state": "down"}, 0),
        ("throttllem_engine_up", {"engine": HOSTILE, "model": "llama"}, 0),
        ("throttllem_length_exceeded_ratio", {"model": "llama"}, 0.094),
        ("throttllem_build_info", {"version": "0.1.0"}, 1),
        ("throttllem_policy_info", {"policy": "throttllem"}, 1),
        ("throttllem_slo_seconds", {"slo": "tbt"}, 0.2),
        ("throttllem_uncontrolled_requests_total", {}, 13),
    ],
)
def test_the_page_shows_the_status(name: str, labels: dict[str, str], expected: float) -> None:
    assert value(page(), name, **labels) == expected


def test_what_is_not_known_has_no_sample() -> None:
    families = page()
    dark = {"engine": HOSTILE, "model": "llama"}
    for name in ("clock_hertz", "running_requests", "kv_capacity_blocks", "drift_requests", "energy_saving_ratio"):
        assert value(families, f"throttllem_{name}", **dark) is None
    assert value(families, "throttllem_slo_seconds", slo="ttft") is None
    assert value(page(EMPTY), "throttllem_draining") == 1
    assert not [key for key in values(page(EMPTY)) if "model" in dict(key[1])]


def test_a_model_without_a_name_goes_by_its_engine() -> None:
    nameless = replace(STATUS, models=(replace(MODEL, names=(), engines=(replace(DOWN, name="one"),)),))
    assert value(page(nameless), "throttllem_queue_requests", model="one") == 5


def test_saving_is_against_the_top_clock_and_may_be_negative() -> None:
    assert Energy(total_j=81.0, idle_j=9.0, top_j=100.0).saved == pytest.approx(0.19)
    assert Energy(total_j=110.0, top_j=100.0).saved == pytest.approx(-0.1)
    assert Energy(total_j=1.0).saved is None
    assert Energy(top_j=0.0).saved is None


def test_histograms_count_what_ended() -> None:
    families = page(STATUS, observed())
    about = {"gen_ai_operation_name": "chat", "gen_ai_provider_name": "throttllem", "gen_ai_request_model": "llama"}
    assert value(families, "gen_ai_server_time_to_first_token_seconds_sum", **about) == 0.2
    assert value(families, "gen_ai_server_time_to_first_token_seconds_bucket", **about, le="0.1") == 0
    assert value(families, "gen_ai_server_time_to_first_token_seconds_bucket", **about, le="0.25") == 1
    assert value(families, "gen_ai_server_request_duration_seconds_count", **about) == 1
    assert value(families, "gen_ai_server_time_per_output_token_seconds_sum", **about) == 0.02
    assert value(families, "gen_ai_client_token_usage_sum", **about, gen_ai_token_type="output") == 50
    assert value(families, "throttllem_queue_seconds_count", model="llama") == 1
    assert value(families, "throttllem_request_joules_sum", model="llama", slo_met="yes") == 20
    assert value(families, "throttllem_request_joules_sum", model="llama", slo_met="no SLO") == 5
    assert value(families, "throttllem_decision_seconds_count") == 1
    assert value(families, "throttllem_http_responses_total", code="200") == 1
    assert value(families, "throttllem_http_responses_total", code="other") == 1


def test_two_gateways_share_nothing() -> None:
    observed()
    assert value(page(STATUS, Histograms()), "throttllem_decision_seconds_count") == 0


def test_every_name_has_a_prefix_a_unit_and_a_description() -> None:
    families = page(STATUS, observed())
    assert len(families) > 45
    for family in families:
        name = family.name + ("_total" if family.type == "counter" else "")
        assert name.startswith(("throttllem_", "gen_ai_")), name
        assert name.rsplit("_", 1)[1] in UNITS or name in PLAIN, name
        assert not re.search(r"_(ms|mhz|kwh|percent|milli\w*|created)(_|$)", name), name
        assert family.documentation.strip(), name
        for sample in family.samples:
            assert not {"caller", "request", "request_id", "user", "path"} & set(sample.labels), sample


def test_docs_list_every_metric_and_no_other() -> None:
    documented = set(re.findall(r"^\| `(\w+)`", DOCS.read_text(encoding="utf-8"), re.MULTILINE))
    shown = {family.name + ("_total" if family.type == "counter" else "") for family in page(STATUS, observed())}
    assert documented == shown
