"""The sweep: requests end at their limits (no place, no engine, a silent engine), energy is settled as time passes, and
external load is logged.
"""

import asyncio
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest

from gateway.rig import rig, virtually
from throttllem.config import LimitOptions
from throttllem.core.types import Observed, Slo
from throttllem.engines.base import Report
from throttllem.gateway.telemetry.status import gateway_status
from throttllem.openai_api.errors import ApiError


async def rejection(it, *, stream=True, tokens=0):
    """The rejection of a request that would wait for ever, and after how many seconds it came."""
    began_s = it.loop.now()
    with pytest.raises(ApiError) as found:
        async with it.session(slo=Slo(e2e_s=9e3), stream=stream) as session:
            await session.placed()
            if tokens:
                session.tokens(tokens)
            await asyncio.sleep(3600)
    return found.value, it.loop.now() - began_s


def test_no_place():
    async def run():
        async with rig(max_batch=1, limits=LimitOptions(queue_wait_s=2.0)) as it:
            await it.up()
            first = asyncio.ensure_future(it.request(tokens=240))
            await asyncio.sleep(0.1)
            found = await rejection(it)
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
            return *(await rejection(it)), it.loop.controller.snapshot().counts

    error, waited_s, counts = virtually(run())
    assert (error.status, error.code) == (503, "no_engine")
    assert (error.message, str(error)) == ("no engine is up", "no engine is up: connection refused")
    assert 3.0 <= waited_s <= 3.6
    assert counts.rejected == 1


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_silent_engine(tokens):
    async def run():
        async with rig(mute=True, limits=LimitOptions(silence_s=4.0)) as it:
            await it.up()
            return await rejection(it, tokens=tokens)

    error, waited_s = virtually(run())
    assert (error.status, error.code) == (504, "engine_silent")
    assert 4.0 <= waited_s <= 4.6


@pytest.mark.parametrize(
    ("numbered", "code", "after_s"), [(True, "engine_silent", 4.0), (False, "request_stalled", 8.0)]
)
def test_an_answer_in_one_piece(numbered, code, after_s):
    """Of an engine that reports nothing, nothing is seen before the answer comes, however well it works."""

    async def run():
        async with rig(mute=not numbered, numbered=numbered, limits=LimitOptions(silence_s=4.0, request_s=8.0)) as it:
            await it.up()
            await it.request(tokens=2)  # if it reports, it has by now
            return await rejection(it, stream=False)

    error, waited_s = virtually(run())
    assert (error.status, error.code) == (504, code)
    assert after_s <= waited_s <= after_s + 0.6


@pytest.mark.parametrize("tokens", [0, 1])
def test_an_engine_that_goes_on_with_others_is_not_silent(tokens):
    """A request may wait in the engine, and an engine may hold back the rest of an output (a tool call)."""

    async def run():
        async with rig(mute=True, limits=LimitOptions(silence_s=1.0)) as it:
            await it.up()
            other = asyncio.ensure_future(it.request(tokens=200))
            error, waited_s = await rejection(it, tokens=tokens)
            return error, waited_s, await other

    error, waited_s, other_end = virtually(run())
    assert other_end is not None
    assert waited_s > 2.5 and error.code == "engine_silent", "when the other has ended, nothing shows that it works"


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_request_that_the_engine_no_longer_holds_ends_while_it_works_on_others(tokens):
    """Only the silent one: the others go on."""

    async def run():
        async with rig(numbered=True, limits=LimitOptions(silence_s=1.0)) as it:
            await it.up()
            others = [asyncio.ensure_future(it.request(tokens=240)) for _ in range(2)]
            error, waited_s = await rejection(it, tokens=tokens)
            busy = not any(other.done() for other in others)
            return error, waited_s, busy, await asyncio.gather(*others)

    error, waited_s, busy, others = virtually(run())
    assert (error.status, error.code) == (504, "request_lost") and "limits.silence_s" in error.message
    assert 1.0 <= waited_s <= 2.0 and busy and None not in others


def test_a_request_without_a_token_ends_whatever_the_engine_does():
    async def run():
        async with rig(mute=True, limits=LimitOptions(silence_s=1.0, request_s=1.5)) as it:
            await it.up()
            other = asyncio.ensure_future(it.request(tokens=240))
            error, waited_s = await rejection(it, tokens=1)
            return error, waited_s, await other

    error, waited_s, other = virtually(run())
    assert (error.status, error.code) == (504, "request_stalled") and "limits.request_s" in error.message
    assert 1.5 <= waited_s <= 2.0 and other is not None, "one that gets tokens may take longer"


@pytest.mark.parametrize("sign", ["byte", "step", "running", "kv", "client"])
def test_signs_of_life(sign):
    """Each of them keeps a stream without tokens alive; without one it ends."""

    async def run():
        async with rig(mute=True, limits=LimitOptions(silence_s=1.0)) as it:
            await it.up()
            client = SimpleNamespace(blocked=False)
            ends_s = it.loop.now() + 3.0
            with pytest.raises(ApiError) as ended:
                async with it.session() as session:
                    await session.placed()
                    session.tokens(1)
                    session.attended(client)
                    for number in range(15):
                        await asyncio.sleep(0.2)
                        report = Report(running=1, waiting=0, kv_blocks=3)
                        match sign:
                            case "byte":
                                session.received()
                            case "step":
                                it.backend._reported(replace(report, step=number))
                            case "running":
                                it.backend._reported(report)
                            case "kv":
                                it.backend._reported(replace(report, step=None if number else 0, kv_blocks=number))
                            case "client":
                                client.blocked = number < 14
                    await asyncio.sleep(60.0)
            return ended.value.code, it.loop.now() - ends_s

    code, after_s = virtually(run())
    assert code == "engine_silent" and (0.9 if sign != "client" else -0.3) <= after_s <= 1.6


def test_what_stands_still_in_an_engine_that_numbers_its_steps_is_no_sign():
    """Its API server answers on while its steps hang."""

    async def run():
        async with rig(mute=True, limits=LimitOptions(silence_s=1.0)) as it:
            await it.up()

            async def scraped():
                while True:
                    it.backend._reported(Report(running=1, waiting=0, kv_blocks=3, step=7))
                    await asyncio.sleep(0.2)

            scraping = asyncio.ensure_future(scraped())
            found = await rejection(it, tokens=1)
            scraping.cancel()
            return found

    error, waited_s = virtually(run())
    assert error.code == "engine_silent" and waited_s <= 1.6


def test_idle_energy_is_settled_as_time_passes():
    async def run():
        async with rig() as it:
            await it.up()
            await it.request(tokens=20)
            busy_w = it.backend.gpu.read().watts
            await asyncio.sleep(10.0)
            return busy_w, it.backend.accounting.energy(), it.backend.accounting.idle_j

    busy_w, energy, idle_j = virtually(run())
    assert energy.watts == 40.0 < busy_w
    assert energy.idle_j == idle_j == pytest.approx(400.0, rel=0.05)


def test_a_running_requests_energy_is_settled_as_time_passes():
    async def run():
        async with rig(mute=True) as it:
            await it.up()
            running = asyncio.ensure_future(it.request(tokens=200))
            seen = []
            while not running.done():
                await asyncio.sleep(0.5)
                seen += [flight.energy_j for flight in it.backend.progress.in_flight.values()]
            return seen, (await running).energy_joules

    seen, energy_j = virtually(run())
    assert len(seen) > 3
    assert all(before < after for before, after in pairwise(seen))
    assert 0.8 * energy_j < seen[-1] <= energy_j


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
            requests = [asyncio.ensure_future(it.request(tokens=60)) for _ in range(3)]
            await asyncio.sleep(0.1)
            gpu.gone = True
            assert gateway_status(it.models).models[0].engines[0].clock_mhz is None
            assert None not in await asyncio.gather(*requests)
            await asyncio.sleep(1.0)
            gpu.gone = False
            await it.request()
            return it.backend.state

    assert virtually(run()) == "up"
    assert caplog.text.count("cannot be read: the GPU is lost") == 1


def test_limits_hold_after_a_fault(caplog):
    async def run():
        async with rig(mute=True, limits=LimitOptions(silence_s=4.0)) as it:
            await it.up()

            def broken(*_):
                raise ZeroDivisionError("a fault of ours")

            ending = asyncio.ensure_future(rejection(it))
            await asyncio.sleep(0.1)
            it.loop.overdue = broken
            await asyncio.sleep(1.0)
            del it.loop.overdue
            return await ending

    error, waited_s = virtually(run())
    assert error.code == "engine_silent"
    assert 4.0 <= waited_s <= 4.6
    assert "limits were not enforced this time" in caplog.text


@pytest.mark.parametrize("moments", [1, 6])
def test_external_load_is_logged_once_if_it_lasts(caplog, moments):
    async def run():
        async with rig(numbered=True) as it:
            await it.up()
            await it.request()  # its reports come from now on
            for _ in range(2):
                for _ in range(moments):
                    it.loop.handle(Observed(engine=it.backend.key, running=3, waiting=0))
                    await asyncio.sleep(0.5)
                noted = gateway_status(it.models).models[0].engines[0].notes[-1]
                it.loop.handle(Observed(engine=it.backend.key, running=0, waiting=0))
                await asyncio.sleep(3.0)
            return noted

    shown = virtually(run()) == "3 sequences in this engine are not ours: does another gateway or client use it?"
    lasts = moments > 1
    assert shown is lasts
    assert caplog.text.count("engine of TP 1: 3 sequences in it are not ours") == (2 if lasts else 0)
