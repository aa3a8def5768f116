"""A gateway from its start to its end, in this process: ports, messages, what is saved, and nothing left behind."""

import asyncio
import logging
import os
import socket
import threading

import aiohttp
import pytest

from throttllem.config import EngineEntry, Options, ServerOptions
from throttllem.gateway import run as run_module
from throttllem.gateway.run import run_gateway
from throttllem.profiling.lengths import save_lengths


def options(tmp_path, **more):
    server = more.pop("server", ServerOptions(port=0, metrics_port=0))
    return Options(policy="triton", state_dir=tmp_path / "state", server=server, **more)


def lived(prepared, during):
    """The messages of a gateway, stopped after `during(http, api, private)`; a task that it leaves is an error."""
    messages = []

    async def main():
        stop = asyncio.Event()
        serving = asyncio.create_task(prepared.serving(messages.append, stop))
        async with asyncio.timeout(20):
            while len(messages) < 3:
                await asyncio.sleep(0.005)
        api, private = messages[1].split()[1], messages[2].split()[1].removesuffix("/dashboard")
        async with aiohttp.ClientSession() as http:
            await during(http, api, private)
        stop.set()
        await serving
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left

    asyncio.run(main())
    return messages


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

    messages = lived(run_gateway(options(tmp_path), tmp_path / "cache"), during)
    assert "policy triton, engine simulated-llama-3-8b-tp1" in messages[0]
    assert messages[-2].startswith("stopping: 0 requests have up to 30 s")
    assert messages[-1] == "stopped"
    state = tmp_path / "state"
    assert (state / "lengths-llama-3-8b.json").stat().st_size > 100
    assert any((state / "flight").iterdir())


def test_the_gateway_starts_without_its_engine(tmp_path):
    async def during(http, api, private):
        async with http.get(private + "/health") as response:
            assert response.status == 503

    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    entry = EngineEntry(kind="openai", url=f"http://127.0.0.1:{port}")
    lived(run_gateway(options(tmp_path, engines=(entry,)), tmp_path), during)


def test_a_failed_start_frees_the_ports(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = ServerOptions(port=port)
    with pytest.raises(ValueError, match="3 GPUs"):
        run_gateway(options(tmp_path, server=server, engines=(EngineEntry(tp=3),)), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="a file stands where a folder is needed"):
        run_gateway(options(tmp_path / "file", server=server), tmp_path)
    socket.create_server(("127.0.0.1", port)).close()


def test_a_state_that_cannot_be_saved_is_logged(tmp_path, caplog):
    async def during(http, api, private):
        (tmp_path / "state" / "lengths-llama-3-8b.json").mkdir()

    with caplog.at_level(logging.WARNING):
        messages = lived(run_gateway(options(tmp_path), tmp_path), during)
    assert messages[-1] == "stopped"
    assert "lengths not saved" in caplog.text


def test_lengths_are_saved_while_it_serves_and_not_on_the_event_loop(tmp_path, monkeypatch):
    threads = []

    def saved(predictor, path):
        threads.append((threading.current_thread() is threading.main_thread(), predictor))
        if len(threads) == 1:
            raise ZeroDivisionError("a fault of ours")
        return save_lengths(predictor, path)

    async def during(http, api, private):
        async with asyncio.timeout(20):
            while len(threads) < 3:
                await asyncio.sleep(0.005)

    monkeypatch.setattr(run_module, "_SAVE_EVERY_S", 0.01)
    monkeypatch.setattr(run_module, "save_lengths", saved)
    prepared = run_gateway(options(tmp_path), tmp_path)
    lived(prepared, during)
    assert [on_loop for on_loop, _ in threads] == [False] * (len(threads) - 1) + [True]
    ((_, learns),) = prepared.gateway.predictors
    assert [predictor is learns for _, predictor in threads] == [False] * (len(threads) - 1) + [True]
    assert (tmp_path / "state" / "lengths-llama-3-8b.json").stat().st_size > 50


@pytest.mark.parametrize(("keys", "warned"), [(None, True), (("k",), False)])
def test_an_open_port_without_keys_is_warned_of_at_the_start(tmp_path, keys, warned):
    async def during(http, api, private):
        pass

    server = ServerOptions(host="0.0.0.0", port=0, metrics_port=0, api_keys=keys)
    messages = lived(run_gateway(options(tmp_path, server=server), tmp_path / "cache"), during)
    assert any("warning" in line and "no API keys, and 0.0.0.0" in line for line in messages) == warned


def test_a_second_gateway_keeps_its_state_elsewhere(tmp_path, caplog):
    first = run_gateway(options(tmp_path), tmp_path / "cache")
    with caplog.at_level(logging.WARNING, logger="throttllem.gateway"):
        second = run_gateway(options(tmp_path), tmp_path / "cache")
    assert first.options.state_dir == tmp_path / "state"
    port = second.sockets.addresses()[0][1]
    assert second.options.state_dir == tmp_path / "state" / f"port-{port}"
    assert "another gateway keeps its state there" in caplog.text
    for prepared in (first, second):
        prepared.sockets.close()
        os.close(prepared.held)


def test_state_and_records_are_closed_to_other_users_and_a_folder_that_is_open_is_warned_of(tmp_path, caplog):
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    before = os.umask(0)
    try:
        with caplog.at_level(logging.WARNING, logger="throttllem.gateway"):
            prepared = run_gateway(options(tmp_path), cache)

        async def nothing(http, api, private):
            pass

        lived(prepared, nothing)
    finally:
        os.umask(before)
    made = [tmp_path / "state", *(tmp_path / "state").rglob("*")]
    assert {"flight", "lengths-llama-3-8b.json"} <= {path.name for path in made}
    assert [path for path in made if path.stat().st_mode & 0o077] == []
    assert f"cache_dir: {cache} can be written by other users" in caplog.text
