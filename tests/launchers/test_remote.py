"""A launcher at the other end of a Unix socket: what the gateway sees while it is there, busy, or gone."""

import asyncio
import contextlib
import stat

import pytest

from launchers.fake import FakeLauncher, command
from throttllem.launchers.base import Ended, LaunchError
from throttllem.launchers.remote import RemoteLauncher
from throttllem.launchers.server import serve_launcher


@contextlib.asynccontextmanager
async def remote(folder, launcher):
    """The gateway's end of `launcher`."""
    path = folder / "launcher.sock"
    path.unlink(missing_ok=True)
    serving = asyncio.create_task(serve_launcher(launcher, path))
    async with asyncio.timeout(5):
        while not path.exists():
            await asyncio.sleep(0.01)
    try:
        yield RemoteLauncher(path)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


def test_only_this_user_may_connect(tmp_path):
    async def run():
        async with remote(tmp_path, FakeLauncher()):
            return stat.S_IMODE((tmp_path / "launcher.sock").stat().st_mode)

    assert asyncio.run(run()) == 0o600


def test_a_start_that_fails_has_the_other_launchers_reason(tmp_path):
    async def run():
        launcher = FakeLauncher()
        launcher.refuses = "node 10.0.0.5 of the Ray cluster has no room for 4 GPUs"
        async with remote(tmp_path, launcher) as other:
            with pytest.raises(LaunchError, match="no room for 4 GPUs"):
                await other.launch(command())

    asyncio.run(run())


def test_while_the_other_launcher_is_gone_calls_fail_and_a_watch_goes_on(tmp_path):
    async def run():
        launcher = FakeLauncher()
        async with remote(tmp_path, launcher) as other:
            await other.launch(command())
            watching = asyncio.create_task(other.watch("engine-1"))
            await asyncio.sleep(0.05)
        for call in (other.launch(command()), other.stop("engine-1"), other.listed()):
            with pytest.raises(LaunchError, match="cannot be reached"):
                await call
        assert not watching.done()
        async with remote(tmp_path, launcher):
            assert [each.incarnation for each in await other.listed()] == ["run 1"]
            await asyncio.sleep(0.05)
            launcher.end("engine-1", "process 1 ended", certain=True)
            ended = await asyncio.wait_for(watching, 5)
        return ended

    # Either the watch had begun again, or it began after the end.
    assert asyncio.run(run()).why in ("process 1 ended", "it is not run by this launcher")


def test_a_start_goes_on_when_the_gateway_is_gone(tmp_path):
    """Or its engine would run under no id that anybody knows."""

    class Slow(FakeLauncher):
        async def launch(self, command):
            await asyncio.sleep(0.1)
            return await super().launch(command)

    async def run():
        launcher = Slow()
        async with remote(tmp_path, launcher) as other:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(other.launch(command()), 0.02)
            await asyncio.sleep(0.2)
            return launcher.starts

    assert asyncio.run(run()) == ["engine-1"]


@pytest.mark.parametrize("line", [b"\n", b"[]\n", b'{"method": "nothing"}\n', b'{"method": "launch"}\n', b"x" * 100])
def test_what_is_no_call_ends_its_connection_alone(tmp_path, line):
    async def run():
        async with remote(tmp_path, FakeLauncher()) as other:
            reader, writer = await asyncio.open_unix_connection(tmp_path / "launcher.sock")
            writer.write(line)
            writer.write_eof()
            answer = await asyncio.wait_for(reader.read(), 5)
            writer.close()
            await writer.wait_closed()
            assert await other.listed() == ()
            return answer

    assert asyncio.run(run()) in (b"", b'{"error": "the launcher knows no call \'nothing\'"}\n')


def test_an_end_that_is_uncertain_stays_so(tmp_path):
    async def run():
        launcher = FakeLauncher()
        async with remote(tmp_path, launcher) as other:
            await other.launch(command())
            watching = asyncio.create_task(other.watch("engine-1"))
            await asyncio.sleep(0.05)
            launcher.end("engine-1", "its Ray actor is lost", certain=False)
            return await asyncio.wait_for(watching, 5)

    assert asyncio.run(run()) == Ended(why="its Ray actor is lost", certain=False)
