"""docs/life-of-a-request.md, executed: a streamed request through a whole gateway, and one through the simulator, pass
the functions that the page lists, in the page's order.
"""

import asyncio
import contextlib
import json
import re
import sys
from functools import partial

import aiohttp
from aiohttp import web
from core.toy import request, spec, table
from pages import DOCS, ROOT
from sim.toy_runs import simulate

from throttllem.config import EngineEntry, Options, ServerOptions
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.types import Slo
from throttllem.gateway.run import run_gateway
from throttllem.profiling.storage import save_table

PAGE = DOCS / "life-of-a-request.md"
SRC = f"{ROOT}/src/throttllem/"
STEP = re.compile(r"^    ([\w/]+\.py)::([\w.]+)(?: {2,}.*)?$", re.MULTILINE)
ENGINE = {"kv_blocks": 64, "block_tokens": 4, "max_batch": 8, "max_context_tokens": 256}
CLOCKS_MHZ = (705, 1110, 1410)
TOKENS = 3


def listed(chapter):
    """The functions that a chapter of the page lists, in order: (file, qualified name)."""
    text = PAGE.read_text()
    begin = text.index(f"\n## {chapter}\n")
    found = STEP.findall(text[begin : text.find("\n## ", begin + 1)])
    assert found
    return found


@contextlib.contextmanager
def passed():
    """The functions of the package that are entered, in order."""
    entered = []

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(SRC):
            entered.append((frame.f_code.co_filename.removeprefix(SRC), frame.f_code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield entered
    finally:
        sys.setprofile(before)


def first_not_in_order(expected, entered):
    """The first of `expected` that is not entered after the one before it; None: they are passed in this order."""
    rest = iter(entered)
    return next((one for one in expected if one not in rest), None)


async def answered(request, value):
    return web.json_response(value)


async def streamed(request):
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for number in range(TOKENS):
        reason = "length" if number == TOKENS - 1 else None
        event = {"object": "text_completion", "choices": [{"index": 0, "text": " a", "finish_reason": reason}]}
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await asyncio.sleep(0.02)
    await response.write(b"data: [DONE]\n\n")
    return response


@contextlib.asynccontextmanager
async def engine():
    """The address of a small engine of OpenAI's API."""
    app = web.Application()
    app.router.add_get("/v1/models", partial(answered, value={"data": [{"id": "tiny", "max_model_len": 256}]}))
    app.router.add_post("/tokenize", partial(answered, value={"count": 3}))
    app.router.add_post("/v1/completions", streamed)
    runner = web.AppRunner(app, shutdown_timeout=0.01)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def one_request(tmp_path):
    """What a gateway with a performance table enters for one streamed request."""
    async with engine() as url:
        options = Options(
            policy="throttllem",
            state_dir=tmp_path,
            server=ServerOptions(port=0),
            slo=Slo(e2e_s=60.0, tbt_s=5.0),
            engines=(EngineEntry(kind="openai", url=url, tables=tmp_path, **ENGINE),),
        )
        prepared = run_gateway(options, tmp_path / "cache")
        stop, messages = asyncio.Event(), []
        serving = asyncio.create_task(prepared.serving(messages.append, stop))
        (backend,) = prepared.gateway.models.served[0].loop.backends
        async with asyncio.timeout(20), aiohttp.ClientSession() as http:
            while len(messages) < 2 or backend.state != "up":
                await asyncio.sleep(0.005)
            body = {"model": "tiny", "prompt": "one two three", "max_tokens": TOKENS, "stream": True}
            with passed() as entered:
                async with http.post(f"{messages[1].split()[1]}/completions", json=body) as response:
                    assert (await response.read()).endswith(b"data: [DONE]\n\n")
                prepared.gateway.flush()
        stop.set()
        await serving
    return entered


def test_a_streamed_request_passes_what_the_page_lists(tmp_path):
    some = spec(**ENGINE, clocks_mhz=CLOCKS_MHZ)
    save_table(table(some), tmp_path / "table-tp1.npz")
    entered = asyncio.run(one_request(tmp_path))
    assert first_not_in_order(listed("Live"), entered) is None


def test_a_simulated_request_passes_what_the_page_lists():
    with passed() as entered:
        simulate([request(0, 4, TOKENS)], ClockPolicy.THROTTLLEM)
    assert first_not_in_order(listed("In simulation"), entered) is None


def test_order_is_seen():
    assert first_not_in_order("ac", "abc") is None
    assert first_not_in_order("ca", "abc") == "a"
    assert first_not_in_order("ad", "abc") == "d"
