"""Faults around a whole gateway: whoever asked hears its end once, and nothing is left. Real HTTP on both sides."""

import asyncio
import logging
import resource
from dataclasses import replace

import pytest
from core.toy import spec, table

from tests.gateway.peer import Peer, asks, told, until, whole, with_peer
from throttllem.config import Options, ServerOptions
from throttllem.gateway.run import run_gateway
from throttllem.profiling.storage import save_table
from tools.evaluation.fault_client import tallied
from tools.evaluation.garbage_engine import ANSWERS, CHUNK, PAGES, GarbageEngine, garbage_engine

GOOD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + CHUNK + b"data: [DONE]\n\n"


def codes(answers):
    return {(answer.error or {}).get("code") for answer in answers}


# ---- engines -------------------------------------------------------------------------------------------------


def test_engine_is_killed_in_mid_stream_and_comes_back_on_its_port(tmp_path):
    async def check(there, peer):
        running = asks(there, 4, 10**6 // 500)
        await until(lambda: peer.open == 4)
        queued = asks(there, 4, 3)
        await until(lambda: there.loop.controller.snapshot().queue == 4)
        await peer.kill()
        lost = await told(running)
        assert not any(answer.served for answer in lost), tallied(lost)
        assert not any(task.done() for task in queued)
        await peer.start()
        answers = await told(queued)
        assert all(answer.served for answer in answers), tallied(answers)

    with_peer(check, tmp_path, "engines.0.max_batch=4")


def test_no_engine_comes_back_in_time(tmp_path):
    async def check(there, peer):
        await peer.kill()
        answers = await told(asks(there, 4, 3))
        await peer.start()
        return answers

    answers = with_peer(check, tmp_path, "limits.engine_wait_s=0.3")
    assert {answer.status for answer in answers} <= {502, 503}


def test_engine_starts_after_the_gateway(tmp_path):
    async def main():
        peer = Peer()
        async with peer:
            pass  # its port is known now
        async with whole(tmp_path, url=peer.url) as there:
            asked = asks(there, 4, 3)
            await asyncio.sleep(0.05)
            assert not any(task.done() for task in asked)
            async with peer:
                assert all(answer.served for answer in await told(asked))
                await there.empty(peer)

    asyncio.run(main())


def test_engine_stalls_for_a_while_and_for_too_long(tmp_path):
    async def check(there, peer):
        asked = asks(there, 4, 30)
        await until(lambda: peer.open == 4)
        peer.held.clear()
        await asyncio.sleep(0.05)
        peer.held.set()
        assert all(answer.served for answer in await told(asked))
        asked = asks(there, 4, 2000)
        await until(lambda: peer.open == 4)
        peer.held.clear()
        answers = await told(asked)
        await until(lambda: not peer.open)
        peer.held.set()
        return answers

    assert codes(with_peer(check, tmp_path, "limits.silence_s=0.4")) == {"engine_silent"}


def test_engine_answers_garbage(tmp_path):
    async def main():
        engine = GarbageEngine(answer=GOOD)
        async with garbage_engine(engine) as url, whole(tmp_path, url=url) as there:
            await there.up()
            for name, answer in ({**ANSWERS, "endless headers": None}).items():
                engine.answer = answer
                for task in asks(there, 2, 3):
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
            return await told(asks(there, 2, 3))

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
def test_what_the_engine_itself_calls_an_error_is_a_broken_promise(tmp_path, answer):
    async def main():
        engine = GarbageEngine(answer=answer)
        async with garbage_engine(engine) as url, whole(tmp_path, "slo.e2e_s=60", url=url) as there:
            await there.up()
            answers = [await there.client.ask(stream=True) for _ in range(2)]
            await until(lambda: there.loop.slo_attainment.ever.with_slo == 2)
            await until(lambda: not any(there.held()))
            return answers, there.loop.slo_attainment.ever.met

    answers, kept = asyncio.run(main())
    assert [found.body for found in answers] == [answer.partition(b"\r\n\r\n")[2]] * 2
    assert kept == 0


@pytest.mark.parametrize(
    "name", ["JSON of another shape in /v1/models", "no numbers in /metrics", "no count in /tokenize"]
)
def test_engine_tells_garbage_of_itself(tmp_path, name):
    path, page = PAGES[name]

    async def main():
        engine = GarbageEngine(answer=GOOD, pages={path: page})
        async with garbage_engine(engine) as url, whole(tmp_path, "limits.engine_wait_s=0.2", url=url) as there:
            await told(asks(there, 1, 3))
            engine.pages.clear()
            await until(lambda: there.backend.state == "up")
            engine.pages[path] = page
            await asyncio.sleep(0.05)
            engine.pages.clear()
            await there.empty()

    asyncio.run(main())


def test_another_gateway_on_the_engine_is_said_aloud(tmp_path, caplog):
    async def check(there, peer):
        peer.open += 3
        await until(lambda: "3 sequences in it are not ours" in caplog.text)
        status = there.gateway.models.status().models[0].engines[0]
        _, page = await there.client.get("/metrics")
        peer.open -= 3
        return status.notes, page

    with caplog.at_level(logging.WARNING):
        notes, page = with_peer(check, tmp_path)
    assert any("not ours" in note for note in notes)
    assert 'throttllem_foreign_sequences{engine="openai-llama-3-8b-tp1",model="tiny"} 3.0' in page
    assert caplog.text.count("not ours") == 1


# ---- the gateway ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("drain_s", "code"), [(5, None), (0.05, "draining")])
def test_stop_under_load(tmp_path, drain_s, code):
    async def main():
        async with Peer() as peer, whole(tmp_path, f"limits.drain_s={drain_s}", url=peer.url) as there:
            await there.up()
            asked = asks(there, 4, 300 if code is None else 2000)
            await until(lambda: peer.open == 4)
            there.stop.set()
            await until(lambda: len(there.said) > 3)
            late = await there.client.ask(tokens=3)
            answers = await told(asked)
            await asyncio.wait_for(there.serving, 5)
            assert not any(there.held())
            await until(lambda: not peer.open)
            return late, answers

    late, answers = asyncio.run(main())
    assert late.status in (503, None)
    assert codes(answers) == {code}


def test_taken_port_is_named_before_anything_is_built(tmp_path):
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
                    assert all(answer.served for answer in await told(asks(there, 4, 5)))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            await there.empty()

    asyncio.run(main())
    assert caplog.text.count("flight recorder") == 1


def test_clock_that_cannot_be_set(tmp_path, caplog):
    def stick(gateway):
        async def stuck(mhz, sent=None):
            raise OSError("the loop says no")

        gateway.models.served[0].loop.backends[0].gpu.set_clock = stuck

    async def main():
        clocks_mhz = (600, 810, 1005, 1200, 1410)  # those of the toy, as this GPU has them
        save_table(replace(table(spec()), clocks_mhz=clocks_mhz), tmp_path / "table-tp1.npz")
        settings = ("policy=least-energy", f"engines.0.tables={tmp_path}")
        async with whole(tmp_path, *settings, adjust=stick) as there:
            await there.up()
            assert all(answer.served for answer in await told(asks(there, 6, 20)))
            view = there.loop.controller.snapshot().engines[0]
            status = there.gateway.models.status().models[0].engines[0]
            await there.empty()
            return view, status

    view, status = asyncio.run(main())
    assert (view.plan.mhz, view.clock_mhz) == (1410, None), view.plan
    assert "the loop says no" in status.trouble and "was not set" in caplog.text
