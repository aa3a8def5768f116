"""A gateway from its start to its end, in this process: ports, greetings, what is saved, and nothing left behind."""

import asyncio
import logging
import socket

import aiohttp
import pytest

from throttllem.gateway.run import run_gateway
from throttllem.gateway.settings import EngineEntry, ServeOptions, ServerOptions


def options(tmp_path, **more):
    server = more.pop("server", ServerOptions(port=0, metrics_port=0))
    return ServeOptions(policy="triton", state_dir=tmp_path / "state", server=server, **more)


def lived(prepared, during):
    """What it said, after `during(base, private)`; whatever task it leaves is an error."""
    said = []

    async def main():
        stop = asyncio.Event()
        serving = asyncio.create_task(prepared.serving(said.append, stop))
        async with asyncio.timeout(20):
            while len(said) < 3:
                await asyncio.sleep(0.005)
        api, private = said[1].split()[1], said[2].split()[1].removesuffix("/dashboard")
        async with aiohttp.ClientSession() as http:
            await during(http, api, private)
        stop.set()
        await serving
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left

    asyncio.run(main())
    return said


def test_from_start_to_end(tmp_path):
    async def during(http, api, private):
        body = {"model": "llama-3-8b", "prompt": "Hello", "max_tokens": 3, "ignore_eos": True}
        async with http.post(f"{api}/completions", json=body) as response:
            assert response.status == 200
            assert (await response.json())["usage"]["completion_tokens"] == 3
        for page in ("/metrics", "/health", "/dashboard"):
            async with http.get(private + page) as response:
                assert response.status == 200, page
                text = await response.text()
                assert page != "/metrics" or "throttllem_generated_tokens_total" in text

    said = lived(run_gateway(options(tmp_path), tmp_path / "cache"), during)
    assert "policy triton, engine simulated-llama-3-8b-tp1" in said[0]
    assert said[-2].startswith("stopping: 0 requests have up to 30 s")
    assert said[-1] == "stopped"
    state = tmp_path / "state"
    assert (state / "lengths-llama-3-8b.json").stat().st_size > 100
    assert any((state / "flight").iterdir())


def test_an_engine_that_is_not_there_keeps_nobody_from_starting(tmp_path):
    async def during(http, api, private):
        async with http.get(private + "/health") as response:
            assert response.status == 503

    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    entry = EngineEntry(kind="openai", url=f"http://127.0.0.1:{port}")
    lived(run_gateway(options(tmp_path, engines=(entry,)), tmp_path), during)


def test_what_cannot_be_gives_the_ports_back(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = ServerOptions(port=port)
    with pytest.raises(ValueError, match="3 GPUs"):
        run_gateway(options(tmp_path, server=server, engines=(EngineEntry(tp=3),)), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="a file stands where a folder is needed"):
        run_gateway(options(tmp_path / "file", server=server), tmp_path)
    socket.create_server(("127.0.0.1", port)).close()


def test_a_state_that_cannot_be_saved_is_said(tmp_path, caplog):
    async def during(http, api, private):
        (tmp_path / "state" / "lengths-llama-3-8b.json").mkdir()

    with caplog.at_level(logging.WARNING):
        said = lived(run_gateway(options(tmp_path), tmp_path), during)
    assert said[-1] == "stopped"
    assert "lengths not saved" in caplog.text
