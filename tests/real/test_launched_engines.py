"""Real vLLM processes that the gateway starts: two sizes, a shadow instance, a drain that cuts no stream."""

import asyncio
import json
import os
import shlex
from pathlib import Path

import aiohttp
import pytest
from gateway.test_launched_engines import is_there, pids
from gateway.test_run import options

from tests.real.vllm import ENVIRONMENT, body
from throttllem.config import EngineEntry, LimitOptions
from throttllem.core.clocks.sizing import AutoscaleOptions
from throttllem.gateway.run import run_gateway
from tools.testbed.engines.vllm import ENVIRONMENT as VARIABLES
from tools.testbed.engines.vllm import FLAGS, MODEL, READY_S
from tools.testbed.processes import free_ports

pytestmark = pytest.mark.real
TOKENS = 100


def entry(port, model, tp):
    variables = VARIABLES | {"PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}"}
    words = ["env", *(f"{name}={value}" for name, value in variables.items()), ENVIRONMENT / "bin/vllm", "serve", model]
    words += ["--served-model-name", "{served_as}", "--host", "{host}", "--port", "{port}", *FLAGS]
    command = shlex.join(map(str, words))
    return EngineEntry(kind="openai", url=f"http://127.0.0.1:{port}", tp=tp, served_as=MODEL, command=command)


async def ends_whole(http, api):
    async with http.post(
        f"{api}/completions", data=body(TOKENS), headers={"content-type": "application/json"}
    ) as reply:
        events = [line[6:] for line in (await reply.text()).split("\n") if line.startswith("data: ")]
        last = json.loads(events[-2])["choices"][0]["finish_reason"] if len(events) > 1 else None
        return reply.status, last, events[-1:]


def test_a_size_takes_over_while_streams_run_and_the_other_stops_when_it_is_empty(model, tmp_path):
    one, two = free_ports(2)
    small, large = f"127.0.0.1-{one}", f"127.0.0.1-{two}"
    scale = AutoscaleOptions(capacity_rps={1: 20.0, 2: 300.0}, interval_s=1.0, window_s=5.0, grace_s=5.0)
    some = options(
        tmp_path,
        engines=(entry(one, model, 1), entry(two, model, 2)),
        autoscale=scale,
        limits=LimitOptions(engine_wait_s=READY_S),
    ).model_copy(update={"policy": "triton+autoscale"})
    prepared, messages, seen = run_gateway(some, tmp_path), [], []

    async def main():
        stop = asyncio.Event()
        serving = asyncio.create_task(prepared.serving(messages.append, stop))
        while len(messages) < 3:
            await asyncio.sleep(0.01)
        api = messages[1].split()[1]
        try:
            async with asyncio.timeout(3 * READY_S), aiohttp.ClientSession() as http:
                streams = [asyncio.create_task(ends_whole(http, api))]
                while set(pids(tmp_path)) != {small}:
                    if pids(tmp_path) not in seen:
                        seen.append(pids(tmp_path))
                    streams.append(asyncio.create_task(ends_whole(http, api)))
                    await asyncio.sleep(4.0)
                ends = [await asyncio.gather(*streams), await ends_whole(http, api)]
        finally:
            stop.set()
            await serving
        return ends

    ends, last = asyncio.run(main())
    assert set(map(str, [*ends, last])) == {str((200, "length", ["[DONE]"]))}
    assert any(set(found) == {small, large} for found in seen)
    assert not any(is_there(pid) for found in seen for pid in found.values())
    log = Path(tmp_path / f"state/engines/{large}.log").read_text()
    assert "Application shutdown complete" in log
