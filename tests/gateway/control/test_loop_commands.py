"""What the control loop counts, and how it carries out the core's commands for clocks and sizes."""

import asyncio

import pytest

from gateway.rig import outcome, rig, virtually
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.clocks.sizing import AutoscaleOptions
from throttllem.core.types import ClockRead, Dispatch, SetClock, StartEngine, StopEngine
from throttllem.gateway.telemetry.status import gateway_status

# ---- counts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("usage", [True, False])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("choices", [1, 2])
def test_tokens_are_counted_streamed_or_not(stream, choices, usage):
    """Without a count by the engine: those of the stream, or of the steps in which the request ran. The prompt counts
    once.
    """

    async def run():
        async with rig() as it:
            await it.up()
            await it.request(stream=stream, choices=choices, tokens=7, count=5, usage=usage)
            return it.loop.prompt_tokens, it.loop.generated_tokens

    assert virtually(run()) == (5, 7 * choices)


def test_retry_after_follows_the_rate_of_ends_and_stays_within_a_minute():
    async def run():
        async with rig(max_batch=1) as it:
            await it.up()
            loop = it.loop
            found = [loop.retry_after_s()]
            requests = [asyncio.ensure_future(outcome(it.request(tokens=n))) for n in (5, 5, 240)]
            await asyncio.sleep(1.0)
            found.append(loop.retry_after_s())
            requests += [asyncio.ensure_future(outcome(it.request(tokens=200))) for _ in range(200)]
            await asyncio.sleep(0.5)
            found.append(loop.retry_after_s())
            for task in requests:
                task.cancel()
            await asyncio.gather(*requests)
            await asyncio.sleep(120.0)
            return [*found, loop.retry_after_s()]

    first, flowing, crowded, later = virtually(run())
    assert first == later == 5
    assert flowing == 1
    assert crowded == 60


# ---- clocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "clocks"), [(ClockPolicy.TOP, set()), (ClockPolicy.THROTTLLEM, {600}), (ClockPolicy.LEAST_ENERGY, {600})]
)
def test_the_policy_sets_the_clock(policy, clocks):
    async def run():
        async with rig(policy=policy) as it:
            await it.up()
            await asyncio.gather(*(it.request(tokens=60) for _ in range(4)))
            return {command.plan.mhz for command in it.seen.commands(SetClock)}, it.backend.gpu.read().clock_mhz

    commanded, in_force = virtually(run())
    assert commanded == clocks
    assert in_force == (min(clocks) if clocks else 1400)


def test_a_clock_that_cannot_be_set_is_tried_once_a_second_and_requests_are_served():
    class Stuck:
        tries = 0

        def __init__(self, gpu):
            self.gpu = gpu

        def __getattr__(self, name):
            return getattr(self.gpu, name)

        async def set_clock(self, mhz, sent=None):
            Stuck.tries += 1
            raise OSError("not permitted: run as root")

    async def run():
        async with rig() as it:
            it.backend.clock.gpu = Stuck(it.backend.gpu)
            await it.up()
            ends = await asyncio.gather(*(outcome(it.request(tokens=100)) for _ in range(5)))
            (view,) = it.loop.controller.snapshot().engines
            trouble = it.backend.trouble
            plan, tries, now_s = view.plan, Stuck.tries, it.loop.now()
            it.backend.clock.gpu = it.backend.gpu
            await asyncio.sleep(1.5)
            return ends, trouble, plan, tries, now_s, it.backend.trouble, it.seen.events(ClockRead)[-1].mhz

    ends, trouble, plan, tries, now_s, after, known = virtually(run())
    assert ends == ["served"] * 5
    assert trouble == "clock: not permitted: run as root"
    assert (plan.mhz, plan.why.name) == (1400, "UNKNOWN_STATE")
    assert 2 <= tries <= now_s + 3
    assert (after, known) == (None, 1400)


# ---- sizes ---------------------------------------------------------------------------------------------------


def test_sizes_follow_the_load_and_no_request_is_lost():
    scale = AutoscaleOptions(capacity_rps={1: 4.0, 2: 400.0}, interval_s=0.2, window_s=0.5, grace_s=1.0)

    async def run():
        async with rig(policy=ClockPolicy.THROTTLLEM, sizes=(1, 2), core={"autoscale": scale}) as it:
            requests = []
            await it.up()
            for gap_s, count in ((0.02, 50), (0.5, 9), (0.02, 50), (0.5, 9)):
                for _ in range(count):
                    requests.append(asyncio.ensure_future(outcome(it.request(tokens=6))))
                    await asyncio.sleep(gap_s)
                gateway_status(it.models)
            return await asyncio.gather(*requests), it, it.seen.commands(StopEngine)

    ends, it, stopped = virtually(run())
    assert set(ends) == {"served"}
    started = [command.tp for command in it.seen.commands(StartEngine)]
    assert started[:3] == [1, 2, 1]
    assert len(stopped) >= 2
    assert {command.engine for command in it.seen.commands(Dispatch)} >= {0, 1, 2}


def test_the_largest_engine_is_started_first():
    async def run():
        async with rig(sizes=(1, 2)) as it:
            await it.up()
            return [(backend.tp, backend.key) for backend in it.loop.backends], it.loop.serving().tp

    assert virtually(run()) == ([(1, None), (2, 0)], 2)


def test_a_size_that_was_just_stopped_can_be_started_at_once():
    closed = []

    async def close():
        closed.append("begun")
        await asyncio.sleep(0.5)
        closed.append("done")

    async def run():
        async with rig() as it:
            it.backend.close = close
            await it.up()
            it.backend.retire()
            assert it.backend.key is None
            it.backend.start(1, it.loop.handle)
            connects = it.backend.engine.connects
            await asyncio.sleep(0.4)
            assert it.backend.engine.connects == connects
            await it.up()
            assert it.backend.engine.connects == connects + 1
            assert closed == ["begun", "done"]
            assert await outcome(it.request()) == "served"

    virtually(run())
