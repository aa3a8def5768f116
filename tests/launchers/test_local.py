"""Processes of this host: started, found again by another launcher, ended with all that they started."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launchers.fake import command
from throttllem.launchers.base import LaunchError
from throttllem.launchers.local import LocalLauncher

SLEEPS = (sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)")


@contextlib.asynccontextmanager
async def local(folder, **more):
    """A launcher whose engines end with the block."""
    launcher = LocalLauncher(folder / "engines", **more)
    try:
        yield launcher
    finally:
        for launched in await launcher.listed():
            await launcher.stop(launched.engine_id)


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def launched(words=SLEEPS, **environment):
    return command(words=words, port=closed_port(), **environment)


async def eventually(condition, within_s=10.0):
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)


def is_there(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def pid_of(launched):
    return int(launched.incarnation.split()[1])


def test_its_output_is_in_its_log_and_that_of_the_run_before_beside_it(tmp_path):
    async def run():
        async with local(tmp_path) as launcher:
            for number in (1, 2):
                words = (sys.executable, "-c", f"import sys; print('out', {number}); sys.exit('error {number}')")
                found = await launcher.launch(launched(words))
                why = (await launcher.watch(found.engine_id)).why
                assert f"process {pid_of(found)} ended with status 1; its log ends: " in why
                assert await launcher.listed() == ()
            return Path(found.log)

    log = asyncio.run(run())
    assert sorted(log.read_text().split("\n")) == ["", "error 2", "out 2"]
    assert "out 1" in log.with_suffix(".log.1").read_text()
    assert (log.stat().st_mode & 0o077, log.parent.stat().st_mode & 0o077) == (0, 0)


def test_an_engine_gets_its_variables_and_none_of_the_gateways_options(tmp_path, monkeypatch):
    monkeypatch.setenv("THROTTLLEM_SERVER__API_KEYS", "secret")
    monkeypatch.setenv("HF_HOME", "there")
    words = (sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))")

    async def run():
        async with local(tmp_path) as launcher:
            found = await launcher.launch(launched(words, CUDA_VISIBLE_DEVICES="GPU-1", THROTTLLEM_STATS="steps.sock"))
            await launcher.watch(found.engine_id)
            return json.loads(Path(found.log).read_text())

    seen = asyncio.run(run())
    assert (seen["CUDA_VISIBLE_DEVICES"], seen["THROTTLLEM_STATS"], seen["HF_HOME"]) == ("GPU-1", "steps.sock", "there")
    assert "THROTTLLEM_SERVER__API_KEYS" not in seen


def test_what_listens_on_its_port_is_the_engine_and_is_left_alone(tmp_path):
    async def run(port):
        async with local(tmp_path) as launcher:
            found = await launcher.launch(command(words=SLEEPS, port=port))
            await launcher.stop(found.engine_id)
            return found

    with socket.create_server(("127.0.0.1", 0)) as server:
        assert asyncio.run(run(server.getsockname()[1])).incarnation is None
    assert not (tmp_path / "engines").exists()


def test_all_that_an_engine_started_ends_with_it(tmp_path):
    """Also those that ignore SIGTERM, and those that outlive its first process."""
    child = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    )
    parent = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        "print(p.pid, flush=True); "
    )

    async def run(ends, stop):
        async with local(tmp_path, stop_s=0.5) as launcher:
            found = await launcher.launch(launched((sys.executable, "-c", parent + ends)))
            await eventually(lambda: "ready" in Path(found.log).read_text())
            worker = int(next(line for line in Path(found.log).read_text().split() if line.isdigit()))
            await (launcher.stop(found.engine_id) if stop else launcher.watch(found.engine_id))
            await eventually(lambda: not is_there(worker))
            assert not is_there(pid_of(found))

    asyncio.run(run("time.sleep(60)", stop=True))
    asyncio.run(run("time.sleep(0.5)", stop=False))


def test_a_killed_gateways_engine_is_adopted_and_never_started_twice(tmp_path):
    """The first launcher is in a process of its own, which is killed."""
    port = closed_port()
    gateway = f"""
import asyncio, sys
from launchers.fake import command
from throttllem.launchers.local import LocalLauncher
from pathlib import Path
async def main():
    found = await LocalLauncher(Path({str(tmp_path)!r}) / "engines").launch(command(words={SLEEPS!r}, port={port}))
    print(found.incarnation, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", gateway], stdout=subprocess.PIPE, env=environment) as first:
        incarnation = first.stdout.readline().decode().strip()
        first.kill()

    async def run():
        async with local(tmp_path) as launcher:
            (listed,) = await launcher.listed()
            found = await launcher.launch(command(words=SLEEPS, port=port))
            assert listed == found
            assert (found.incarnation, found.adopted) == (incarnation, True)
            pid = pid_of(found)
            began_s = time.monotonic()
            await launcher.stop(found.engine_id)
            await eventually(lambda: not is_there(pid))
            assert time.monotonic() - began_s < 10
            assert await LocalLauncher(tmp_path / "engines").listed() == ()

    asyncio.run(run())


def test_a_gateway_that_is_killed_before_it_noted_a_process_leaves_none(tmp_path):
    mark = str(tmp_path / "mark")
    gateway = f"""
import asyncio, os
from launchers.fake import command
from throttllem.launchers.local import LocalLauncher
from pathlib import Path
class Killed(LocalLauncher):
    def _remember(self, engine_id, found):
        print(found.record.pid, flush=True)
        os.kill(os.getpid(), 9)
words = ({sys.executable!r}, "-c", "import pathlib, time; pathlib.Path({mark!r}).touch(); time.sleep(60)")
asyncio.run(Killed(Path({str(tmp_path)!r}) / "engines").launch(command(words=words, port={closed_port()})))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", gateway], stdout=subprocess.PIPE, env=environment, check=False)
    assert done.returncode == -9
    end_s = time.monotonic() + 10
    while is_there(int(done.stdout)) and time.monotonic() < end_s:
        time.sleep(0.01)
    assert not is_there(int(done.stdout))
    assert not Path(mark).exists()


@pytest.mark.parametrize("change", ["start_ticks", "boot", "pid"])
def test_a_process_that_only_has_the_number_is_not_adopted_nor_ended(tmp_path, change):
    with subprocess.Popen(SLEEPS, stdout=subprocess.DEVNULL, start_new_session=True) as stranger:
        fields = {"pid": stranger.pid, "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip()}
        stat = Path(f"/proc/{stranger.pid}/stat").read_text().rpartition(")")[2].split()
        fields |= {"start_ticks": int(stat[19]), "words": SLEEPS}
        fields[change] = {"start_ticks": 1, "boot": "another", "pid": 2**22 + 1}[change]
        (tmp_path / "engines").mkdir()
        (tmp_path / "engines/engine-1.json").write_text(json.dumps(fields))

        async def run():
            async with local(tmp_path) as launcher:
                assert await launcher.listed() == ()
                await launcher.stop("engine-1")

        asyncio.run(run())
        assert is_there(stranger.pid)
        stranger.kill()
    assert not (tmp_path / "engines/engine-1.json").exists()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"pid": "x", "words": 3}'])
def test_a_record_that_cannot_be_read_adopts_nothing_and_is_logged(tmp_path, caplog, text):
    async def run():
        (tmp_path / "engines").mkdir()
        (tmp_path / "engines/engine-1.json").write_text(text)
        async with local(tmp_path) as launcher:
            assert await launcher.listed() == ()
            return await launcher.launch(launched())

    assert asyncio.run(run()).incarnation
    assert "no engine is adopted by it" in caplog.text


def test_a_command_that_cannot_be_started_says_why(tmp_path):
    async def run():
        async with local(tmp_path) as launcher:
            await launcher.launch(launched(("no-such-engine",)))

    with pytest.raises(LaunchError, match="no-such-engine cannot be started: there is no such program"):
        asyncio.run(run())


def test_an_engine_whose_process_cannot_be_noted_does_not_go_on(tmp_path):
    async def run():
        (tmp_path / "engines/engine-1.json").mkdir(parents=True)
        launcher = LocalLauncher(tmp_path / "engines")
        with pytest.raises(LaunchError, match="cannot be noted"):
            await launcher.launch(launched())
        await eventually(lambda: not launcher._running)

    asyncio.run(run())


def test_a_closed_launcher_leaves_its_engines_running(tmp_path):
    async def run():
        launcher = LocalLauncher(tmp_path / "engines")
        found = await launcher.launch(launched())
        launcher.close()
        assert is_there(pid_of(found))
        async with local(tmp_path) as following:
            assert [each.incarnation for each in await following.listed()] == [found.incarnation]
        os.waitpid(pid_of(found), 0)

    asyncio.run(run())
