"""The launcher on a real Ray: one node on loopback, the launcher in a process of its own, light engines."""

import asyncio
import os
import re
import signal
import sys
import time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from gateway.test_launched_engines import metrics_of, stream
from gateway.test_run import lived, options
from launchers.contract import CHECKS
from launchers.fake import command

from throttllem.config import EngineEntry
from throttllem.gateway.run import run_gateway
from throttllem.launchers.base import LaunchError
from throttllem.launchers.remote import RemoteLauncher
from tools.testbed.private import private_folder
from tools.testbed.processes import free_port, group, started

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".engines/ray"
HOST = "127.0.0.9"
"""Ray takes 127.0.0.1 for the address of another interface."""
SLEEPS = (sys.executable, "-c", "import time; time.sleep(60)")
VARIABLES = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT / "src")}
VARIABLES |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-the-tests-that-is-long-enough"}


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of one node."""
    if not ENVIRONMENT.exists():
        pytest.skip("no Ray in .engines: `make engines` installs it")
    port = free_port()
    with private_folder("ray-") as folder:
        words = [ENVIRONMENT / "bin/ray", "start", "--head", "--block", f"--node-ip-address={HOST}", f"--port={port}"]
        words += ["--num-cpus=1", "--include-dashboard=false", f"--temp-dir={folder}", "--disable-usage-stats"]
        log = folder / "start.log"
        with started(words, log, ready=lambda: b"runtime started" in log.read_bytes(), environment=VARIABLES):
            yield f"{HOST}:{port}"


@contextmanager
def launcher_process(cluster, folder):
    path = folder / "launcher.sock"
    path.unlink(missing_ok=True)
    words = [ENVIRONMENT / "bin/python", "-m", "throttllem.launchers", "--ray", cluster, "--socket", path]
    with started(words, folder / "launcher.log", ready=path.exists, environment=VARIABLES) as process:
        yield process, path


@asynccontextmanager
async def ended(launcher):
    try:
        yield launcher
    finally:
        for launched in await launcher.listed():
            await launcher.stop(launched.engine_id)


@pytest.fixture(scope="module")
def socket(cluster):
    with private_folder("launcher-") as folder, launcher_process(cluster, folder) as (_, path):
        yield path


def on_ray(words=SLEEPS, host=HOST, **more):
    return command(words=tuple(words), port=free_port(), host=host, gpus=1, **more)


def processes(mark):
    """Those whose command holds a text."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


async def eventually(condition, within_s=20.0):
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("check", CHECKS)
def test_contract(socket, check):
    async def run():
        async with ended(RemoteLauncher(socket)) as launcher:
            await check(launcher, lambda *more: on_ray((*SLEEPS, *more)))

    asyncio.run(run())


def test_a_crash_is_known_at_once_and_with_certainty(socket):
    async def run():
        async with ended(RemoteLauncher(socket)) as launcher:
            mark = "crashes-here"
            await launcher.launch(on_ray((*SLEEPS, mark)))
            watching = asyncio.create_task(launcher.watch("engine-1"))
            await asyncio.sleep(1.0)
            (pid,) = processes(mark)
            began_s = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            end = await asyncio.wait_for(watching, 10)
            return pid, end, time.monotonic() - began_s, await launcher.listed()

    pid, end, seconds, listed = asyncio.run(run())
    assert (end.certain, listed) == (True, ())
    assert f"process {pid} ended by signal SIGKILL" in end.why
    assert seconds < 5


def test_a_killed_actor_takes_its_engine_along_and_its_end_is_uncertain(socket):
    async def run():
        async with ended(RemoteLauncher(socket)) as launcher:
            mark = "actor-dies"
            await launcher.launch(on_ray((*SLEEPS, mark)))
            watching = asyncio.create_task(launcher.watch("engine-1"))
            await asyncio.sleep(1.0)
            (pid,) = processes(mark)
            parent = int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
            os.kill(parent, signal.SIGKILL)
            end = await asyncio.wait_for(watching, 20)
            await eventually(lambda: not processes(mark))
            again = await launcher.launch(on_ray((*SLEEPS, mark)))
            return end, again

    end, again = asyncio.run(run())
    assert not end.certain
    assert again.incarnation is not None


def test_a_killed_launcher_leaves_its_engines_and_the_next_one_finds_them(cluster):
    async def run(path, kill, again):
        launcher, mark = RemoteLauncher(path), "stays"
        first = await launcher.launch(on_ray((*SLEEPS, mark)))
        (pid,) = processes(mark)
        kill()
        with pytest.raises(LaunchError, match="cannot be reached"):
            await launcher.listed()
        with again():
            async with ended(launcher):
                (listed,) = await launcher.listed()
                assert (listed.incarnation, listed.adopted) == (first.incarnation, True)
                assert processes(mark) == [pid]

    with private_folder("launcher-") as folder, launcher_process(cluster, folder) as (process, path):
        asyncio.run(
            run(path, lambda: (process.handle.kill(), process.handle.wait()), lambda: launcher_process(cluster, folder))
        )
        assert group(process.pid) == []


@pytest.mark.parametrize(
    ("words", "host", "reason"),
    [
        (SLEEPS, "127.0.0.77", "127.0.0.77 of its url is no node of the Ray cluster, which has 127.0.0.9"),
        (("no-such-engine",), HOST, "No such file or directory"),
    ],
)
def test_a_start_that_fails_says_why_and_leaves_nothing(socket, words, host, reason):
    async def run():
        async with ended(RemoteLauncher(socket)) as launcher:
            with pytest.raises(LaunchError, match=reason):
                await launcher.launch(on_ray(words, host))
            return await launcher.listed()

    assert asyncio.run(run()) == ()


def test_a_gateway_serves_with_an_engine_that_ray_started_and_stops_it(socket, tmp_path):
    port = free_port()
    words = f"env PYTHONPATH={ROOT} {sys.executable} -m tools.testbed.engines.openai_engine {{port}} --host {{host}}"
    entry = EngineEntry(kind="openai", url=f"http://{HOST}:{port}", command=words, launcher=socket)

    async def during(http, api, private):
        assert await stream(http, api, 5) == 5
        async with http.get(f"{private}/dashboard/state") as page:
            assert "started by the gateway (Ray actor" in await page.text()
        (pid,) = processes(f"openai_engine\0{port}")
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(20):
            while not re.search(r"process_failures_total\{.*\} 1.0", await metrics_of(http, private)):
                await asyncio.sleep(0.02)
        assert await stream(http, api, 5) == 5

    lived(run_gateway(options(tmp_path, engines=(entry,)), tmp_path), during)
    assert processes(f"openai_engine\0{port}") == []
