"""The core fails at an engine's event: its books of that engine are built again, and service goes on."""

import asyncio
import json

import pytest

from gateway.rig import outcome, rig, virtually
from gateway.test_driver_faults import failing
from tests.gateway.peer import asks, told, until, with_peer
from throttllem.core.types import Arrived, EngineLost, EngineReady, Stepped


@pytest.mark.parametrize("iteration", [2**62, 2**63 - 2, 2**63, 2**70])
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_books_that_an_iteration_has_ruined_are_built_again(tmp_path, iteration, busy):
    """Numbers that the columns of the scoreboard cannot hold: every request failed at them until a restart."""

    async def health(there):
        status, page = await there.client.get("/health")
        return status, json.loads(page)["status"]

    async def check(there, peer):
        running = asks(there, 4, 300) if busy else []
        await until(lambda: peer.open == len(running))
        there.loop.handle(Stepped(engine=there.backend.key, iteration=iteration))
        failures = 0
        while not (await told(asks(there, 1, 3)))[0].served:
            assert (await health(there))[1] == "degraded"
            failures += 1
        assert failures <= 3
        assert all(answer.served for answer in await told(asks(there, 8, 3)))
        assert await health(there) == (200, "ok")
        await told(running)

    with_peer(check, tmp_path)


@pytest.mark.parametrize("kind", [Stepped, EngineReady, EngineLost])
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("half", [False, True], ids=["before", "after"])
def test_a_failure_at_an_engines_event_stops_nobody_for_long(kind, times, half):
    """`half`: the core fails when it has taken the event in."""

    async def run():
        async with rig(numbered=True) as it:
            await it.up()
            healthy, count = it.loop.controller.take_in, 0

            def take_in(event, now_s):
                nonlocal count
                fails = isinstance(event, kind) and count < times
                count += fails
                if not fails or half:
                    found = healthy(event, now_s)
                if fails:
                    raise OverflowError("a fault of the core")
                return found

            it.loop.controller.take_in = take_in
            asked = asyncio.ensure_future(outcome(it.ask()))
            await asyncio.sleep(0.02)
            if kind is not Stepped:
                await it.backend.engine.kill()
            await asked
            await asyncio.sleep(6.0)
            seen = [await outcome(it.ask()) for _ in range(times)]
            await asyncio.sleep(6.0)
            return (
                count,
                seen[-1],
                await outcome(it.ask()),
                it.models.health(),
                len(it.loop.controller.snapshot().engines),
            )

    count, _, last, health, engines = virtually(run())
    assert (count, last, health.up, health.ails, engines) == (times, "served", 1, False, 1)


def test_an_engine_is_connected_again_if_the_core_fails_at_several_arrivals():
    async def run():
        async with rig() as it:
            await it.up()
            first = it.backend.key
            failing(it, lambda event: isinstance(event, Arrived) and it.backend.key == first)
            seen, healths = [], []
            for _ in range(5):
                seen.append(await outcome(it.ask()))
                healths.append(it.models.health().ails)
                await asyncio.sleep(0.5)
                await it.up()
            return seen, healths

    broken = ["internal_error"] * 3
    assert virtually(run()) == ([*broken, "served", "served"], [True, True, True, False, False])


def test_a_core_that_always_fails_is_not_called_well():
    async def run():
        async with rig() as it:
            await it.up()
            failed = failing(it, lambda event: isinstance(event, Arrived))
            for _ in range(20):
                assert await outcome(it.ask()) == "internal_error"
                assert it.models.health().ails
                await asyncio.sleep(0.25)
            assert it.backend.engine.connects < 10
            return len(failed)

    assert virtually(run()) == 20
