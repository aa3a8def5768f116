"""The contract of live engines, over every implementation. The remote ones are in front of a simulated one on HTTP."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from engines.contract import CHECKS, Subject, events_of, name_of, text_of
from engines.live import engine
from engines.triton_peer import SPEC
from throttllem.engines.base import Call, EngineError, RemoteOptions
from throttllem.engines.remote import remote_engine
from throttllem.openai_api.requests import CHAT, COMPLETIONS, parse_request


async def sent_on(inner, request, path, body, rewrite=lambda chunk: chunk):
    """The inner engine's reply as an HTTP response; a stream that breaks off breaks the connection off."""
    call = Call(method=request.method, path=path, headers=(), body=body)
    async with inner.open(call) as reply:
        response = web.StreamResponse(status=reply.status, headers=dict(reply.headers))
        await response.prepare(request)
        try:
            while chunk := await reply.read():
                await response.write(rewrite(chunk))
        except EngineError:
            request.transport.abort()
        return response


def like_vllm(inner):
    """OpenAI's API and `/tokenize`, without metrics."""

    async def handle(request):
        body = await request.read()
        if request.path == "/tokenize":
            path = CHAT if b'"messages"' in body else COMPLETIONS
            return web.json_response({"count": (await inner.count(parse_request(path, body))).tokens})
        if not request.path.startswith("/v1/"):
            return web.Response(status=200 if request.path == "/health" else 404)
        return await sent_on(inner, request, request.path, body)

    return handle, {"kind": "openai", "kv_blocks": 400, "max_batch": 64}


def like_triton(inner):
    """`generate_stream` of a model called "ensemble", without configuration and metrics."""

    def rewrite(chunk):
        texts = [text for event in events_of(chunk) if (text := text_of(event))]
        return b"".join(b"data: " + json.dumps({"text_output": text}).encode() + b"\n\n" for text in texts)

    async def handle(request):
        if request.path.endswith("/ready"):
            return web.Response()
        if not request.path.endswith("/generate_stream"):
            return web.json_response({"error": "Not Found"}, status=404)
        native = json.loads(await request.read())
        body = {"model": "toy", "prompt": native["text_input"], "max_tokens": native["max_tokens"], "stream": True}
        body |= {"min_tokens": native.get("min_tokens")}
        return await sent_on(inner, request, COMPLETIONS, json.dumps(body).encode(), rewrite)

    return handle, {"kind": "triton"}


@asynccontextmanager
async def remote(like):
    inner = engine()
    handle, options = like(inner)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    subject = remote_engine(RemoteOptions(url=url, scrape_s=0.01, **options), SPEC)

    async def kill():
        await inner.close()
        await runner.cleanup()

    try:
        yield Subject(engine=subject, kill=kill)
    finally:
        await subject.close()
        await kill()


@asynccontextmanager
async def simulated():
    subject = engine()
    yield Subject(engine=subject, kill=subject.close)


KINDS = {"simulated": simulated, "openai": lambda: remote(like_vllm), "triton": lambda: remote(like_triton)}


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind, check):
    async def run():
        async with KINDS[kind]() as subject:
            await asyncio.wait_for(check(subject), 20)

    asyncio.run(run())
