import asyncio
import contextlib
import socket
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from aiohttp import web

from tests.engines.upstreams import call, eventually
from tests.engines.vllm_peer import VllmPeer, connected, engine_of
from throttllem.engines.base import EngineError
from throttllem.engines.step_reports import StepStats
from throttllem.openai_api.requests import COMPLETIONS, Api, ParsedRequest


@asynccontextmanager
async def watching(engine):
    reports = []
    task = asyncio.create_task(engine.watch(reports.append))
    try:
        yield reports, task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, EngineError):
            await task


def test_scrapes_without_the_plugin():
    async def run():
        peer = VllmPeer()
        async with engine_of(peer) as engine, watching(engine) as (reports, _):
            await eventually(lambda: reports)
            assert (reports[0].running, reports[0].waiting, reports[0].kv_blocks, reports[0].step) == (0, 0, 0, None)
            peer.running, peer.waiting, peer.usage, peer.iterations = 3, 2, 0.5, 10
            await eventually(lambda: reports[-1].running == 3)
            assert (reports[-1].waiting, reports[-1].kv_blocks, reports[-1].step) == (2, 2048, 9)

    asyncio.run(run())


def test_steps_of_the_plugin_and_scrapes_while_it_is_silent(tmp_path):
    address = str(tmp_path / "steps")
    step = StepStats(boot=7, sequence=1, step=41, monotonic_s=time.monotonic(), running=5, waiting=0, kv_usage=0.5)

    async def run():
        peer = VllmPeer()
        peer.info = {"engines": 1, "servers": 1, "stats": address}
        async with engine_of(peer, stats=address) as engine:
            assert (await engine.connect()).notes == ()
            async with watching(engine) as (reports, _):
                await eventually(lambda: reports)
                assert (await engine.connect()).notes == ()
                peer.iterations = 77
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                    sender.sendto(step.pack(), address)
                await eventually(lambda: any(report.step is not None for report in reports))
                (numbered,) = [report for report in reports if report.step is not None]
                assert (numbered.step, numbered.running, numbered.kv_blocks) == (41, 5, 2048)
                await eventually(lambda: reports[-1].step is None)
                assert engine.steps.received == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("info", "words"),
    [(None, "is not installed"), ({"engines": 1, "servers": 1, "stats": "/else/where"}, "sends to '/else/where'")],
)
def test_a_missing_plugin_is_noted(tmp_path, info, words):
    peer = VllmPeer()
    peer.info = info
    notes = connected(peer, stats=str(tmp_path / "steps")).notes
    assert words in notes[-1]
    assert f"THROTTLLEM_STATS={tmp_path / 'steps'}" in notes[-1]


def test_a_second_gateway_on_the_engine_is_noted(tmp_path):
    address = str(tmp_path / "steps")
    peer = VllmPeer()
    peer.info = {"engines": 1, "servers": 1, "stats": address}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(address)
        assert "another gateway" in connected(peer, stats=address).notes[-1]


def test_a_folder_of_others_is_no_second_gateway(tmp_path):
    peer = VllmPeer()
    peer.info = {"engines": 1, "servers": 1, "stats": str(tmp_path / "open/steps")}
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    note = connected(peer, stats=peer.info["stats"]).notes[-1]
    assert "chmod go-w" in note and "another gateway" not in note


def test_paths_are_compared_as_absolute_ones(tmp_path, monkeypatch):
    def noted(sent_to):
        peer.info = {"engines": 1, "servers": 1, "stats": sent_to}
        return connected(peer, stats="./steps").notes

    peer = VllmPeer()
    monkeypatch.chdir(tmp_path)
    assert noted(f"{tmp_path}/steps") == ()
    (elsewhere,) = noted("./steps")
    assert f"sends to './steps': start vLLM with THROTTLLEM_STATS={tmp_path}/steps" in elsewhere
    assert len(noted("/else/steps")) == 1


def test_over_udp_the_note_names_both_variables():
    peer = VllmPeer()
    assert "THROTTLLEM_STATS=127.0.0.1:9 THROTTLLEM_STATS_SECRET=" in connected(peer, stats="127.0.0.1:9").notes[-1]


def test_an_address_that_is_none_is_refused():
    peer = VllmPeer()
    peer.info = {"engines": 1, "servers": 1, "stats": "192.0.2.1:1"}
    with pytest.raises(EngineError, match="this machine only"):
        connected(peer, stats="192.0.2.1:1")


def gone(change, **options):
    """How `watch` ends after `change(peer)`."""

    async def run():
        peer = VllmPeer()
        async with engine_of(peer, **options) as engine, watching(engine) as (reports, task):
            await eventually(lambda: reports)
            change(peer)
            with pytest.raises(EngineError) as raised:
                await asyncio.wait_for(task, 5)
            return str(raised.value)

    return asyncio.run(run())


def test_a_restarted_engine_is_gone():
    assert "restarted" in gone(lambda peer: setattr(peer, "started", 200.0))


def test_an_engine_whose_metrics_fail_is_gone():
    assert "no longer report" in gone(lambda peer: setattr(peer, "metrics", False))


def test_one_failed_scrape_is_forgiven():
    async def run():
        peer, pages = VllmPeer(), []

        async def flaky(request):
            pages.append(len(pages))
            return web.Response(text=peer.page(), status=500 if len(pages) in {3, 4, 6, 7} else 200)

        async with engine_of(peer, {("GET", "/metrics"): flaky}) as engine, watching(engine) as (reports, task):
            await eventually(lambda: len(pages) > 10)
            assert not task.done()
            assert len(reports) >= 4

    asyncio.run(run())


def test_an_engine_without_metrics_is_checked_for_life():
    async def run():
        peer = VllmPeer()
        peer.metrics = False
        async with engine_of(peer, kv_blocks=10, max_batch=1) as engine, watching(engine) as (reports, task):
            await asyncio.sleep(0.05)
            assert (task.done(), reports) == (False, [])
            peer.models_status = 500
            with pytest.raises(EngineError, match="answers 500"):
                await asyncio.wait_for(task, 5)

    asyncio.run(run())


def test_bytes_go_on_and_come_back_unchanged():
    async def run():
        seen = []

        async def answer(request):
            seen.append(await request.read())
            return web.Response(body=b'data: {"x": 1}\n\n', content_type="text/event-stream", status=503)

        async with engine_of(VllmPeer(), {("POST", "/v1/completions"): answer}) as engine:
            async with engine.open(call(body=b'{ "model":"tiny"}')) as reply:
                data = await reply.body()
            assert (reply.status, data, seen) == (503, b'data: {"x": 1}\n\n', [b'{ "model":"tiny"}'])

    asyncio.run(run())


def test_a_health_check_changes_nothing_of_how_prompts_are_counted():
    async def run():
        peer = VllmPeer()
        request = ParsedRequest(
            api=Api.COMPLETIONS, path=COMPLETIONS, model="tiny", fields={}, body=b"", prompts=("a b c",)
        )
        async with engine_of(peer) as engine:
            await engine.connect()
            await engine.count(request)
            asked = len(peer.asked)
            peer.tokenize = False
            await engine.well()
            peer.tokenize = True
            found = [await engine.count(request), await engine.count(replace(request, prompts=("a b c d",)))]
            return [(count.tokens, count.exact) for count in found], len(peer.asked) - asked

    assert asyncio.run(run()) == ([(3, True), (4, True)], 1)


@pytest.mark.parametrize(("health", "well"), [(200, True), (404, True), (500, False), (503, False)])
def test_it_is_healthy_unless_it_answers_otherwise(health, well):
    async def run():
        peer = VllmPeer()
        async with engine_of(peer) as engine:
            peer.health = health
            try:
                await engine.well()
            except EngineError as error:
                assert (error.status, error.unreachable) == (503, False)
                return False
            return True

    assert asyncio.run(run()) == well


def test_a_refused_connection_is_unreachable():
    async def run():
        peer = VllmPeer()
        async with engine_of(peer) as engine:
            pass
        with pytest.raises(EngineError) as found:
            await engine.well()
        await engine.close()
        return found.value.unreachable

    assert asyncio.run(run()) is True
