"""The dashboard's page and its state, as a browser gets them."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from gateway.statuses import EMPTY, MODEL, STATUS, UP, Still, status_of_still  # noqa: F401 (a fixture)
from throttllem.gateway.telemetry.dashboard import dashboard_routes, state, totals
from throttllem.gateway.telemetry.history import History
from throttllem.gateway.telemetry.status import Ahead, Energy


def app(models: Still, history: History | None = None) -> Starlette:
    return Starlette(routes=dashboard_routes(models, history or History()))


def test_the_page_may_load_its_state_and_nothing_else() -> None:
    reply = TestClient(app(Still())).get("/dashboard")
    policy = reply.headers["content-security-policy"]
    assert reply.headers["content-type"].startswith("text/html")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "http" not in policy and "*" not in policy
    assert "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert re.findall(r"""(?:src|href)=["']?([^"'\s>]+)""", reply.text) == ["data:,"]
    assert not re.search(r"@import|url\(|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", reply.text)
    assert re.findall(r"https?://[^\s\"'`]+", reply.text) == ["http://www.w3.org/2000/svg"], "a name, not an address"


def test_the_state_is_the_status_with_its_totals_and_past() -> None:
    models, history = Still(), History()
    client = TestClient(app(models, history))
    models.at(431.0)
    history.note(models.status())
    models.at(432.5)
    got = client.get("/dashboard/state").json()
    assert got["status"]["models"][0]["engines"][0]["view"]["plan"] == {
        "mhz": 1065,
        "why": "one clock lower would violate an SLO",
        "binding": 4182,
    }
    assert got["totals"]["saved"] == pytest.approx(0.19)
    assert [sample["at_s"] for sample in got["samples"]] == [431.0, 432.5]
    query = {"run": got["run"], "since": "431.0"}
    assert [sample["at_s"] for sample in client.get("/dashboard/state", params=query).json()["samples"]] == [432.5]
    for other in ({"run": "older", "since": "431.0"}, {"run": got["run"], "since": "x"}, {"since": "431.0"}):
        assert len(client.get("/dashboard/state", params=other).json()["samples"]) == 2


def test_totals_are_over_all_engines_and_the_saving_over_those_compared() -> None:
    other = replace(UP, name="b", energy=Energy(total_j=19_000.0, idle_j=1_000.0, watts=13.0))
    both = totals(replace(STATUS, models=(replace(MODEL, engines=(UP, other)), MODEL)))
    assert (both.total_j, both.idle_j, both.watts, both.queue) == (181_000.0, 19_000.0, 387.0, 10)
    assert both.saved == pytest.approx(0.19) and (both.estimated, both.engines) == (2, 4)
    assert both.joules_per_token == pytest.approx(181_000 / 360_000)
    assert both.busy_joules_per_token == pytest.approx(162_000 / 360_000)
    assert both.recent.with_slo == 400 and both.recent_attainment == pytest.approx(0.985)
    none = totals(EMPTY)
    assert (none.saved, none.top_j, none.joules_per_token, none.recent_attainment) == (None, None, None, None)


def test_a_value_that_is_not_finite_is_null() -> None:
    odd = replace(UP, ahead=Ahead(at_s=(0.0, float("inf")), batch=(1, 1), kv_blocks=(1, 1)))
    got = json.loads(state(replace(STATUS, models=(replace(MODEL, engines=(odd,)),)), History()))
    assert got["status"]["models"][0]["engines"][0]["ahead"]["at_s"] == [0.0, None]
