"""Who waits too long is told so: for a place, for an engine, for a word of the engine."""

import asyncio
from types import SimpleNamespace

import pytest

from gateway.rig import asked, rig, virtually
from throttllem.config import LimitOptions
from throttllem.core.types import Slo, Stepped
from throttllem.engines.base import PromptCount
from throttllem.gateway.control.rejections import RejectedError

COUNT = PromptCount(tokens=4, by="test", exact=True)


async def refused(it, after=lambda: None, *, stream=True, tokens=0):
    """The refusal of a request that would wait for ever, and after how many seconds it came."""
    began_s = it.loop.now()
    it_asks = asked(stream=stream)
    with pytest.raises(RejectedError) as found:
        async with it.models.session(it_asks, COUNT, Slo(e2e_s=9e3), "") as held:
            await held.placed()
            if tokens:
                held.tokens(tokens)
            after()
            await asyncio.sleep(3600)
    return found.value, it.loop.now() - began_s


def test_no_place():
    async def run():
        async with rig(max_batch=1, limits=LimitOptions(queue_wait_s=2.0)) as it:
            await it.up()
            first = asyncio.ensure_future(it.ask(tokens=240))
            await asyncio.sleep(0.1)
            found = await refused(it)
            await first
            return *found, it.loop.slo_attainment.ever

    error, waited_s, ever = virtually(run())
    assert (error.status, error.code) == (503, "queue_timeout")
    assert 2.0 <= waited_s <= 2.6
    assert 1 <= error.retry_after_s <= 60
    assert (ever.with_slo, ever.met) == (1, 0)


def test_no_engine():
    async def run():
        async with rig(limits=LimitOptions(engine_wait_s=3.0)) as it:
            await it.up()
            await it.backend.engine.kill(back=False)
            await asyncio.sleep(1.0)
            return *(await refused(it)), it.loop.controller.snapshot().counts

    error, waited_s, counts = virtually(run())
    assert (error.status, error.code) == (503, "no_engine")
    assert error.detail == "nobody is there"
    assert 3.0 <= waited_s <= 3.6
    assert counts.rejected == 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("tokens", [0, 3])
def test_an_engine_that_says_nothing(stream, tokens):
    async def run():
        async with rig(mute=True, limits=LimitOptions(silence_s=4.0)) as it:
            await it.up()
            return await refused(it, stream=stream, tokens=tokens)

    error, waited_s = virtually(run())
    assert (error.status, error.code) == (504, "engine_silent")
    assert 4.0 <= waited_s <= 4.6


def test_an_engine_that_goes_on_with_others_is_waited_for():
    """Before its first token a request may wait in the engine; after it, its own tokens count."""

    async def run():
        async with rig(mute=True, limits=LimitOptions(silence_s=1.0)) as it:
            await it.up()
            other = asyncio.ensure_future(it.ask(tokens=200))
            _, unbegun_s = await refused(it)
            return unbegun_s, await other

    unbegun_s, other_end = virtually(run())
    assert unbegun_s > 2.5
    assert other_end is not None


def test_an_engine_without_any_sign_of_progress_is_given_times_own_steps():
    async def run():
        async with rig(mute=True) as it:
            await it.up()
            await it.ask(tokens=60, stream=False)
            return len(it.seen.events(Stepped)), it.loop.now()

    steps, spent_s = virtually(run())
    assert 30 <= steps <= 90, spent_s


def test_idle_time_is_booked_as_it_passes():
    async def run():
        async with rig() as it:
            await it.up()
            await it.ask(tokens=20)
            busy_w = it.backend.gpu.read().watts
            await asyncio.sleep(10.0)
            energy = it.backend.accounting.energy()
            return busy_w, energy

    busy_w, energy = virtually(run())
    assert energy.watts == 40.0 < busy_w
    assert energy.idle_j == pytest.approx(400.0, rel=0.05)


class Unreadable:
    """A GPU that can be read or not."""

    def __init__(self, gpu):
        self.gpu = gpu
        self.gone = False

    def __getattr__(self, name):
        return getattr(self.gpu, name)

    def read(self):
        if self.gone:
            raise OSError("the GPU is lost")
        return self.gpu.read()


@pytest.mark.parametrize("mute", [False, True])
def test_a_gpu_that_cannot_be_read_for_a_while_costs_no_request_and_no_joule(mute, caplog):
    async def run():
        async with rig(mute=mute) as it:
            it.backend.clock.gpu = it.backend.accounting.gpu = gpu = Unreadable(it.backend.gpu)
            await it.up()
            asks = [asyncio.ensure_future(it.ask(tokens=60)) for _ in range(3)]
            await asyncio.sleep(0.1)
            gpu.gone = True
            assert it.models.status().models[0].engines[0].clock_mhz is None
            assert None not in await asyncio.gather(*asks)
            await asyncio.sleep(1.0)
            gpu.gone = False
            await it.ask()
            return it.backend.state

    assert virtually(run()) == "up"
    assert caplog.text.count("cannot be read: the GPU is lost") == 1


def test_limits_and_times_steps_outlive_a_fault(caplog):
    async def run():
        async with rig(mute=True, limits=LimitOptions(silence_s=4.0)) as it:
            await it.up()
            healthy = it.backend.progress

            def broken(*_):
                raise ZeroDivisionError("a fault of ours")

            asking = asyncio.ensure_future(refused(it, stream=False))
            await asyncio.sleep(0.1)
            it.loop.backend = broken
            it.backend.progress = SimpleNamespace(tick=broken)
            await asyncio.sleep(1.0)
            del it.loop.backend
            it.backend.progress = healthy
            return await asking, len(it.seen.events(Stepped))

    (error, waited_s), steps = virtually(run())
    assert error.code == "engine_silent"
    assert 4.0 <= waited_s <= 4.6
    assert steps > 10
    assert "the limits were not looked after" in caplog.text
    assert "no step of time's own" in caplog.text
