"""What every launcher does, whatever it starts. Each check gets a launcher and a function from words to a command."""

import asyncio

from throttllem.launchers.base import NOT_RUN


async def an_id_runs_once(launcher, command):
    first, again = await launcher.launch(command()), await launcher.launch(command())
    assert (again.engine_id, again.incarnation) == (first.engine_id, first.incarnation)
    assert len(await launcher.listed()) == (first.incarnation is not None)


async def a_stopped_engine_is_gone_and_its_id_can_be_used_again(launcher, command):
    first = await launcher.launch(command())
    watching = asyncio.create_task(launcher.watch(first.engine_id))
    await asyncio.sleep(0)
    await launcher.stop(first.engine_id)
    assert await launcher.listed() == ()
    assert (await watching).why == (NOT_RUN.why if first.incarnation is None else "it was stopped")
    second = await launcher.launch(command())
    assert second.incarnation is None or second.incarnation != first.incarnation


async def what_does_not_run_can_be_stopped_and_watched(launcher, command):
    await launcher.stop("nothing")
    assert await launcher.watch("nothing") == NOT_RUN
    assert await launcher.listed() == ()


async def another_command_under_an_id_replaces_the_engine(launcher, command):
    first = await launcher.launch(command())
    second = await launcher.launch(command("other"))
    assert first.incarnation is None or second.incarnation != first.incarnation
    assert len(await launcher.listed()) == (first.incarnation is not None)


CHECKS = (
    an_id_runs_once,
    a_stopped_engine_is_gone_and_its_id_can_be_used_again,
    what_does_not_run_can_be_stopped_and_watched,
    another_command_under_an_id_replaces_the_engine,
)
