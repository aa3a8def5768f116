"""A whole gateway, whose engine's GPU an agent in another process holds through a keeper in a third."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.test_hardware_run import engine_in_a_thread
from gateway.test_run import lived, options
from tests.agent.conftest import new_secret
from throttllem.config import ClockOptions, EngineEntry
from throttllem.gateway.build import build_gateway
from throttllem.gateway.check import check_configuration
from throttllem.gateway.run import run_gateway
from tools.testbed.processes import free_port

PROGRAM = str(Path(sys.executable).with_name("throttllem"))


@pytest.fixture(scope="module")
def secret(tmp_path_factory):
    return new_secret(tmp_path_factory.mktemp("pool"))


@contextlib.contextmanager
def agent_process(keeper, secret, port):
    command = [PROGRAM, "agent", "--secret", str(secret), "--keeper", str(keeper)]
    with subprocess.Popen([*command, "--listen", f"127.0.0.1:{port}"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == f"agent at 127.0.0.1:{port}\n"
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


def through_agent(tmp_path, secret, url, port, **more):
    entry = EngineEntry(
        kind="openai",
        url=url,
        gpu="a100-40gb-sxm",
        gpus=("0",),
        agent=f"127.0.0.1:{port}",
        max_batch=8,
        kv_blocks=100,
        block_tokens=16,
    )
    return options(tmp_path, engines=(entry,), clocks=ClockOptions(mode="on", agent_secret=secret, ttl_s=1.0), **more)


async def served(http, api):
    async with asyncio.timeout(10):
        while True:
            async with http.post(
                f"{api}/completions", json={"model": "tiny", "prompt": "Hi", "max_tokens": 3}
            ) as reply:
                if reply.status == 200:
                    return True
            await asyncio.sleep(0.05)


async def locked(machine, lock, within_s=8.0):
    async with asyncio.timeout(within_s):
        while machine.gpus[0].lock != lock:
            await asyncio.sleep(0.01)


async def unset(http, private, text, within_s=8.0):
    """Wait until the dashboard says so of the engine's clock."""
    async with asyncio.timeout(within_s):
        while True:
            async with http.get(private + "/dashboard/state") as response:
                engine = (await response.json())["status"]["models"][0]["engines"][0]
            if text in str((engine["unset"], engine["trouble"], engine["notes"])):
                return engine
            await asyncio.sleep(0.05)


TOP = (1410, 1410)


@pytest.mark.slow
def test_whatever_ends_no_clock_is_left_behind_and_requests_are_served(tmp_path, machine, keeper, secret):
    port = free_port()

    async def during(http, api, private):
        with agent_process(keeper, secret, port) as agent:
            await served(http, api)
            await locked(machine, TOP)
            agent.send_signal(signal.SIGSTOP)
            await locked(machine, None)
            await unset(http, private, "agent 127.0.0.1")
            await served(http, api)
            agent.send_signal(signal.SIGCONT)
            await locked(machine, TOP)
            agent.kill()
            await locked(machine, None)
            await unset(http, private, "agent 127.0.0.1")
            await served(http, api)
        with agent_process(keeper, secret, port):
            await locked(machine, TOP)
            async with http.get(private + "/metrics") as response:
                lines = (await response.text()).splitlines()
            assert any(line.startswith("throttllem_energy_joules_total") for line in lines)

    with engine_in_a_thread() as url:
        made = through_agent(tmp_path, secret, url, port)
        messages = lived(run_gateway(made, tmp_path / "cache"), during)
    assert messages[-1] == "stopped" and machine.gpus[0].lock is None


@pytest.mark.parametrize("ends_by", [signal.SIGKILL, signal.SIGSTOP])
def test_a_gateway_that_is_killed_or_hangs_leaves_no_clock_behind(tmp_path, machine, keeper, secret, ends_by):
    port = free_port()
    with engine_in_a_thread() as url, agent_process(keeper, secret, port):
        (tmp_path / "config.toml").write_text(f"""
            policy = "triton"
            state_dir = "{tmp_path}"
            [clocks]
            mode = "on"
            ttl_s = 1.0
            agent_secret = "{secret}"
            [[engines]]
            kind = "openai"
            url = "{url}"
            gpu = "a100-40gb-sxm"
            gpus = ["0"]
            agent = "127.0.0.1:{port}"
            max_batch = 8
            kv_blocks = 100
            block_tokens = 16
        """)
        arguments = ["serve", "--port", "0", "--config", str(tmp_path / "config.toml")]
        with subprocess.Popen([PROGRAM, *arguments]) as gateway:
            try:
                asyncio.run(locked(machine, TOP, 30.0))
                os.kill(gateway.pid, ends_by)
                asyncio.run(locked(machine, None))
            finally:
                gateway.kill()


@pytest.mark.slow
def test_check_shows_what_an_agent_reads_and_sets_nothing(tmp_path, machine, keeper, secret):
    port = free_port()
    with engine_in_a_thread() as url:
        made = through_agent(tmp_path, secret, url, port)
        with agent_process(keeper, secret, port):
            found = asyncio.run(check_configuration(made, {}, tmp_path / "cache"))
        without = asyncio.run(check_configuration(made, {}, tmp_path / "cache"))
    (line,) = [finding for finding in found if f"at agent 127.0.0.1:{port}" in finding.text]
    assert line.mark == "ok" and line.text.endswith("W; clocks would be on")
    assert any(each.mark == "!!" and "serve would go on without clocks" in each.text for each in without)
    assert machine.gpus[0].attempted == 0


def test_an_agent_needs_the_pools_secret(tmp_path):
    made = through_agent(tmp_path, None, "http://127.0.0.1:1", 9440)
    with pytest.raises(ValueError, match=r"needs the pool's secret, clocks\.agent_secret; it is made by: openssl"):
        build_gateway(made, tmp_path / "cache", version="1", now=lambda: 0.0)
