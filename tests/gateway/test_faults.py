"""Faults in detail, around a whole gateway with real HTTP on both sides.

The catalogue of faults is in `tools/evaluation/faults`; `tests/real/test_faults.py` runs it on processes.
"""

import asyncio
import logging
from dataclasses import replace

import pytest
from core.toy import spec, table

from tests.gateway.peer import Peer, answers, stream_and_whole, until, whole, with_peer
from throttllem.config import Options, ServerOptions
from throttllem.gateway.run import run_gateway
from throttllem.gateway.telemetry.dashboard import totals
from throttllem.gateway.telemetry.status import gateway_status
from throttllem.profiling.storage import save_table
from tools.testbed.engines.garbage_engine import CHUNK, GarbageEngine, garbage_engine

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
    ("root", "gpu", "lacks"),
    [
        ("Qwen/Qwen3-8B", "l40s-48gb", None),
        ("someone/secret-7b", "l40s-48gb", "whose figures are not known"),
        ("Qwen/Qwen3-8B", None, "no GPU is named"),
    ],
)
def test_no_joules_are_shown_of_a_model_or_a_gpu_that_is_not_known(tmp_path, root, gpu, lacks):
    known = lacks is None

    async def check(there, peer):
        answer = await there.client.ask(tokens=3)
        status = gateway_status(there.gateway.models)
        _, page = await there.client.get("/metrics")
        return answer.served, status.models[0].engines[0], totals(status), page

    settings = () if gpu is None else (f"engines.0.gpu={gpu}",)

    async def main():
        async with Peer() as peer:
            peer.models = [{"id": "tiny", "root": root, "max_model_len": 4096}]
            async with whole(tmp_path, *settings, url=peer.url) as there:
                await there.up()
                return await check(there, peer)

    served, engine, sums, page = asyncio.run(main())
    assert served, "it serves all the same"
    assert known == (engine.energy.watts is not None) == (sums.total_j is not None)
    assert known == (sums.joules_per_token is not None)
    assert ("throttllem_energy_joules_total{" in page) == ("throttllem_power_watts{" in page) == known
    assert lacks is None or any(lacks in note for note in engine.notes)


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
    assert 'throttllem_external_sequences{engine="openai-tp1",model="tiny"} 3.0' in page
    assert caplog.text.count("not ours") == 1


# ---- the gateway ---------------------------------------------------------------------------------------------


def test_a_taken_port_is_named_before_anything_is_built(tmp_path):
    async def main():
        async with whole(tmp_path) as there:
            port = int(there.client.url.rpartition(":")[2])
            options = Options(server=ServerOptions(port=port), state_dir=tmp_path / "other")
            with pytest.raises(OSError, match=f"server.port = {port}: cannot listen"):
                run_gateway(options, tmp_path)
            assert not options.state_dir.exists()

    asyncio.run(main())


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
