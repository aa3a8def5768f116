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
OWN, REPORTED = "throttllem_kv_blocks", "throttllem_reported_kv_blocks"


def value(page, name):
    found = re.search(rf"^{re.escape(name)}\{{[^}}]*\}} (\S+)$", page, re.M)
    return found and float(found[1])


async def asked(session, url, **more):
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": True, **more}
    body |= {"stream_options": {"include_usage": True}, "throttllem": {"metrics": True}}
    async with session.post(url + "/v1/completions", json=body) as response:
        *_, last, _, _ = (await response.text()).split("\n\n")
        return json.loads(last.removeprefix("data: "))


async def looked(session, url, pairs):
    """Blocks of the scoreboard and of the engine, ten times a second."""
    while True:
        async with session.get(url + "/metrics") as response:
            page = await response.text()
        pairs.append((value(page, OWN), value(page, REPORTED)))
        await asyncio.sleep(0.1)


async def served(url, count, **more):
    pairs = []
    async with aiohttp.ClientSession() as session:
        looking = asyncio.create_task(looked(session, url, pairs))
        found = await asyncio.gather(*(asked(session, url, **more) for _ in range(count)))
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
    assert [each["output_tokens"] for each in metrics] == [200] * 8 + [800] * 2
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
