"""Which control loop serves a name, how long counting waits for an engine, and the defaults of a request."""

import asyncio
from dataclasses import replace

import pytest

from gateway.rig import parsed, rig, virtually
from throttllem.config import LimitOptions
from throttllem.core.admission import never_fits
from throttllem.core.options import AdmissionOptions
from throttllem.core.types import Slo
from throttllem.engines.base import EngineError, PromptCount
from throttllem.gateway.control.models import ServedModel
from throttllem.gateway.telemetry.status import gateway_status
from throttllem.openai_api.errors import ApiError
from throttllem.openai_api.requests import Api

SHORT = LimitOptions(engine_wait_s=2.0)


async def rejection(coroutine):
    with pytest.raises(ApiError) as found:
        await coroutine
    return found.value.status, found.value.code


def test_a_name_that_no_engine_serves():
    async def run():
        async with rig() as it:
            await it.up()
            assert it.models.names() == ("toy",)
            with pytest.raises(ApiError, match="there is: toy"):
                await it.models.uncontrolled_backend("other")
            return await rejection(it.models.count(parsed(model="other")))

    assert virtually(run()) == (404, "model_not_found")


def test_names_are_read_again_when_one_is_unknown():
    async def run():
        async with rig() as it:
            await it.up()
            engine, seen = it.backend.engine, []
            engine.models = ("toy", "adapter")
            seen.append((await it.models.count(parsed(model="adapter"))).tokens)
            asked = engine.asked_names
            flood = await asyncio.gather(*(rejection(it.models.count(parsed(model=f"no-{n}"))) for n in range(100)))
            seen += [set(flood), engine.asked_names - asked, it.models.names()]
            engine.models = ("toy",)
            await asyncio.sleep(1.1)
            seen += [await rejection(it.models.uncontrolled_backend("other")), it.models.names()]
            engine.models = None
            await asyncio.sleep(1.1)
            seen += [await rejection(it.models.count(parsed(model="adapter"))), it.models.names()]
            return seen

    unknown = (404, "model_not_found")
    assert virtually(run()) == [4, {unknown}, 0, ("toy", "adapter"), unknown, ("toy",), unknown, ("toy",)]


def test_a_client_that_names_no_model_gets_the_only_one():
    async def run():
        async with rig() as it:
            await it.up()
            session = it.session(model="")
            count = await it.models.count(parsed(model=""))
            it.models.served = it.models.served * 2
            with pytest.raises(ApiError, match="there is: toy") as several:
                it.session(model="")
            it.models.served = it.models.served[:1]
            return session.request.model, count.tokens, several.value.status, several.value.param

    assert virtually(run()) == ("toy", 4, 400, "model")


def test_large_prompts_being_counted_do_not_delay_small_ones(monkeypatch):
    async def run():
        async with rig() as it:
            await it.up()
            never = asyncio.Event()

            async def count(request):
                if len(request.body) > 100_000:
                    await never.wait()
                return PromptCount(tokens=4, by="test", exact=True)

            it.backend.engine.count = count
            large = [asyncio.create_task(it.models.count(parsed(prompt="x" * 100_000))) for _ in range(80)]
            await asyncio.sleep(0.1)
            async with asyncio.timeout(1.0):
                found = await it.models.count(parsed())
            for task in large:
                task.cancel()
            await asyncio.gather(*large, return_exceptions=True)
            return found.tokens

    assert virtually(run()) == 4


def test_whether_an_estimated_prompt_fits_is_the_engines_to_say():
    async def run():
        async with rig() as it:
            await it.up()
            spec = it.backend.connected.spec
            far = PromptCount(tokens=10**9, by="an estimate", exact=False)
            request = it.models.session(parsed(limit=7), far, Slo()).request
            return never_fits(request, spec), request.max_tokens

    assert virtually(run()) == (None, 7)


def test_counting_waits_for_an_engine():
    async def run():
        async with rig(limits=SHORT) as it:
            it.backend.engine.gone = True
            counting = asyncio.ensure_future(it.models.count(parsed()))
            await asyncio.sleep(1.0)
            it.backend.engine.gone = False
            return (await counting).tokens, it.loop.now()

    tokens, now_s = virtually(run())
    assert tokens == 4
    assert now_s < 2.5


def test_an_engine_that_comes_up_under_another_name():
    async def run():
        async with rig(limits=SHORT) as it:
            return await rejection(it.models.count(parsed(model="guess")))

    assert virtually(run()) == (404, "model_not_found")


def test_an_engine_that_does_not_come_up():
    async def run():
        async with rig(limits=SHORT) as it:
            it.backend.engine.gone = True
            gateway_status(it.models)
            found = await rejection(it.models.count(parsed()))
            with pytest.raises(ApiError, match="no engine is up") as caught:
                await it.models.uncontrolled_backend(None)
            assert (caught.value.message, str(caught.value)) == (
                "no engine is up",
                "no engine is up: connection refused",
            )
            with pytest.raises(ApiError, match="no engine is up"):
                it.models.session(parsed(), PromptCount(tokens=1, by="t", exact=True), Slo())
            return *found, it.loop.now()

    status, code, now_s = virtually(run())
    assert (status, code) == (503, "no_engine")
    assert 2.0 <= now_s <= 2.2


def test_an_engine_that_cannot_count_is_checked():
    async def run():
        async with rig() as it:
            await it.up()

            async def fails(parsed):
                raise EngineError("it broke off", status=504)

            it.backend.engine.count = fails
            before = it.backend.engine.checks
            found = await rejection(it.models.count(parsed()))
            await asyncio.sleep(0.01)
            return *found, it.backend.engine.checks - before

    assert virtually(run()) == (504, "engine_failed", 1)


def test_while_draining_no_request_is_counted():
    async def run():
        async with rig() as it:
            await it.up()
            it.models.drain()
            assert gateway_status(it.models).phase == "draining"
            return await rejection(it.models.count(parsed()))

    assert virtually(run()) == (503, "draining")


@pytest.mark.parametrize(
    ("wanted", "api", "tokens", "limit"),
    [
        (7, Api.COMPLETIONS, 10, 7),
        (None, Api.CHAT, 10, 246),
        (None, Api.RESPONSES, 10, 246),
        (None, Api.COMPLETIONS, 10, 16),
        (None, Api.COMPLETIONS, 250, 6),
        (None, Api.CHAT, 300, 1),
    ],
)
def test_the_default_of_max_tokens(wanted, api, tokens, limit):
    async def run():
        async with rig() as it:
            await it.up()
            body = replace(parsed(), prompts=("x",), api=api, max_tokens=wanted, caller="me")
            count = PromptCount(tokens=tokens, by="t", exact=True)
            return it.models.session(body, count, Slo()).request

    request = virtually(run())
    assert (request.prompt_tokens, request.max_tokens, request.caller, request.model) == (tokens, limit, "me", "toy")


def test_a_model_may_be_served_under_another_name():
    async def run():
        async with rig() as it:
            it.models.served = (ServedModel(loop=it.loop, names=("mine",)),)
            await it.up()
            assert await it.models.uncontrolled_backend("mine") is await it.models.uncontrolled_backend(None)
            return it.models.names(), it.models.uncontrolled, await rejection(it.models.count(parsed()))

    assert virtually(run()) == (("mine",), 2, (404, "model_not_found"))


def test_no_more_prompts_are_counted_than_may_wait_and_not_all_at_once():
    async def run():
        core = {"admission": AdmissionOptions(queue_limit=100)}
        async with rig(core=core) as it:
            await it.up()
            under_way, most, go = [], [], asyncio.Event()

            async def slow(parsed):
                under_way.append(parsed)
                most.append(len(under_way))
                try:
                    await go.wait()
                finally:
                    under_way.pop()
                return PromptCount(tokens=1, by="t", exact=True)

            it.backend.engine.count = slow
            counts = [asyncio.ensure_future(it.models.count(parsed())) for _ in range(100)]
            await asyncio.sleep(0.01)
            with pytest.raises(ApiError) as found:
                await it.models.count(parsed())
            counts[0].cancel()
            await asyncio.sleep(0.01)
            counts.append(asyncio.ensure_future(it.models.count(parsed())))
            go.set()
            ends = await asyncio.gather(*counts, return_exceptions=True)
            return found.value, max(most), [type(end).__name__ for end in ends], it.loop.counting

    error, most, ends, left = virtually(run())
    assert (error.status, error.code, error.retry_after_s) == (429, "queue_full", 5)
    assert most == 64
    assert ends == ["CancelledError"] + ["PromptCount"] * 100
    assert left == 0


def test_estimated_prompts_are_counted_and_logged_once(caplog):
    async def run():
        async with rig() as it:
            await it.up()
            assert not any("estimated" in note for note in gateway_status(it.models).models[0].engines[0].notes)
            await it.models.count(parsed())

            async def estimates(parsed):
                return PromptCount(tokens=1, by="an estimate", exact=False)

            it.backend.engine.count = estimates
            for _ in range(2):
                await it.models.count(parsed())
            return gateway_status(it.models).models[0]

    model = virtually(run())
    assert model.estimated_prompts == 2
    assert model.engines[0].notes[-1] == "the tokens of 2 prompts were estimated, not counted"
    assert caplog.text.count("were estimated (an estimate), not counted") == 1


def test_health_and_the_max_sequences():
    async def run():
        async with rig(sizes=(1, 2)) as it:
            seen = [(it.models.max_sequences(), it.models.health())]
            await it.up()
            for backend in it.loop.backends:
                backend.connected = await backend.engine.connect()
            seen.append((it.models.max_sequences(), it.models.health()))
            it.loop.backends[0].own_trouble = "it is out"
            it.loop.backends[1].own_trouble = "it is out"
            it.models.draining = True
            return *seen, it.models.health()

    (before, starting), (most, up), troubled = virtually(run())
    assert (before, starting.up, starting.engines, starting.degraded) == (None, 0, 2, False)
    assert (most, up.up, up.engines, up.degraded, up.draining) == (8, 1, 2, False, False)
    assert (troubled.up, troubled.degraded, troubled.draining) == (1, True, True)
