"""Faults around a whole gateway: every client gets one end, and nothing is left. Real HTTP on both sides."""

import asyncio
import logging
import resource
from dataclasses import replace

import pytest
from core.toy import spec, table

from tests.gateway.peer import Peer, answers, stream_and_whole, until, whole, with_peer
from throttllem.config import Options, ServerOptions
from throttllem.gateway.run import run_gateway
from throttllem.gateway.telemetry.status import gateway_status
from throttllem.profiling.storage import save_table
from tools.testbed.client import tallied
from tools.testbed.engines.garbage_engine import ANSWERS, CHUNK, PAGES, GarbageEngine, garbage_engine

GOOD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + CHUNK + b"data: [DONE]\n\n"


def codes(found):
    return {(answer.error or {}).get("code") for answer in found}


# ---- engines -------------------------------------------------------------------------------------------------


def test_engine_is_killed_in_mid_stream_and_comes_back_on_its_port(tmp_path):
    async def check(there, peer):
        running = stream_and_whole(there, 4, 10**6 // 500)
        await until(lambda: peer.open == 4)
        queued = stream_and_whole(there, 4, 3)
        await until(lambda: there.loop.controller.snapshot().queue == 4)
        await peer.kill()
        lost = await answers(running)
        assert not any(answer.served for answer in lost), tallied(lost)
        assert not any(task.done() for task in queued)
        await peer.start()
        found = await answers(queued)
        assert all(answer.served for answer in found), tallied(found)

    with_peer(check, tmp_path, "engines.0.max_batch=4")


def test_no_engine_comes_back_in_time(tmp_path):
    async def check(there, peer):
        await peer.kill()
        found = await answers(stream_and_whole(there, 4, 3))
        await peer.start()
        return found

    found = with_peer(check, tmp_path, "limits.engine_wait_s=0.3")
    assert {answer.status for answer in found} <= {502, 503}


def test_engine_starts_after_the_gateway(tmp_path):
    async def main():
        peer = Peer()
        async with peer:
            pass  # its port is known now
        async with whole(tmp_path, url=peer.url) as there:
            requests = stream_and_whole(there, 4, 3)
            await asyncio.sleep(0.05)
            assert not any(task.done() for task in requests)
            async with peer:
                assert all(answer.served for answer in await answers(requests))
                await there.empty(peer)

    asyncio.run(main())


def test_engine_stalls_for_a_while_and_for_too_long(tmp_path):
    async def check(there, peer):
        requests = stream_and_whole(there, 4, 30)
        await until(lambda: peer.open == 4)
        peer.held.clear()
        await asyncio.sleep(0.05)
        peer.held.set()
        assert all(answer.served for answer in await answers(requests))
        requests = stream_and_whole(there, 4, 2000)
        await until(lambda: peer.open == 4)
        peer.held.clear()
        found = await answers(requests)
        await until(lambda: not peer.open)
        peer.held.set()
        return found

    assert codes(with_peer(check, tmp_path, "limits.silence_s=0.4")) == {"engine_silent"}


def test_engine_answers_garbage(tmp_path):
    async def main():
        engine = GarbageEngine(answer=GOOD)
        async with garbage_engine(engine) as url, whole(tmp_path, url=url) as there:
            await there.up()
            for name, answer in ({**ANSWERS, "endless headers": None}).items():
                engine.answer = answer
                for task in stream_and_whole(there, 2, 3):
                    found = await task
                    assert found.body == b"<html>" or found.check() is None, name
                engine.answer = GOOD
                await there.empty()

    asyncio.run(main())


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


@pytest.mark.parametrize(
    ("answer", "served"),
    [
        (STREAM + b"transfer-encoding: chunked\r\n\r\ne\r\ndata: [DONE]\n\n\r\n", True),
        (STREAM + b"content-length: 999\r\n\r\ndata: [DONE]\n\n", True),
        (STREAM + b"content-length: 999\r\n\r\n" + CHUNK, False),
    ],
    ids=["after its end", "after its end, of another length", "before its end"],
)
def test_stream_breaks_off(tmp_path, answer, served):
    async def main():
        engine = GarbageEngine(answer=answer)
        async with garbage_engine(engine) as url, whole(tmp_path, url=url) as there:
            await there.up()
            return await answers(stream_and_whole(there, 2, 3))

    for found in asyncio.run(main()):
        assert found.broken is None and (found.served, found.error is None) == (served, served), found


@pytest.mark.parametrize(
    "answer",
    [
        STREAM + b"connection: close\r\n\r\n" + CHUNK + b'data: {"error": {"message": "dead"}}\n\ndata: [DONE]\n\n',
        b'HTTP/1.1 500 Oh\r\ncontent-length: 32\r\n\r\n{"error": {"message": "broken"}}',
    ],
    ids=["in its stream", "by its status"],
)
def test_an_error_that_the_engine_sends_violates_the_slo(tmp_path, answer):
    async def main():
        engine = GarbageEngine(answer=answer)
        async with garbage_engine(engine) as url, whole(tmp_path, "slo.e2e_s=60", url=url) as there:
            await there.up()
            found = [await there.client.ask(stream=True) for _ in range(2)]
            await until(lambda: there.loop.slo_attainment.ever.with_slo == 2)
            await until(lambda: not any(there.held()))
            return found, there.loop.slo_attainment.ever.met

    found, met = asyncio.run(main())
    assert [each.body for each in found] == [answer.partition(b"\r\n\r\n")[2]] * 2
    assert met == 0


@pytest.mark.parametrize(
    "name", ["JSON of another shape in /v1/models", "no numbers in /metrics", "no count in /tokenize"]
)
def test_engine_reports_garbage_of_itself(tmp_path, name):
    path, page = PAGES[name]

    async def main():
        engine = GarbageEngine(answer=GOOD, pages={path: page})
        async with garbage_engine(engine) as url, whole(tmp_path, "limits.engine_wait_s=0.2", url=url) as there:
            await answers(stream_and_whole(there, 1, 3))
            engine.pages.clear()
            await until(lambda: there.backend.state == "up")
            engine.pages[path] = page
            await asyncio.sleep(0.05)
            engine.pages.clear()
            await there.empty()

    asyncio.run(main())


def test_another_gateway_on_the_engine_is_logged_and_shown(tmp_path, caplog):
    async def check(there, peer):
        peer.open += 3
        await until(lambda: "3 sequences in it are not ours" in caplog.text)
        status = gateway_status(there.gateway.models).models[0].engines[0]
        _, page = await there.client.get("/metrics")
        peer.open -= 3
        return status.notes, page

    with caplog.at_level(logging.WARNING):
        notes, page = with_peer(check, tmp_path)
    assert any("not ours" in note for note in notes)
    assert 'throttllem_external_sequences{engine="openai-llama-3-8b-tp1",model="tiny"} 3.0' in page
    assert caplog.text.count("not ours") == 1


# ---- the gateway ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("drain_s", "code"), [(5, None), (0.05, "draining")])
def test_stop_under_load(tmp_path, drain_s, code):
    async def main():
        async with Peer() as peer, whole(tmp_path, f"limits.drain_s={drain_s}", url=peer.url) as there:
            await there.up()
            requests = stream_and_whole(there, 4, 300 if code is None else 2000)
            await until(lambda: peer.open == 4)
            there.stop.set()
            await until(lambda: len(there.messages) > 3)
            late = await there.client.ask(tokens=3)
            found = await answers(requests)
            await asyncio.wait_for(there.serving, 5)
            assert not any(there.held())
            await until(lambda: not peer.open)
            return late, found

    late, found = asyncio.run(main())
    assert late.status in (503, None)
    assert codes(found) == {code}


def test_a_taken_port_is_named_before_anything_is_built(tmp_path):
    async def main():
        async with whole(tmp_path) as there:
            port = int(there.client.url.rpartition(":")[2])
            options = Options(server=ServerOptions(port=port), state_dir=tmp_path / "other")
            with pytest.raises(OSError, match=f"server.port = {port}: cannot listen"):
                run_gateway(options, tmp_path)
            assert not options.state_dir.exists()

    asyncio.run(main())


def test_full_disk_under_the_recorder(tmp_path, caplog):
    async def main():
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        async with whole(tmp_path, "recorder.enabled=true") as there:
            await there.up()
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
            try:
                while "flight recorder" not in caplog.text:
                    assert all(answer.served for answer in await answers(stream_and_whole(there, 4, 5)))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            await there.empty()

    asyncio.run(main())
    assert caplog.text.count("flight recorder") == 1


def test_clock_that_cannot_be_set(tmp_path, caplog):
    def stick(gateway):
        async def stuck(mhz, sent=None):
            raise OSError("not permitted")

        gateway.models.served[0].loop.backends[0].gpu.set_clock = stuck

    async def main():
        clocks_mhz = (600, 810, 1005, 1200, 1410)  # those of the toy, as this GPU has them
        save_table(replace(table(spec()), clocks_mhz=clocks_mhz), tmp_path / "table-tp1.npz")
        settings = ("policy=least-energy", f"engines.0.tables={tmp_path}")
        async with whole(tmp_path, *settings, adjust=stick) as there:
            await there.up()
            assert all(answer.served for answer in await answers(stream_and_whole(there, 6, 20)))
            view = there.loop.controller.snapshot().engines[0]
            status = gateway_status(there.gateway.models).models[0].engines[0]
            await there.empty()
            return view, status

    view, status = asyncio.run(main())
    assert (view.plan.mhz, view.clock_mhz) == (1410, None), view.plan
    assert "not permitted" in status.trouble and "was not set" in caplog.text
