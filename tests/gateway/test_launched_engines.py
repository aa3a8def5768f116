"""A gateway that starts its engines: light OpenAI servers as processes, crashed, drained, adopted after SIGKILL."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

from gateway.test_check import text_of
from gateway.test_run import lived, options
from throttllem.config import EngineEntry, ServerOptions
from throttllem.core.clocks.sizing import AutoscaleOptions
from throttllem.gateway.check import check_configuration
from throttllem.gateway.run import run_gateway
from tools.testbed.engines.openai_engine import MARK, MODEL
from tools.testbed.processes import free_port, free_ports

ROOT = Path(__file__).parents[2]
COMMAND = f"env PYTHONPATH={ROOT} {sys.executable} -m tools.testbed.engines.openai_engine {{port}}"


def entry(port, **more):
    return EngineEntry(**{"kind": "openai", "url": f"http://127.0.0.1:{port}", "command": COMMAND} | more)


@pytest.fixture(autouse=True)
def nothing_goes_on(tmp_path):
    """A test that fails may leave engines."""
    yield
    for pid in pids(tmp_path).values():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def is_there(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


async def stream(http, api, tokens):
    """Tokens that a client got, None where its stream broke off."""
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": tokens, "stream": True}
    try:
        async with http.post(f"{api}/completions", json=body) as response:
            text = await response.read()
            return text.count(MARK) if response.status == 200 and b"[DONE]" in text else None
    except aiohttp.ClientError:
        return None


async def metrics_of(http, private):
    async with http.get(f"{private}/metrics") as metrics:
        return await metrics.text()


def pids(folder):
    return {file.stem: json.loads(file.read_text())["pid"] for file in (folder / "state/engines").glob("*.json")}


def test_an_engine_is_started_restarted_after_a_crash_and_stopped_with_the_gateway(tmp_path):
    port, seen = free_port(), []

    async def during(http, api, private):
        assert await stream(http, api, 5) == 5
        seen.append(pids(tmp_path)[f"127.0.0.1-{port}"])
        breaks = asyncio.create_task(stream(http, api, 4000))
        await asyncio.sleep(0.3)
        os.kill(seen[0], signal.SIGKILL)
        assert await breaks is None
        async with asyncio.timeout(20):  # a request that comes before the gateway knows of the crash fails with it
            while not re.search(r"process_failures_total\{.*\} 1.0", await metrics_of(http, private)):
                await asyncio.sleep(0.01)
        assert await stream(http, api, 5) == 5
        seen.append(pids(tmp_path)[f"127.0.0.1-{port}"])
        text = await metrics_of(http, private)
        for name, value in (("starts", 2), ("process_failures", 1)):
            (line,) = (line for line in text.split("\n") if line.startswith(f"throttllem_engine_{name}_total"))
            assert float(line.split()[-1]) == value

    lived(run_gateway(options(tmp_path, engines=(entry(port),)), tmp_path), during)
    assert seen[0] != seen[1]
    assert not any(map(is_there, seen))
    assert (tmp_path / f"state/engines/127.0.0.1-{port}.log").exists()


async def counted(http, private, name):
    text = await metrics_of(http, private)
    return sum(float(line.split()[-1]) for line in text.split("\n") if line.startswith(name))


async def first_token_after(http, engine, seconds):
    async with http.post(f"{engine}/pace", json={"first_s": seconds}) as response:
        assert response.status == 200


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 1])
def test_a_request_without_a_byte_of_a_killed_engine_is_served_by_another_or_by_the_same_one_restarted(tmp_path, count):
    ports = free_ports(count)
    engines = tuple(entry(port, served_as=MODEL, keep_running=True) for port in ports)

    async def during(http, api, private):
        async with asyncio.timeout(20):
            while await counted(http, private, "throttllem_engine_up{") < count:
                await asyncio.sleep(0.01)
        for port in ports:
            await first_token_after(http, f"http://127.0.0.1:{port}", 2.0)
        begun = [asyncio.create_task(stream(http, api, 5)) for _ in range(2 * count)]
        whole = {"model": MODEL, "prompt": "Hello", "max_tokens": 3}
        body = asyncio.create_task(http.post(f"{api}/completions", json=whole).__aenter__())
        async with asyncio.timeout(20):
            while await counted(http, private, "throttllem_dispatched_requests_total") < 2 * count + 1:
                await asyncio.sleep(0.01)
        killed = pids(tmp_path)[f"127.0.0.1-{ports[0]}"]
        os.kill(killed, signal.SIGKILL)
        assert await asyncio.gather(*begun) == [5] * (2 * count)
        answer = await body
        assert answer.status == 200, await answer.text()
        arrived, retried, failed = [
            await counted(http, private, f"throttllem_{name}")
            for name in (
                "arrived_requests_total",
                "retried_requests_total",
                'requests_total{model="paced",outcome="failed"}',
            )
        ]
        assert (arrived, failed) == (2 * count + 1, 0), "each counts once"
        assert retried >= 2

    lived(run_gateway(options(tmp_path, engines=engines), tmp_path), during)


def test_a_stream_in_its_midst_is_not_tried_again(tmp_path):
    ports = free_ports(2)

    async def during(http, api, private):
        async with asyncio.timeout(20):
            while await counted(http, private, "throttllem_engine_up{") < 2:
                await asyncio.sleep(0.01)
        body = {"model": MODEL, "prompt": "Hello", "max_tokens": 400, "stream": True}
        async with http.post(f"{api}/completions", json=body) as response:
            await response.content.readuntil(MARK)
            for pid in pids(tmp_path).values():
                os.kill(pid, signal.SIGKILL)
            text = await response.read()
        assert b"[DONE]" not in text and b'"error"' in text
        assert await counted(http, private, "throttllem_retried_requests_total") == 0

    lived(
        run_gateway(options(tmp_path, engines=tuple(entry(port, served_as=MODEL) for port in ports)), tmp_path), during
    )


@pytest.mark.slow
def test_sizes_are_processes_of_their_own_and_no_stream_is_cut_when_one_takes_over(tmp_path):
    one, two = free_ports(2)
    engines = (entry(one, served_as=MODEL), entry(two, tp=2, served_as=MODEL))
    scale = AutoscaleOptions(capacity_rps={1: 3.0, 2: 300.0}, interval_s=0.2, window_s=0.5, grace_s=1.0)
    sizes = set()

    async def during(http, api, private):
        running = [asyncio.create_task(stream(http, api, 60))]  # 3 s: it outlasts the takeover
        async with asyncio.timeout(40):
            while frozenset(pids(tmp_path)) != {f"127.0.0.1-{one}"}:
                running.append(asyncio.create_task(stream(http, api, 10)))
                sizes.add(frozenset(pids(tmp_path)))
                await asyncio.sleep(1.0)
            while frozenset(pids(tmp_path)) != {f"127.0.0.1-{two}"}:
                running.append(asyncio.create_task(stream(http, api, 10)))
                sizes.add(frozenset(pids(tmp_path)))
                await asyncio.sleep(0.02)
        counts = await asyncio.gather(*running)
        assert counts == [60, *(10 for _ in counts[1:])]

    some = options(tmp_path, engines=engines, autoscale=scale).model_copy(update={"policy": "triton+autoscale"})
    lived(run_gateway(some, tmp_path), during)
    assert frozenset((f"127.0.0.1-{one}", f"127.0.0.1-{two}")) in sizes  # the shadow instance
    assert pids(tmp_path) == {}


def test_a_killed_gateways_engine_is_adopted_with_the_same_process(tmp_path, caplog):
    port = free_port()
    settings = {"policy": "triton", "state_dir": tmp_path / "state", "server.port": 0, "server.metrics_port": 0}
    settings |= {"engines.0.kind": "openai", "engines.0.url": f"http://127.0.0.1:{port}", "engines.0.command": COMMAND}
    words = [Path(sys.executable).with_name("throttllem"), "serve"]
    words += [f"--set={key}={value}" for key, value in settings.items()]
    seen = []

    async def first():
        killed = await asyncio.create_subprocess_exec(*words, stderr=subprocess.PIPE)
        async with asyncio.timeout(40):
            while not (line := (await killed.stderr.readline()).decode()).startswith("API"):
                pass
            async with aiohttp.ClientSession() as http:
                assert await stream(http, line.split()[1], 3) == 3
        seen.append(pids(tmp_path))
        killed.kill()
        await killed.communicate()

    async def during(http, api, private):
        assert await stream(http, api, 3) == 3
        seen.append(pids(tmp_path))
        assert f"adopted from an earlier gateway (pid {next(iter(seen[0].values()))})" in await notes(http, private)

    async def notes(http, private):
        async with http.get(f"{private}/dashboard/state") as page:
            return await page.text()

    asyncio.run(first())
    assert all(map(is_there, seen[0].values()))
    lived(run_gateway(options(tmp_path, engines=(entry(port),)), tmp_path), during)
    assert seen[0] == seen[1]
    assert not any(map(is_there, seen[0].values()))


def test_an_engine_that_keeps_running_is_there_for_the_next_gateway(tmp_path):
    port, seen = free_port(), []

    async def during(http, api, private):
        assert await stream(http, api, 3) == 3
        seen.append(pids(tmp_path))

    lived(run_gateway(options(tmp_path, engines=(entry(port, keep_running=True),)), tmp_path), during)
    (pid,) = seen[0].values()
    assert is_there(pid)
    lived(run_gateway(options(tmp_path, engines=(entry(port),)), tmp_path), during)
    os.waitpid(pid, 0)  # adopted engines are children of no gateway, but this one is a child of the tests
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (COMMAND, "-- engine openai-tp1: the engine at http://127.0.0.1:{port} cannot be reached: "),
        (COMMAND, "serve would start it: env PYTHONPATH="),
        ("no-such-engine {port}", "its command cannot be started: there is no program no-such-engine"),
    ],
)
def test_a_check_names_what_would_be_started_and_starts_nothing(tmp_path, command, text):
    port = free_port()
    some = options(tmp_path, engines=(entry(port, command=command),), server=ServerOptions(port=0))
    found = text_of(asyncio.run(check_configuration(some, {}, tmp_path)))
    assert text.format(port=port) in found
    assert not (tmp_path / "state").exists()


def test_an_engine_of_no_entry_is_named_in_the_log(tmp_path, caplog):
    async def during(http, api, private):
        pass

    folder = tmp_path / "state/engines"
    folder.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True) as process:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        record = {"pid": process.pid, "start_ticks": int(fields[19]), "boot": boot, "words": ["serve"]}
        (folder / "127.0.0.1-9.json").write_text(json.dumps(record))
        lived(run_gateway(options(tmp_path), tmp_path), during)
        assert is_there(process.pid)
        process.kill()
    assert f"engine 127.0.0.1-9 (pid {process.pid}) was started by an earlier gateway" in caplog.text
