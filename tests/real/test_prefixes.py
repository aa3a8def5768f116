"""The prefix cache of a real vLLM: what it computes, and the KV blocks that its requests share."""

import asyncio
import json
import re

import aiohttp
import pytest

from tests.real.vllm import started
from tools.testbed.engines.vllm import FLAGS, MODEL
from tools.testbed.gateway import gateway

pytestmark = pytest.mark.real
SMALL = (*FLAGS, "--num-gpu-blocks-override", "160", "--enable-prompt-tokens-details")
PROMPT = "def main(x): return x + 1  # " * 90
OUTPUT_TOKENS = 600
A_LOOK = 10
"""Events of a reply between two looks at the blocks: a fast engine is seen as often as a slow one."""
OWN, REPORTED = "throttllem_kv_blocks", "throttllem_reported_kv_blocks"


def value(page, name):
    found = re.search(rf"^{re.escape(name)}\{{[^}}]*\}} (\S+)$", page, re.M)
    return found and float(found[1])


async def asked(session, url, moved, **more):
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True, "stream": True, **more}
    body |= {"stream_options": {"include_usage": True}, "throttllem": {"metrics": True}}
    events = []
    async with session.post(url + "/v1/completions", json=body) as response:
        async for line in response.content:
            if line.startswith(b"data: {"):
                events.append(line.removeprefix(b"data: "))
                if len(events) % A_LOOK == 0:
                    moved.set()
    return json.loads(events[-1])


async def looked(session, url, moved, pairs):
    """Blocks of the scoreboard and of the engine, whenever a reply has moved on."""
    while True:
        await moved.wait()
        moved.clear()
        async with session.get(url + "/metrics") as response:
            page = await response.text()
        pairs.append((value(page, OWN), value(page, REPORTED)))


async def served(url, count, **more):
    pairs, moved = [], asyncio.Event()
    async with aiohttp.ClientSession() as session:
        looking = asyncio.create_task(looked(session, url, moved, pairs))
        found = await asyncio.gather(*(asked(session, url, moved, **more) for _ in range(count)))
        looking.cancel()
        async with session.get(url + "/metrics") as response:
            return found, pairs, await response.text()


def test_the_same_long_prompt_is_computed_and_held_once(model, tmp_path):
    with started(model, tmp_path, flags=SMALL) as (server, stats):
        arguments = ("--engine", server.url, "--set", f"engines.0.stats={stats}")
        with gateway(arguments, tmp_path / "gateway") as up:
            first, pairs, _ = asyncio.run(served(up.url, 8))
            several, more, page = asyncio.run(served(up.url, 2, n=4, temperature=1))
    metrics = [answer["metrics"] for answer in (*first, *several)]
    assert [each["output_tokens"] for each in metrics] == [OUTPUT_TOKENS] * 8 + [4 * OUTPUT_TOKENS] * 2
    cached = sorted(each["cached_prompt_tokens"] for each in metrics)
    assert cached[0] == 0 and cached[1:] == [896] * 9
    assert value(page, "throttllem_cached_prompt_tokens_total") == 9 * 896
    assert value(page, "throttllem_prompt_tokens_total") == sum(
        one["usage"]["prompt_tokens"] for one in (*first, *several)
    )
    # A look may fall between an engine's step and its report: most are equal, and none is far off.
    for held in (pairs, more):
        busy = [(own, engine) for own, engine in held if own and engine]
        print(busy)
        assert len(busy) > 3
        assert sum(own == engine for own, engine in busy) >= 0.7 * len(busy)
    assert value(page, "throttllem_mean_drift_kv_blocks") < 1.6  # 1 % of the capacity
