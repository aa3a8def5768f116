"""What goes on to an engine without control, and what that takes."""

import asyncio
import json

import pytest

from tests.gateway.fakes import running
from throttllem.config import ServerOptions
from throttllem.gateway.http.uncontrolled import Use, methods, use_of


@pytest.mark.parametrize(
    ("method", "path", "use"),
    [
        ("POST", "/v1/embeddings", Use.WORK),
        ("POST", "/v1/audio/transcriptions", Use.WORK),
        ("POST", "/rerank", Use.WORK),
        ("POST", "/v2/rerank", Use.WORK),
        ("POST", "/v1/what/comes/next", Use.WORK),
        ("POST", "/tokenize", Use.NONE),
        ("POST", "/v1/messages/count_tokens", Use.NONE),
        ("POST", "/v1/chat/completions/render", Use.NONE),
        ("POST", "/v1/responses/resp_1/cancel", Use.NONE),
        ("GET", "/v1/responses/resp_1", Use.NONE),
        ("DELETE", "/v1/responses/resp_1", Use.NONE),
        ("POST", "/v1/load_lora_adapter", Use.ADMIN),
        ("POST", "/sleep", Use.ADMIN),
        ("POST", "/v1/model/load", Use.ADMIN),
        ("POST", "/v1/internal/model/unload", Use.ADMIN),
        ("POST", "/v1/LOAD_lora_adapter;a", Use.ADMIN),
        ("POST", "/v1/downloads", Use.WORK),
        ("POST", "/v2/repository/models/m/unload", Use.ADMIN),
        ("GET", "/v2/models/m/config", Use.NONE),
        ("POST", "/v2/models/m/infer", None),
        ("PUT", "/v1/embeddings", None),
        ("POST", "/invocations", None),
        ("POST", "/v1/", None),
    ],
)
def test_use_of_a_path(method, path, use):
    assert use_of(method, path) is use
    assert (method in methods(path)) is (use is not None)


def within(check, **options):
    async def main():
        async with running(**options) as there:
            return await check(there)

    return asyncio.run(main())


def test_work_is_noted_while_it_runs_and_reading_is_none():
    async def check(there):
        seen = []
        for path, method in (("/v1/embeddings", "POST"), ("/tokenize", "POST"), ("/v1/files", "GET")):
            there.models.most_working = 0
            await there.post(path, {}) if method == "POST" else await there.get(path)
            seen.append((there.models.most_working, there.models.working))
        return seen

    assert within(check) == [(1, 0), (0, 0), (0, 0)]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/embeddings"),
        ("POST", "/tokenize"),
        ("POST", "/v1/messages/count_tokens"),
        ("GET", "/v1/responses/resp_1"),
        ("DELETE", "/v1/responses/resp_1"),
    ],
)
def test_an_slo_that_cannot_be_met_is_an_error(method, path):
    async def check(there):
        status, _, body = await there.get(path, method, headers={"x-slo-class": "fast"})
        return status, "x-slo-class" in json.loads(body)["error"]["message"], len(there.engine.seen)

    assert within(check) == (400, True, 0)


def test_metrics_that_cannot_be_given_are_an_error():
    async def check(there):
        status, _, body = await there.post("/v1/embeddings", {"model": "tiny", "throttllem": {"metrics": True}})
        return status, json.loads(body)["error"]["param"], len(there.engine.seen)

    assert within(check) == (400, "throttllem", 0)


SOUND = bytes(range(256)) * 99
LOAD = "/v1/load_lora_adapter"


@pytest.mark.parametrize(
    ("keys", "headers", "status"),
    [
        ({}, {}, 403),
        ({"api_keys": ("k",)}, {"authorization": "Bearer k"}, 403),
        ({"api_keys": ("k",), "admin_keys": ("a",)}, {"authorization": "Bearer k"}, 401),
        ({"api_keys": ("k",), "admin_keys": ("a",)}, {"authorization": "Bearer a"}, 200),
        ({"admin_keys": ("a",)}, {"x-api-key": "a"}, 200),
    ],
)
def test_what_changes_an_engine_takes_a_key_of_an_administrator(keys, headers, status):
    async def check(there):
        found = await there.post(LOAD, {"lora_name": "l"}, headers=headers)
        return found[0], [sent for _, _, sent, _ in there.engine.seen]

    found, seen = within(check, server=ServerOptions(**keys))
    assert found == status and len(seen) == (status == 200)
    assert not any({"authorization", "x-api-key"} & sent.keys() for sent in seen)


def test_a_form_goes_to_the_engine_of_its_model():
    async def check(there):
        statuses = []
        for model in ("tiny", "none"):
            parts = [
                b'--b\r\ncontent-disposition: form-data; name="file"; filename="model"\r\n\r\n'
                + bytes(range(256)) * 99,
                b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + model.encode(),
                b"--b--\r\n",
            ]
            headers = {"content-type": "multipart/form-data; boundary=b"}
            async with there.http.post(
                there.url + "/v1/audio/transcriptions", data=b"\r\n".join(parts), headers=headers
            ) as response:
                statuses.append(response.status)
        return statuses

    assert within(check) == [200, 404]


def test_a_form_of_too_many_parts_is_not_parsed():
    async def check(there):
        form = b'--b\r\ncontent-disposition: form-data; name="x"\r\n\r\n\r\n' * 102
        headers = {"content-type": "multipart/form-data; boundary=b"}
        status, _, body = await there.post("/v1/audio/transcriptions", form, headers=headers)
        return status, json.loads(body)["error"]["message"], len(there.engine.seen)

    assert within(check) == (400, "the form has more than 100 parts, the most that are read: send fewer", 0)
