"""Bounds on what one client can make the gateway do, and on what an error shows of the inside."""

import asyncio
import json
import logging

import pytest

from tests.gateway.fakes import running

COMPLETIONS = "/v1/completions"
BODY = {"model": "tiny", "prompt": "x"}


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
