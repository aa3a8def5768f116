"""A real vLLM with the plug-in, and engines on it, for the tests of this folder."""

import asyncio
import json
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from tests.engines.contract import CHECKS
from tests.engines.upstreams import eventually
from tests.engines.vllm_peer import SPEC
from throttllem.engines.base import RemoteOptions
from throttllem.engines.openai import OpenaiEngine
from tools.testbed.engines.vllm import FLAGS, MODEL, vllm

ENVIRONMENT = Path(__file__).parents[2] / ".engines/vllm"
DEADLY = CHECKS[-2:]
"""They end the engine: each has one of its own."""


@contextmanager
def started(model, folder, *, flags=FLAGS):
    """A vLLM with the plug-in, beside which this process keeps off its core."""
    environment = {"VLLM_SERVER_DEV_MODE": "1"}
    with vllm(ENVIRONMENT, folder, model=model, flags=flags, environment=environment, report=print) as server:
        yield server, server.stats


@asynccontextmanager
async def engine_of(url, **options):
    engine = OpenaiEngine(RemoteOptions(url=url, kind="openai", **{"scrape_s": 0.1} | options), SPEC)
    try:
        yield engine
    finally:
        await engine.close()


def body(tokens, *, stream=True, prompt="def main():", **more):
    fields = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": stream}
    return json.dumps({"temperature": 0, **fields, **more}).encode()


@asynccontextmanager
async def watched(engine):
    told = []
    task = asyncio.create_task(engine.watch(told.append))
    try:
        await eventually(lambda: told or task.done())
        yield told, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
