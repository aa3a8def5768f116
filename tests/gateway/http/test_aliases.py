"""Names of the configuration that clients use for a model: the engine gets its own, and no other byte differs."""

import asyncio
import json

import pytest

from tests.gateway.fakes import running
from throttllem.config import EngineEntry, Options
from throttllem.core.types import OptionError
from throttllem.openai_api.large_bodies import LARGE_BYTES

ENTRY = EngineEntry(aliases=("gpt-4o=org/other", "gone=nothing"))
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/tokenize")
FIELDS = '"max_tokens":3, "messages":[{"role":"user","content":"gpt-4o"}],"prompt":"gpt-4o", "input":"gpt-4o"'


def within(check):
    async def main():
        async with running(engines=(ENTRY,)) as there:
            return await check(there)

    return asyncio.run(main())


@pytest.mark.parametrize("large", [0, LARGE_BYTES])
@pytest.mark.parametrize("path", PATHS)
def test_the_engine_gets_its_own_name_and_every_other_byte(path, large):
    body = '{ %s, "model" :  "%s" , "odd":[1.50,"%s"]}'
    sent = (body % (FIELDS, "gpt-4o", "x" * large)).encode()

    async def check(there):
        status, _, _ = await there.post(path, sent, {"content-type": "application/json"})
        return status, there.engine.seen[-1][3]

    assert within(check) == (200, (body % (FIELDS, "org/other", "x" * large)).encode())


def test_aliases_are_listed_with_what_they_stand_for():
    async def check(there):
        listed = json.loads((await there.get("/v1/models"))[2])["data"]
        return listed, json.loads((await there.get("/v1/models/gpt-4o"))[2]), (await there.get("/v1/models/gone"))[0]

    listed, one, gone = within(check)
    assert [entry["id"] for entry in listed] == ["tiny", "org/other", "gpt-4o"]
    assert (one, gone) == (listed[-1], 404)
    assert (one["root"], one["max_model_len"]) == ("org/other", 4096)


def test_an_alias_in_a_form_is_an_error_that_names_the_model():
    form = b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\ngpt-4o\r\n--b--\r\n'

    async def check(there):
        kind = {"content-type": "multipart/form-data; boundary=b"}
        return await there.post("/v1/audio/transcriptions", form, kind)

    status, _, body = within(check)
    assert status == 400 and b"send org/other" in body


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ((EngineEntry(aliases=("a=x", "a=y")),), "stands for"),
        ((EngineEntry(aliases=("a=x", "b=a")),), "nor the alias"),
        ((EngineEntry(served_as="a"), EngineEntry(model="llama-2-13b", aliases=("a=x",))), "neither the name"),
        ((EngineEntry(served_as="x", aliases=("a=y",)),), "write a=x"),
    ],
)
def test_aliases_that_collide_are_refused(entries, why):
    with pytest.raises(ValueError, match=why):
        Options(engines=entries)


def test_an_alias_needs_a_name():
    with pytest.raises(OptionError, match="ALIAS=NAME"):
        EngineEntry(aliases=("gpt-4o",))
