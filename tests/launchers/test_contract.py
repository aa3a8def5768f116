"""One contract for all launchers: the fake of the tests, engines that run already, processes of this host."""

import asyncio
from functools import partial

import pytest

from launchers.contract import CHECKS
from launchers.fake import FakeLauncher, command
from launchers.test_local import SLEEPS, closed_port, local
from launchers.test_remote import remote
from throttllem.launchers.running import RunningLauncher


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("launcher", [FakeLauncher, RunningLauncher])
def test_without_processes(launcher, check):
    asyncio.run(check(launcher(), lambda *more: command(words=("serve", *more))))


@pytest.mark.parametrize("check", CHECKS)
def test_a_launcher_in_another_process(tmp_path, check):
    async def run():
        async with remote(tmp_path, FakeLauncher()) as launcher:
            await check(launcher, lambda *more: command(words=("serve", *more)))

    asyncio.run(run())


@pytest.mark.parametrize("check", CHECKS)
def test_processes_of_this_host(tmp_path, check):
    async def run():
        async with local(tmp_path) as launcher:
            await check(launcher, lambda *more: partial(command, port=closed_port())(words=(*SLEEPS, *more)))

    asyncio.run(run())
