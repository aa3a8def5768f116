"""An HTTP server that answers as a Triton did, and a TritonEngine over it."""

import asyncio
import json
from contextlib import asynccontextmanager

from aiohttp import web

from throttllem.core.types import EngineSpec
from throttllem.engines.base import Call, RemoteOptions
from throttllem.engines.triton.engine import TritonEngine
from throttllem.openai_api.requests import CHAT, COMPLETIONS

SPEC = EngineSpec(
    gpu="a100-40gb-sxm",
    model="llama-3-8b",
    tp=1,
    kv_blocks=1000,
    block_tokens=64,
    max_batch=256,
    max_context_tokens=8192,
    prefill_budget_tokens=8192,
    chunked=False,
    no_evict=False,
    clocks_mhz=(510, 1410),
    idle_w=50.0,
    startup_s=10.0,
)
PAGE = b"""# HELP nv_trt_llm_request_metrics TRT LLM request metrics
# TYPE nv_trt_llm_request_metrics gauge
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="context",version="1"} 1
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="scheduled",version="1"} 3
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="max",version="1"} 512
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="active",version="1"} 5
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per",model="tensorrt_llm",version="1"} 32
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="tensorrt_llm",version="1"} 17
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="free",model="tensorrt_llm",version="1"} 6222
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 6239
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="another",version="1"} 1
"""
CONFIG = {
    "max_batch_size": 32,
    "input": [{"name": name} for name in ("text_input", "max_tokens", "stream", "stop_words", "top_k", "random_seed")],
    "parameters": {"batch_scheduler_policy": {"string_value": "guaranteed_no_evict"}},
}


def event(**fields):
    return b"data: " + json.dumps({"model_name": "ensemble", "model_version": "1"} | fields).encode() + b"\n\n"


class Peer:
    """An HTTP server that answers as a Triton did, to `generate_stream` with `script`.

    A float in the script is a pause, None breaks off the connection. Requests are recorded in `asked`.
    The first pages of metrics are those of `early_pages`.
    """

    def __init__(self):
        self.script = [event(text_output=text) for text in (" one", " two", " three")]
        self.status, self.ready, self.config = 200, 200, CONFIG
        self.early_pages = []
        self.asked = []
        self.gone = asyncio.Event()

    async def generate(self, request):
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.asked.append((request.path, headers, await request.read()))
        response = web.StreamResponse(status=self.status, headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            for part in self.script:
                if part is None:
                    request.transport.abort()
                elif isinstance(part, float):
                    await asyncio.sleep(part)
                else:
                    await response.write(part)
        except (ConnectionError, asyncio.CancelledError):
            self.gone.set()
            raise
        return response

    async def facts(self, request):
        match request.path:
            case "/v2/models/ensemble/ready":
                return web.Response(status=self.ready)
            case "/v2/models/ensemble/config" if self.config is not None:
                return web.json_response(self.config)
            case "/v2":
                return web.json_response({"name": "triton", "version": "2.51.0"})
            case "/metrics":
                return web.Response(body=self.early_pages.pop(0) if self.early_pages else PAGE)
        return web.json_response({"error": "Not Found"}, status=404)


@asynccontextmanager
async def triton(**options):
    """A peer and an engine over it."""
    peer = Peer()
    app = web.Application()
    app.router.add_post("/v2/models/{model}/{generate:generate|generate_stream}", peer.generate)
    app.router.add_route("*", "/{rest:.*}", peer.facts)
    # The handler of a client that disconnects is cancelled, which sets `gone`.
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    if options.pop("measured", False):
        options["metrics_url"] = f"{url}/metrics"
    engine = TritonEngine(RemoteOptions(url=url, kind="triton", scrape_s=0.005, **options), SPEC)
    try:
        yield peer, engine
    finally:
        await engine.close()
        await runner.cleanup()


def call(path, body, **fields):
    headers = (("content-type", "application/json"), ("x-slo-e2e-ms", "5"), ("x-request-id", "r1"))
    if path in (COMPLETIONS, CHAT) and isinstance(body, dict):
        body = {"model": "m", **body}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Call(method="POST", path=path, headers=headers, body=data, **fields)


async def answer(engine, *asked, **fields):
    async with engine.open(call(*asked, **fields)) as reply:
        return reply.status, await reply.body()


async def one(path, body, *, script=None, status=200, **options):
    """Status, bytes, and the bodies that Triton received, of one request to a connected engine."""
    async with triton(**options) as (peer, engine):
        await engine.connect()
        peer.script, peer.status = script or peer.script, status
        found = await answer(engine, path, body)
        return *found, [json.loads(asked[2]) for asked in peer.asked]


def chunks(data):
    return [json.loads(line[6:]) for line in data.split(b"\n\n")[:-1] if line != b"data: [DONE]"]
