"""Several engines of one model side by side: all are brought up, share the requests, and are lost one at a time."""

import asyncio
import math
from collections import Counter

import pytest

from gateway.rig import outcome, parsed, rig, virtually
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.clocks.sizing import AutoscaleOptions
from throttllem.core.pool.pool import PoolOptions
from throttllem.core.types import Dispatch, EngineLost, Slo, StopEngine
from throttllem.engines.base import PromptCount
from throttllem.engines.prefix_cache import blocks_of
from throttllem.gateway.telemetry.status import gateway_status


def pool(*sizes):
    return {"pool": PoolOptions(gpus=sum(sizes), engines=Counter(sizes), start_s=math.inf)}


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2)])
def test_all_come_up_and_share_the_requests(sizes):
    async def run():
        async with rig(sizes=sizes, core=pool(*sizes)) as it:
            await it.up()
            requests = [asyncio.ensure_future(outcome(it.request(tokens=40))) for _ in range(12)]
            await asyncio.sleep(0.1)
            held = [backend.in_flight for backend in it.loop.backends]
            least = it.loop.serving()
            status = gateway_status(it.models)
            return await asyncio.gather(*requests), held, least, status, it

    ends, held, least, status, it = virtually(run())
    assert set(ends) == {"served"}
    share = 12 / sum(sizes)
    assert held == [share * tp for tp in sizes], "in proportion to the GPUs"
    assert least.in_flight == 0 and len(status.models[0].engines) == len(sizes)
    assert {command.engine for command in it.seen.commands(Dispatch)} == set(range(len(sizes)))


def test_one_that_does_not_come_up_holds_up_no_other():
    async def run():
        async with rig(sizes=(1, 1), core=pool(1, 1)) as it:
            await it.loop.backends[0].engine.kill(back=False)
            await asyncio.sleep(30.0)
            ends = [await outcome(it.request(tokens=5)) for _ in range(3)]
            states = [backend.state for backend in it.loop.backends]
            it.loop.backends[0].engine.gone = False
            await it.up()
            return ends, states, [backend.state for backend in it.loop.backends], it.seen.commands(StopEngine)

    ends, before, after, stopped = virtually(run())
    assert set(ends) == {"served"}
    assert (before, after, stopped) == (["starting", "up"], ["up", "up"], [])


def test_a_loss_ends_what_ran_there_and_nothing_else_and_the_engine_is_taken_into_use_again():
    async def run():
        async with rig(sizes=(1, 1), core=pool(1, 1)) as it:
            await it.up()
            requests = [asyncio.ensure_future(outcome(it.request(tokens=100))) for _ in range(8)]
            await asyncio.sleep(0.2)
            await it.loop.backends[1].engine.kill(back=False)
            ends = await asyncio.gather(*requests)
            lost = it.seen.events(EngineLost)
            while_down = [await outcome(it.request(tokens=5)) for _ in range(3)]
            it.loop.backends[1].engine.gone = False
            await it.up()
            again = [asyncio.ensure_future(outcome(it.request(tokens=20))) for _ in range(4)]
            await asyncio.sleep(0.05)
            shared = [backend.in_flight for backend in it.loop.backends]
            return ends, lost, while_down, await asyncio.gather(*again), shared

    ends, lost, while_down, again, shared = virtually(run())
    assert Counter(end == "served" for end in ends) == {True: 4, False: 4}
    assert [event.engine for event in lost] == [1]
    assert set(while_down) == set(again) == {"served"} and shared == [2, 2]


@pytest.mark.parametrize("policy", [ClockPolicy.THROTTLLEM, ClockPolicy.LEAST_ENERGY])
def test_as_many_as_the_load_calls_for_and_no_request_is_lost(policy):
    scale = AutoscaleOptions(capacity_rps={1: 20.0}, interval_s=0.2, window_s=0.5, grace_s=1.0)

    async def run():
        async with rig(policy=policy, sizes=(1, 1, 1), core=pool(1, 1, 1) | {"autoscale": scale}) as it:
            await it.up()
            requests, up = [], []
            for gap_s, count in ((0.5, 60), (0.01, 400), (0.5, 60)):
                for _ in range(count):
                    requests.append(asyncio.ensure_future(outcome(it.request(tokens=30))))
                    await asyncio.sleep(gap_s)
                up.append(sum(backend.state == "up" for backend in it.loop.backends))
            await asyncio.sleep(300.0)
            up.append(sum(backend.state == "up" for backend in it.loop.backends))
            return await asyncio.gather(*requests), up, it.seen.commands(StopEngine)

    ends, (quiet, busy, _, again), stopped = virtually(run())
    assert set(ends) == {"served"}
    assert quiet == again == 1 < busy and len(stopped) >= 2


def test_a_request_goes_to_the_engine_that_has_its_prompt_and_is_planned_with_that():
    async def run():
        async with rig(sizes=(1, 1), core=pool(1, 1), prefix_caching=True, block_tokens=4) as it:
            await it.up()
            others = blocks_of(range(40), 4, "toy"), blocks_of(range(100, 140), 4, "toy")
            it.loop.backends[1].prefixes.sent(-1, others[0])
            it.loop.backends[0].prefixes.sent(-2, others[1])
            found = []
            for blocks in (*others, blocks_of(range(200, 240), 4, "toy")):
                count = PromptCount(tokens=40, by="test", exact=True, blocks=blocks)
                async with it.models.session(parsed(), count, Slo()) as session:
                    backend = await session.placed()
                    flights = backend.progress.in_flight.values()
                    found.append((it.loop.backends.index(backend), [flight.prompt_tokens for flight in flights]))
                    planned = it.loop.controller._engines.by_request[session.request.id].board
                    request = next(iter(planned.sequences())).request
                    assert request == session.request
            return found

    assert virtually(run()) == [(1, [4]), (0, [4]), (0, [40])]
