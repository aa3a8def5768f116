"""What vLLM answers beside its completions, over real HTTP; tests change `self` while it runs."""

import asyncio
import json
from contextlib import asynccontextmanager

from aiohttp import web

from tests.engines.upstreams import served
from throttllem.core.types import EngineSpec
from throttllem.engines.base import RemoteOptions
from throttllem.engines.openai import OpenaiEngine

INFO = (
    'throttllem_engine_info{{boot="{boot}",chunked_prefill="1",engines="{engines}",api_servers="{servers}",'
    'max_num_batched_tokens="2048",max_num_seqs="64",stats="{stats}"}} 1.0\n'
)


class VllmPeer:
    def __init__(self):
        self.health = 200
        self.models = [{"id": "tiny", "max_model_len": 4096}, {"id": "lora", "max_model_len": 4096}]
        self.models_status = 200
        self.metrics = True
        self.info = None
        self.server_info = None
        self.cache = 'num_gpu_blocks="4096",block_size="128",kv_cache_size_tokens="524288"'
        self.running, self.waiting, self.usage, self.iterations, self.started = 0, 0, 0.0, 0, 100.0
        self.tokenize = True
        self.asked = []
        self.headers = []

    def page(self):
        state = {
            "num_requests_running": self.running,
            "num_requests_waiting": self.waiting,
            "kv_cache_usage_perc": self.usage,
            "iteration_tokens_total_count": self.iterations,
        }
        lines = [f'vllm:{name}{{engine="0",model_name="tiny"}} {value}\n' for name, value in state.items()]
        lines.append(f"process_start_time_seconds {self.started}\n")
        lines.append(f'vllm:cache_config_info{{engine="0",{self.cache}}} 1.0\n')
        return "".join(lines) + (INFO.format(**{"boot": 7, **self.info}) if self.info else "")

    async def _health(self, request):
        self.headers.append(dict(request.headers))
        return web.Response(status=self.health)

    async def _models(self, request):
        return web.json_response({"object": "list", "data": self.models}, status=self.models_status)

    async def _metrics(self, request):
        return web.Response(text=self.page()) if self.metrics else web.Response(status=404)

    async def _version(self, request):
        return web.json_response({"version": "0.32.0"})

    async def _server_info(self, request):
        return web.json_response(self.server_info) if self.server_info else web.Response(status=404)

    async def _tokenize(self, request):
        body = json.loads(await request.read())
        self.asked.append(body)
        if not self.tokenize:
            return web.Response(status=404)
        text = body.get("prompt") or "".join(str(message["content"]) for message in body["messages"])
        if text == "refused":
            return web.json_response({"error": {"message": "no"}}, status=400)
        return web.json_response({"count": len(text.split()), "tokens": list(range(len(text.split())))})

    def routes(self):
        return {
            ("GET", "/health"): self._health,
            ("GET", "/v1/models"): self._models,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/version"): self._version,
            ("GET", "/server_info"): self._server_info,
            ("POST", "/tokenize"): self._tokenize,
        }


SPEC = EngineSpec(
    gpu="a100-40gb-sxm",
    model="llama-3-8b",
    tp=2,
    kv_blocks=1,
    block_tokens=1,
    max_batch=1,
    max_context_tokens=1,
    prefill_budget_tokens=1,
    chunked=False,
    no_evict=True,
    clocks_mhz=(210, 1410),
    idle_w=50.0,
    startup_s=30.0,
)
"""The catalogue's engine, of which no capacity may be taken."""


@asynccontextmanager
async def engine_of(peer, routes=None, **options):
    """An OpenaiEngine on a peer that answers these routes besides."""
    async with served(peer.routes() | (routes or {})) as url:
        engine = OpenaiEngine(RemoteOptions(url=url, kind="openai", **{"scrape_s": 0.01} | options), SPEC)
        try:
            yield engine
        finally:
            await engine.close()


def connected(peer, **options):
    """What `connect` returns for a peer."""

    async def run():
        async with engine_of(peer, **options) as engine:
            return await engine.connect()

    return asyncio.run(run())
