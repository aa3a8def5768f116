"""Bounds on what one client can make the gateway do, and on what an error shows of the inside."""

import asyncio
import gc
import gzip
import json
import logging
import random
from types import FrameType

import pytest

from tests.gateway.fakes import running
from throttllem.engines.base import Call
from throttllem.openai_api.requests import ParsedRequest

COMPLETIONS = "/v1/completions"
BODY = {"model": "tiny", "prompt": "x"}
HOLDING = (bytes, bytearray, list, ParsedRequest, Call)


def within(check):
    async def main():
        async with running() as there:
            return await check(there)

    return asyncio.run(main())


def error_of(body):
    return json.loads(body)["error"]


@pytest.mark.parametrize("more", [{"prompt": ["a"] * 200_000}, {"n": 2**31 - 1}])
@pytest.mark.parametrize("most", [8, None])
def test_more_sequences_than_any_engine_runs_are_rejected_before_they_are_counted(more, most):
    async def check(there):
        there.models.most = most

        async def count(parsed):
            raise AssertionError("it was counted")

        there.models.count = count
        return await there.post(COMPLETIONS, BODY | more)

    status, _, body = within(check)
    assert (status, error_of(body)["code"]) == (400, "too_many_sequences")
    assert f"at most {most or 4096} answers" in error_of(body)["message"]


def test_health_costs_no_status():
    async def check(there):
        there.models.served = None  # a status would look at every model
        return await there.get("/health")

    status, _, body = within(check)
    assert status == 200
    assert json.loads(body) == {"status": "ok", "engines_up": 1, "engines": 1, "version": "1"}


def test_an_unknown_models_name_is_shown_shortened():
    async def check(there):
        return await there.get("/v1/models/" + "x" * 5000)

    status, _, body = within(check)
    assert status == 404 and len(body) < 300


def test_an_engines_address_is_logged_and_not_shown(caplog):
    async def check(there):
        await there.models.engine.upstream.close()
        there.models.engine.upstream._port = 1
        return await there.post(COMPLETIONS, BODY, {"x-request-id": "find-me"})

    with caplog.at_level(logging.WARNING, "throttllem.gateway"):
        status, _, body = within(check)
    assert (status, error_of(body)["message"]) == (502, "the engine cannot be reached")
    assert "find-me" in caplog.text and "127.0.0.1" in caplog.text


def test_no_body_outlives_its_error():
    """Without the collector of cycles: an error that its own frames hold would keep what they read."""
    long = "x" * 100_000
    cut = gzip.compress(random.Random(1).randbytes(100_000))[:-9]
    chat = {"model": "tiny", "messages": [{"role": "user", "content": long}]}
    broken = json.dumps(chat).encode()[:-1]

    async def check(there):
        for body, headers in (
            *((cut, {"content-encoding": coding}) for coding in ("gzip", "deflate")),
            *((data, {}) for data in (broken, b"\xff" * 100_000, b'{"model": %s}' % (b"[" * 60_000))),
        ):
            async with there.http.post(there.url + COMPLETIONS, data=body, headers=headers) as response:
                assert response.status == 400
        for play in ("break-off", "refuse", "garbage", "half", "cut-off", "error-event", "redirect"):
            await there.post("/v1/chat/completions", chat | {"play": play, "stream": True})
            await there.post("/v1/chat/completions", chat | {"play": play})
        await there.post("/v1/chat/completions", chat | {"model": "none"})

    gc.collect()
    gc.disable()
    try:
        within(check)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        frames = [found for found in gc.garbage if isinstance(found, FrameType)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    held = {
        (frame.f_code.co_qualname, name)
        for frame in frames
        for name, value in frame.f_locals.items()
        if "/throttllem/" in frame.f_code.co_filename and isinstance(value, HOLDING)
    }
    assert held == set()
