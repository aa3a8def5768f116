"""The dashboard in a real Chromium, served by a real uvicorn: it shows the values of `/metrics`."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.chromium import CHROMIUM, Tab, browse
from gateway.statuses import DOWN, EMPTY, HOSTILE, MODEL, STATUS, UP, Still, status_of_still  # noqa: F401 (a fixture)
from throttllem.gateway.telemetry.dashboard import dashboard_routes
from throttllem.gateway.telemetry.history import History
from throttllem.gateway.telemetry.metrics import metrics_page

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]
LIVE = "document.getElementById('live')?.textContent === '✓ live'"


@asynccontextmanager
async def served(models: Still) -> AsyncIterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app(models), log_level="error", timeout_graceful_shutdown=1))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


def app(models: Still) -> Starlette:
    async def metrics(request: Request) -> Response:
        kind, body = metrics_page(models.status())
        return Response(body, headers={"content-type": kind})

    return Starlette(routes=[*dashboard_routes(models, History()), Route("/metrics", metrics)])


async def shown(tab: Tab, key: str) -> str:
    text = await tab.value(f"document.querySelector({json.dumps(f'[data-key={json.dumps(key)}]')}).textContent")
    return str(text).replace("\xa0", " ")


def of_metrics(page: str) -> dict[tuple[str, str], float]:
    """(name, engine or model or window) to value, as a scrape has it."""
    families = text_string_to_metric_families(page)
    return {
        (sample.name.removeprefix("throttllem_"), sample.labels.get(label, "")): sample.value
        for family in families
        for sample in family.samples
        for label in ("engine", "window", "slo", "outcome", "model")
    }


def test_it_shows_the_values_of_metrics() -> None:
    async def run() -> None:
        async with served(Still()) as address, browse(f"{address}/dashboard") as tab:
            await tab.until(LIVE)
            shown_by = of_metrics(await tab.value("fetch('/metrics').then((reply) => reply.text())"))
            tab.requests.remove(f"{address}/metrics")
            engine, tokens = "a100-0", "generated_tokens_total"
            for key, expected in {
                "chart:clock": f"{shown_by['clock_hertz', engine] / 1e6:,.0f} MHz",
                "chart:watts": f"{shown_by['power_watts', engine]:,.0f} W",
                "chart:batch": f"{shown_by['running_requests', engine]:,.0f} requests",
                "chart:kv": f"{shown_by['kv_blocks', engine]:,.0f} blocks",
                "chart:queue": f"{shown_by['queue_requests', 'llama']:,.0f} requests",
                "chart:slo": f"{shown_by['slo_attainment_ratio', 'recent']:.1%}".replace("%", " %"),
                "total_j": f"{shown_by['energy_joules_total', engine] / 1e3:,.1f} kJ",
                "top_j": f"{shown_by['top_clock_energy_joules_total', engine] / 1e3:,.1f} kJ",
                "saved": f"{shown_by['energy_saving_ratio', engine]:.1%}".replace("%", " %"),
                "per_token": f"{shown_by['energy_joules_total', engine] / shown_by[tokens, 'llama']:.3f} J",
                "uncontrolled": f"{shown_by['uncontrolled_requests_total', '']:.0f}",
                "model0:ever:e2e": f"{shown_by['slo_violations_total', 'e2e']:.0f}",
                "model0:recent:with_slo": f"{shown_by['recent_slo_requests', 'llama']:.0f}",
                "model0:arrived": f"{shown_by['arrived_requests_total', 'llama']:,.0f}",
                "model0:rejected": f"{shown_by['requests_total', 'rejected']:.0f}",
                "model0:generated_tokens": f"{shown_by['generated_tokens_total', 'llama']:,.0f}",
                f"engine:{engine}:corrections": f"{shown_by['corrections_total', engine]:.0f}",
                f"engine:{engine}:foreign": f"{shown_by['external_sequences', engine]:.0f}",
                f"engine:{engine}:table": "time +12 %, watts −3 %, corrected ×1.11 (210 to 810 MHz)",
                f"engine:{engine}:switch": "9 ms median of 31, 14 ms assumed (210 to 810 MHz)",
                f"engine:{engine}:drift_kv": f"−{-shown_by['drift_kv_blocks', engine]:.0f} now, "
                f"{shown_by['mean_drift_kv_blocks', engine]:.1f} mean",
            }.items():
                assert await shown(tab, key) == expected, key
            why = await tab.value("document.querySelector('.why').textContent")
            assert "1,065 MHz: one clock lower would violate an SLO. Request 4182 binds." in why
            assert "an end-to-end SLO would be violated. Request 4100 stands in the way." in why
            # The projection lies to the right of now, dashed.
            for chart in ("Batch", "KV cache"):
                ahead = f"document.querySelector('svg[aria-label^=\"{chart}\"] .ahead')"
                now = f"document.querySelector('svg[aria-label^=\"{chart}\"] .nowline')"
                assert await tab.value(f"{ahead}.getBBox().x >= {now}.getBBox().x - 1 && {ahead}.getBBox().width > 20")
                assert await tab.value(f"getComputedStyle({ahead}).strokeDasharray") != "none"
            requested = {request.split("?")[0] for request in tab.requests if not request.startswith("data:")}
            assert requested == {f"{address}/dashboard", f"{address}/dashboard/state"}
            assert tab.errors == []

    asyncio.run(run())


def test_a_table_that_is_far_from_its_engine_is_something_wrong() -> None:
    async def run() -> None:
        assert UP.view is not None
        beyond = replace(UP, trouble=None, view=replace(UP.view, beyond_table=True))
        status = replace(STATUS, models=(replace(MODEL, engines=(beyond,)),))
        async with served(Still(status)) as address, browse(f"{address}/dashboard") as tab:
            await tab.until(LIVE)
            wrong = await tab.value("document.getElementById('answer-wrong').textContent")
            assert "A performance table is wrong" in wrong and UP.name in wrong
        doubtful = replace(STATUS, models=(replace(MODEL, engines=(replace(UP, trouble=None),), doubtful=True),))
        async with served(Still(doubtful)) as address, browse(f"{address}/dashboard") as tab:
            await tab.until(LIVE)
            wrong = await tab.value("document.getElementById('answer-wrong').textContent")
            assert "The control core failed" in wrong and MODEL.names[0] in wrong

    asyncio.run(run())


def test_names_from_engines_are_text() -> None:
    async def run() -> None:
        async with served(Still()) as address, browse(f"{address}/dashboard") as tab:
            await tab.until(LIVE)
            assert await tab.value("document.querySelectorAll('img, main script').length") == 0
            cards = await tab.value("document.getElementById('engines').textContent")
            assert HOSTILE in cards and DOWN.trouble in cards
            assert "1 engine down" in await tab.value("document.getElementById('answer-wrong').textContent")
            assert tab.errors == []

    asyncio.run(run())


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_and_follows_the_scheme(dark: bool, tmp_path: Path) -> None:
    async def run() -> None:
        async with served(Still()) as address, browse(f"{address}/dashboard", dark=dark) as tab:
            await tab.until(LIVE)
            for width in (320, 390, 768, 1280):
                await tab.look(width=width, dark=dark, touch=width < 700)
                wide = "[document.documentElement.scrollWidth, innerWidth]"
                assert await tab.value(wide) == [width, width]
            back = await tab.value("getComputedStyle(document.body).backgroundColor")
            light = sum(int(part) for part in re.findall(r"\d+", back)) > 384
            assert light is not dark
            assert await contrast(tab) == []
            await tab.picture(tmp_path / "page.png")
            assert (tmp_path / "page.png").stat().st_size > 20_000

    asyncio.run(run())


def test_a_gateway_that_does_not_answer_is_shown_and_found_again() -> None:
    async def run() -> None:
        models = Still()
        async with served(models) as address, browse(f"{address}/dashboard") as tab:
            await tab.until(LIVE)
            await tab.cut(away=True)
            await tab.until("!document.getElementById('gone').hidden")
            assert "does not answer (no connection)" in await tab.value("document.getElementById('gone').textContent")
            assert await shown(tab, "chart:clock") == "1,050 MHz", "the last value stays"
            models.gateway = replace(STATUS, models=(replace(MODEL, engines=(replace(UP, clock_mhz=1410),)),))
            await tab.cut(away=False)
            await tab.until("document.getElementById('gone').hidden")
            assert await shown(tab, "chart:clock") == "1,410 MHz"

    asyncio.run(run())


def test_values_can_be_read_by_keyboard_and_pointer() -> None:
    async def run() -> None:
        async with served(Still()) as address, browse(f"{address}/dashboard") as tab:
            await tab.until(LIVE)
            await tab.value("document.querySelector('svg[aria-label^=\"KV\"]').focus()")
            for _ in range(5):
                await tab.do("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
            label = "document.querySelector('svg[aria-label^=\"KV\"]').getAttribute('aria-label')"
            now = "document.querySelector('svg[aria-label^=\"KV\"] .nowline')"
            assert (await tab.value(label)).replace("\xa0", " ") == "KV cache, projected +5 s: 1,500 blocks."
            await tab.do("Input.dispatchKeyEvent", type="keyDown", key="Escape")
            assert (await tab.value(label)).startswith("KV cache: 1,234 blocks.")
            x, y = await tab.value(
                f"(() => {{ const box = {now}.getBoundingClientRect(); return [box.right + 30, box.top + 40] }})()"
            )
            await tab.do("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
            await tab.until(f"{label}.startsWith('KV cache, projected +')")
            await asyncio.sleep(0.05)
            assert await tab.value("document.querySelectorAll('.cross').length") == 2, "on both charts that look ahead"

    asyncio.run(run())


def test_an_empty_gateway_is_no_error() -> None:
    async def run() -> None:
        async with served(Still(EMPTY)) as address, browse(f"{address}/dashboard") as tab:
            await tab.until(LIVE)
            assert "No model is configured" in await tab.value("document.body.innerText")
            assert tab.errors == []

    asyncio.run(run())


async def contrast(tab: Tab) -> list[str]:
    """Texts with less than 4.5:1 to what they stand on (WCAG 2.2, 1.4.3)."""
    script = """(() => {
      const parse = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
      const part = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
      const light = ([red, green, blue]) => 0.2126 * part(red) + 0.7152 * part(green) + 0.0722 * part(blue);
      const ground = (node) => {
        for (; node; node = node.parentElement) {
          const colour = parse(getComputedStyle(node).backgroundColor);
          if (colour.length === 3 || colour[3] > 0) return colour;
        }
      };
      const bad = [];
      for (const node of document.querySelectorAll("body *")) {
        const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
        if (!own || !node.getClientRects().length || ["SCRIPT", "STYLE"].includes(node.tagName)) continue;
        const style = getComputedStyle(node), ink = parse(node instanceof SVGElement ? style.fill : style.color);
        const [one, other] = [light(ink), light(ground(node))];
        const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
        if (ratio < 4.5) bad.push(`${node.tagName} ${node.className} ${node.textContent}: ${ratio.toFixed(2)}`);
      }
      return bad;
    })()"""
    return list(await tab.value(script))
