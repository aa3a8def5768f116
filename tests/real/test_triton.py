"""TritonEngine on the real Triton server: `make engines` installs it, `make test-real` runs this."""

import asyncio
import json
import os
import signal
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from engines.contract import CHECKS, Subject, name_of
from engines.triton_peer import SPEC, answer, call, chunks

from throttllem.engines.base import EngineError, RemoteOptions
from throttllem.engines.triton.engine import TritonEngine
from throttllem.openai_api.requests import COMPLETIONS
from tools.testbed.engines.triton import ModelSpeed, triton

pytestmark = pytest.mark.real
ENVIRONMENT = Path(__file__).parents[2] / ".engines/triton"
SPEED = ModelSpeed(step_s=0.004, max_rows=8, kv_blocks=256)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not ENVIRONMENT.exists():
        pytest.skip("no Triton in .engines: `make engines` installs it")
    with triton(ENVIRONMENT, tmp_path_factory.mktemp("triton"), SPEED) as server:
        yield server


@asynccontextmanager
async def engine_of(server, **options):
    address = {"url": server.url, "metrics_url": server.metrics_url}
    engine = TritonEngine(RemoteOptions(kind="triton", scrape_s=0.02, **address, **options), SPEC)
    try:
        yield engine
    finally:
        await engine.close()


def long(tokens):
    return {"prompt": f"a long answer of {tokens}", "max_tokens": tokens, "min_tokens": tokens, "stream": True}


async def until(holds, seconds=5.0):
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


def test_capacities_come_from_triton(server):
    async def run():
        async with engine_of(server) as engine:
            return await engine.connect()

    connected = asyncio.run(run())
    assert connected.spec == replace(SPEC, kv_blocks=256, block_tokens=64, max_batch=8, no_evict=True)
    assert connected.version.startswith("Triton 2.")


def test_one_event_per_token_and_the_text_of_the_native_path(server):
    async def run():
        async with engine_of(server) as engine:
            await engine.connect()
            native = {"text_input": "hello", "max_tokens": 9, "min_length": 9, "stream": True}
            _, theirs = await answer(engine, "/v2/models/ensemble/generate_stream", native)
            _, ours = await answer(engine, COMPLETIONS, long(9) | {"prompt": "hello"})
            return theirs, ours

    theirs, ours = asyncio.run(run())
    tokens = [json.loads(line[6:])["text_output"] for line in theirs.split(b"\n\n")[:-1]]
    assert len(tokens) == 9
    assert [chunk["choices"][0]["text"] for chunk in chunks(ours)] == tokens
    assert chunks(ours)[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("path", ["generate", "generate_stream", "infer"])
def test_native_bytes_are_the_same_as_directly(server, path):
    body = json.dumps(
        {"text_input": "fail after 3" if path == "generate" else "hello", "max_tokens": 5, "stream": True}
    )

    async def run():
        async with engine_of(server) as engine, aiohttp.ClientSession() as session:
            through = await answer(engine, f"/v2/models/ensemble/{path}", body.encode())
            async with session.post(f"{server.url}/v2/models/ensemble/{path}", data=body) as response:
                return through, (response.status, await response.read())

    through, directly = asyncio.run(run())
    assert through == directly


def test_stop_words_seeds_and_refusals(server):
    async def run():
        async with engine_of(server) as engine:
            await engine.connect()
            stopped = await answer(engine, COMPLETIONS, {"prompt": "hello", "stop": ["ve"], "max_tokens": 40})
            seeds = [await answer(engine, COMPLETIONS, {"prompt": "hello", "seed": seed}) for seed in (1, 1, 2)]
            refused = await answer(engine, COMPLETIONS, {"prompt": "hello", "frequency_penalty": 0.5})
            too_long = await answer(engine, COMPLETIONS, {"prompt": "hello", "max_tokens": 10**6})
            return stopped, seeds, refused, too_long

    stopped, seeds, refused, too_long = asyncio.run(run())
    choice = json.loads(stopped[1])["choices"][0]
    assert choice["finish_reason"] == "stop" and "ve" not in choice["text"]
    texts = [json.loads(body)["choices"][0]["text"] for _, body in seeds]
    assert texts[0] == texts[1] != texts[2]
    assert refused[0] == 400 and json.loads(refused[1])["error"]["param"] == "frequency_penalty"
    assert too_long[0] == 400 and "KV cache" in json.loads(too_long[1])["error"]["message"]


def test_a_failure_of_the_model_is_told_in_the_stream(server):
    async def run():
        async with engine_of(server) as engine:
            return await answer(engine, COMPLETIONS, {"prompt": "fail after 2", "stream": True})

    status, data = asyncio.run(run())
    *texts, error = chunks(data)
    assert (status, len(texts)) == (200, 2)
    assert "as it was asked to" in error["error"]["message"] and b"[DONE]" not in data


def test_leaving_early_frees_the_place_in_triton(server):
    async def run():
        reports = []
        async with engine_of(server) as engine:
            await engine.connect()
            watch = asyncio.create_task(engine.watch(reports.append))
            async with engine.open(call(COMPLETIONS, long(2000))) as reply:
                await reply.read()
                await until(lambda: reports and reports[-1].running == 1)
                held = reports[-1].kv_blocks
            await until(lambda: reports[-1].running == 0)
            watch.cancel()
            return held, reports[-1].kv_blocks, await answer(engine, COMPLETIONS, {"prompt": "next"})

    held, after, following = asyncio.run(run())
    assert held >= 2000 / 64 and after == 0
    assert following[0] == 200


def test_requests_run_side_by_side(server):
    async def run():
        reports = []
        async with engine_of(server) as engine:
            await engine.connect()
            watch = asyncio.create_task(engine.watch(reports.append))
            found = await asyncio.gather(*(answer(engine, COMPLETIONS, long(60)) for _ in range(12)))
            await until(lambda: reports[-1].running == 0)
            watch.cancel()
            return found, reports

    found, reports = asyncio.run(run())
    assert [len(chunks(data)) for _, data in found] == [60] * 12
    assert max(report.running for report in reports) == SPEED.max_rows
    assert max(report.waiting for report in reports) == 12 - SPEED.max_rows


def test_a_server_that_dies_is_an_error_everywhere(tmp_path):
    if not ENVIRONMENT.exists():
        pytest.skip("no Triton in .engines: `make engines` installs it")

    async def run(server):
        async with engine_of(server) as engine:
            await engine.connect()
            watch = asyncio.create_task(engine.watch(lambda report: None))
            errors = []
            for _ in range(2):
                try:
                    async with engine.open(call(COMPLETIONS, long(2000))) as reply:
                        while await reply.read():
                            os.kill(server.process.pid, signal.SIGKILL)
                except EngineError as error:
                    errors.append(error.status)
            with pytest.raises(EngineError):
                await watch
            return errors

    with triton(ENVIRONMENT, tmp_path, SPEED) as server:
        assert asyncio.run(run(server)) == [502, 502]


@pytest.mark.parametrize("check", CHECKS[:-2], ids=name_of)
def test_the_contract_of_engines(server, check):
    async def run():
        async with engine_of(server) as engine:

            async def kill():
                raise AssertionError("a check that is not among the last two ends the engine")

            await asyncio.wait_for(check(Subject(engine=engine, kill=kill)), 30)

    asyncio.run(run())


@pytest.mark.parametrize("check", CHECKS[-2:], ids=name_of)
def test_the_contract_of_engines_that_end(check, tmp_path):
    if not ENVIRONMENT.exists():
        pytest.skip("no Triton in .engines: `make engines` installs it")

    async def run(server):
        async with engine_of(server) as engine:

            async def kill():
                os.kill(server.process.pid, signal.SIGKILL)

            await asyncio.wait_for(check(Subject(engine=engine, kill=kill)), 60)

    with triton(ENVIRONMENT, tmp_path, SPEED) as server:
        asyncio.run(run(server))
