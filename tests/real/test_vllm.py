"""OpenaiEngine and the plug-in on a real vLLM: `make engines` installs it, `make test-real` runs this."""

import asyncio
import json
import re
import time
from contextlib import asynccontextmanager

import aiohttp
import pytest

from tests.engines.contract import CHECKS, Subject, events_of, name_of, text_of
from tests.engines.upstreams import call, eventually, whole
from tests.real.vllm import DEADLY, body, engine_of, started, watched
from throttllem.engines.capacity import total
from throttllem.openai_api.requests import CHAT, COMPLETIONS, parse_request
from tools.testbed.engines.vllm import MODEL

pytestmark = pytest.mark.real
OUTPUT_TOKENS = 400


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with started(model, tmp_path_factory.mktemp("vllm")) as pair:
        yield pair


# ---- the contract --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [check for check in CHECKS if check not in DEADLY], ids=name_of)
@pytest.mark.parametrize("steps", [True, False], ids=["plugin", "scrapes"])
def test_contract(check, steps, server):
    there, address = server

    async def run():
        async with engine_of(there.url, stats=address if steps else None) as engine:
            await asyncio.wait_for(check(Subject(engine=engine, kill=None)), 60)

    asyncio.run(run())


# ---- what it tells -------------------------------------------------------------------------------------------


def test_capacities_are_read_not_configured(server):
    there, address = server

    async def run():
        async with engine_of(there.url, stats=address) as engine:
            return await engine.connect()

    found = asyncio.run(run())
    spec = found.spec
    assert (spec.kv_blocks, spec.block_tokens, spec.max_batch) == (4095, 128, 64)
    assert (spec.max_context_tokens, spec.prefill_budget_tokens, spec.chunked) == (4096, 2048, True)
    assert (found.models, found.version, found.notes) == ((MODEL,), "0.32.0", ())


def test_without_the_plugin_development_mode_tells_the_batch(server):
    there, _ = server

    async def run():
        url = f"{there.url}/server_info?config_format=json"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return (await response.json())["vllm_config"]["scheduler_config"]["max_num_seqs"]

    assert asyncio.run(run()) == 64


def test_prompts_are_counted_as_the_engine_counts(server, model):
    there, _ = server

    async def run():
        async with engine_of(there.url, tokenizer=model / "tokenizer.json") as engine:
            assert not [note for note in (await engine.connect()).notes if "does not count" in note]
            for text in ("x", "def f(x):\n    return 2 * x  # déjà vu, 東京", "word " * 300):
                fields = {"model": MODEL, "prompt": text}
                count = await engine.count(parse_request(COMPLETIONS, json.dumps(fields).encode()))
                _, data = await whole(engine, call(body=body(1, stream=False, prompt=text)))
                assert (count.tokens, count.exact) == (json.loads(data)["usage"]["prompt_tokens"], True)
            chat = {"model": MODEL, "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 1}
            content = json.dumps(chat).encode()
            count = await engine.count(parse_request(CHAT, content))
            _, data = await whole(engine, call(CHAT, content))
            assert (count.tokens, count.by) == (json.loads(data)["usage"]["prompt_tokens"], "the engine")

    asyncio.run(run())


def test_steps_agree_with_the_streams_and_the_metrics(server):
    there, address = server

    async def run():
        async with engine_of(there.url, stats=address) as engine, watched(engine) as (told, _):
            before = total(await page(there.url), "vllm:iteration_tokens_total_count")
            told.clear()
            prompts = [f"number {index} " * 20 for index in range(16)]
            # The first must run until the last has come to it, also where a step takes a millisecond.
            await asyncio.gather(*(whole(engine, call(body=body(OUTPUT_TOKENS, prompt=prompt))) for prompt in prompts))
            await eventually(lambda: told[-1].running == 0)
            await asyncio.sleep(0.3)
            after = total(await page(there.url), "vllm:iteration_tokens_total_count")
            steps = [report for report in told if report.step is not None]
            assert engine.steps.garbage == engine.steps.other_boots == 0
            numbers = [report.step for report in steps]
            assert numbers == sorted(set(numbers))
            # What is lost on the way is seen as a gap, and the numbers stay right.
            assert numbers[-1] - numbers[0] + 1 <= len(steps) + engine.steps.lost
            assert abs((numbers[-1] - numbers[0] + 1) - (after - before)) <= 1
            if not engine.steps.lost:
                assert sum(report.generated_tokens for report in steps) == 16 * OUTPUT_TOKENS
            assert max(report.running for report in steps) == 16
            assert (steps[-1].running, steps[-1].waiting, steps[-1].kv_blocks) == (0, 0, 0)
            assert all(0 < report.seconds < 5 for report in steps if report.seconds is not None)

    asyncio.run(run())


async def page(url):
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
        return await response.read()


def test_blocks_in_use_are_those_of_the_requests(server):
    there, address = server

    async def run():
        async with engine_of(there.url, stats=address) as engine, watched(engine) as (told, _):
            told.clear()
            ids = list(range(10, 310))
            await whole(engine, call(body=body(100, prompt=ids)))
            await eventually(lambda: told and told[-1].running == 0)
            # 300 prompt tokens and 100 more in blocks of 128.
            assert {report.kv_blocks for report in told if report.running} == {3, 4}

    asyncio.run(run())


# ---- bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("chat", [True, False])
def test_bytes_are_those_of_the_engine(server, stream, chat):
    there, _ = server
    fields = {"model": MODEL, "max_tokens": 40, "temperature": 0, "ignore_eos": True, "stream": stream}
    fields |= {"messages": [{"role": "user", "content": "hé"}]} if chat else {"prompt": "def"}
    path, content = f"/v1/{'chat/' if chat else ''}completions", json.dumps(fields).encode()

    async def direct():
        headers = {"content-type": "application/json"}
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.post(f"{there.url}{path}", data=content, headers=headers) as response,
        ):
            return response.headers["content-type"], await response.read()

    async def through():
        async with engine_of(there.url) as engine, engine.open(call(path, content)) as reply:
            data = await reply.body()
            return dict(reply.headers)["content-type"], data

    # Now and then vLLM puts two tokens into one event of its own accord; then only the text is the same.
    for _ in range(40):
        (kind, theirs), (our_kind, ours) = asyncio.run(direct()), asyncio.run(through())
        assert (our_kind, texts(ours)) == (kind, texts(theirs))
        if plain(ours) == plain(theirs):
            return
    raise AssertionError(f"never the same bytes:\n{plain(ours)!r}\n{plain(theirs)!r}")


def texts(data):
    """The answer's text, however it was cut."""
    events = events_of(data) if data.startswith(b"data:") else [json.loads(data)]
    choices = [event["choices"][0] for event in events if event != "[DONE]"]
    found = "".join(
        text_of({"choices": [choice]}) or choice.get("message", {}).get("content", "") for choice in choices
    )
    assert len(found) > 20
    return found


def plain(data):
    """Bytes without ids and times."""
    return re.sub(rb'"(id)":"[a-z]+-[0-9a-f]+"|"(created)":\d+', rb'"\1\2":0', data)


def test_no_token_is_lost_though_events_hold_several(server):
    there, _ = server

    async def one(engine):
        _, data = await whole(engine, call(body=body(100, return_token_ids=True, prompt="x" * 50)))
        return [len(event["choices"][0]["token_ids"]) for event in events_of(data)[:-1]]

    async def run():
        async with engine_of(there.url) as engine:
            return await asyncio.gather(*(one(engine) for _ in range(32)))

    sizes = [size for stream in asyncio.run(run()) for size in stream]
    print(f"tokens per event: mean {sum(sizes) / len(sizes):.3f}, most {max(sizes)}")
    # vLLM puts tokens together when its server falls behind: events are no count of tokens.
    assert sum(sizes) == 32 * 100


# ---- faults --------------------------------------------------------------------------------------------------


def test_leaving_early_aborts_in_the_engine(server):
    there, address = server

    async def run():
        async with engine_of(there.url, stats=address) as engine, watched(engine) as (told, _):
            for stage in range(3):
                told.clear()
                async with engine.open(call(body=body(4000))) as reply:
                    for _ in range(stage):
                        await reply.read()
                    await eventually(lambda: told and told[-1].running == 1)
                left = time.monotonic()
                await eventually(lambda: (told[-1].running, told[-1].kv_blocks) == (0, 0))
                print(f"aborted {time.monotonic() - left:.3f} s after the client left")

    asyncio.run(run())


@asynccontextmanager
async def paused(engine, url):
    """The engine stands still with one request in it."""
    async with aiohttp.ClientSession() as session, engine.open(call(body=body(3000))) as reply:
        await reply.read()
        async with session.post(f"{url}/pause?mode=keep") as response:
            assert response.status == 200
        try:
            yield
        finally:
            async with session.post(f"{url}/resume") as response:
                assert response.status == 200


def test_a_stalled_engine_still_says_what_it_holds(server):
    there, _ = server

    async def run():
        async with engine_of(there.url) as engine, watched(engine) as (told, task), paused(engine, there.url):
            told.clear()
            await eventually(lambda: len(told) >= 3)
            assert not task.done()
            assert {(report.running, report.step) for report in told[1:3]} == {(1, told[2].step)}

    asyncio.run(run())
