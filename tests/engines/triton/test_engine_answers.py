"""OpenAI's completions and chats over a Triton that answers `generate_stream`."""

import asyncio
import json

import pytest

from engines.triton_peer import SPEC, answer, call, chunks, event, one, triton
from throttllem.engines.base import EngineError
from throttllem.openai_api.requests import CHAT, COMPLETIONS, parse_request


def test_a_streamed_completion():
    body = {"prompt": "hi there", "max_tokens": 3, "seed": 4, "stream": True, "stream_options": {"include_usage": True}}
    status, data, asked = asyncio.run(one(COMPLETIONS, body))
    assert status == 200 and data.endswith(b"data: [DONE]\n\n")
    assert asked == [{"text_input": "hi there", "max_tokens": 3, "stream": True, "random_seed": 4}]
    *text, usage = chunks(data)
    assert [chunk["choices"][0]["text"] for chunk in text] == [" one", " two", " three"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in text] == [None, None, "length"]
    assert usage["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


def test_a_text_held_back_for_a_stop_word_comes_with_the_end():
    for limit, reason in ((3, "length"), (9, "stop")):
        body = {"prompt": "hi", "stop": "e!", "max_tokens": limit, "stream": True}
        _, data, _ = asyncio.run(one(COMPLETIONS, body))
        found = [(chunk["choices"][0]["text"], chunk["choices"][0]["finish_reason"]) for chunk in chunks(data)]
        assert "".join(text for text, _ in found) == " one two three"
        assert [why for _, why in found if why] == [reason] and found[-1][1] == reason


def test_an_answer_of_nothing():
    script = [event(text_output="")]
    _, data, _ = asyncio.run(one(COMPLETIONS, {"prompt": "hi", "stream": True}, script=script))
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks(data)] == ["stop"]
    _, data, _ = asyncio.run(one(COMPLETIONS, {"prompt": "hi"}, script=script))
    assert json.loads(data)["choices"][0]["text"] == ""


def test_a_whole_completion():
    status, data, asked = asyncio.run(one(COMPLETIONS, {"prompt": "hi", "model": "m"}))
    assert (status, asked[0]["max_tokens"]) == (200, 16)
    found = json.loads(data)
    assert found["choices"][0] == {"index": 0, "text": " one two three", "logprobs": None, "finish_reason": "stop"}
    assert found["usage"]["completion_tokens"] == 3
    assert found["model"] == "m"


def test_a_chat():
    messages = [{"role": "user", "content": "hi"}]
    status, data, asked = asyncio.run(one(CHAT, {"messages": messages, "stream": True}))
    assert status == 200
    assert asked == [{"text_input": "user: hi\nassistant:", "max_tokens": SPEC.max_context_tokens - 5, "stream": True}]
    role, *text, end = [chunk["choices"][0]["delta"] for chunk in chunks(data)]
    assert (role, end) == ({"role": "assistant", "content": ""}, {})
    assert [delta["content"] for delta in text] == [" one", " two", " three"]
    _, data, asked = asyncio.run(one(CHAT, {"messages": messages, "max_completion_tokens": 9}))
    assert json.loads(data)["choices"][0]["message"] == {"role": "assistant", "content": " one two three"}
    assert asked[0]["max_tokens"] == 9


def test_what_the_gateway_counted_is_used():
    async def run():
        async with triton() as (peer, engine):
            request = parse_request(COMPLETIONS, b'{"model": "m", "prompt": "hi"}')
            data = await answer(engine, COMPLETIONS, b"unread", request=request, prompt_tokens=77, max_tokens=5)
            return data, peer.asked

    (_, data), ((path, headers, body),) = asyncio.run(run())
    assert json.loads(data)["usage"]["prompt_tokens"] == 77
    assert json.loads(body)["max_tokens"] == 5
    assert path == "/v2/models/ensemble/generate_stream"
    assert headers["x-request-id"] == "r1" and "x-slo-e2e-ms" not in headers


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (COMPLETIONS, b"{", 400, None),
        (COMPLETIONS, b"[]", 400, None),
        (COMPLETIONS, {"prompt": [1, 2]}, 400, "prompt"),
        (COMPLETIONS, {"prompt": "hi", "n": 2}, 400, "n"),
        (COMPLETIONS, {"prompt": "hi", "temperature": 0.5}, 400, "temperature"),  # no such input of this model
        (COMPLETIONS, {"prompt": "hi", "max_tokens": 0}, 400, "max_tokens"),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "hi"}], "tools": [{}]}, 400, "tools"),
        ("/v1/embeddings", {}, 404, None),
    ],
)
def test_what_cannot_be_served_is_answered(path, body, status, param):
    found, data, asked = asyncio.run(one(path, body))
    assert (found, asked) == (status, [])
    assert json.loads(data)["error"]["param"] == param


def test_triton_refuses():
    body = {"prompt": "hi", "stream": True}
    for status, script in ((400, [event(error="too long")]), (503, [b'{"error":"too long"}'])):
        found, data, _ = asyncio.run(one(COMPLETIONS, body, script=script, status=status))
        assert (found, json.loads(data)["error"]["message"]) == (status, "too long")


def test_an_error_in_the_stream_becomes_an_event():
    script = [event(text_output="a"), b'data: {"error":"out of memory"}\n\n']
    _, data, _ = asyncio.run(one(COMPLETIONS, {"prompt": "hi", "stream": True}, script=script))
    text, error = chunks(data)
    assert text["choices"][0]["text"] == "a"
    assert (error["error"]["message"], error["error"]["type"]) == ("out of memory", "server_error")
    assert b"[DONE]" not in data
    with pytest.raises(EngineError, match="out of memory"):
        asyncio.run(one(COMPLETIONS, {"prompt": "hi"}, script=script))


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_the_last_event_may_lack_its_blank_line(end):
    script = [event(text_output="a"), event(text_output="b").rstrip() + end]
    _, data, _ = asyncio.run(one(COMPLETIONS, {"prompt": "hi"}, script=script))
    assert json.loads(data)["choices"][0]["text"] == "ab"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("script", [[event(text_output="a"), None], [b"data: {}\n\n"], [b"data: x\n\n"], [b"\n"]])
def test_a_stream_that_breaks_off_or_makes_no_sense_is_an_error(script, stream):
    with pytest.raises(EngineError) as caught:
        asyncio.run(one(COMPLETIONS, {"prompt": "hi", "stream": stream}, script=script))
    assert caught.value.status == 502


@pytest.mark.parametrize("stop", ["two", None])
def test_leaving_early_or_a_stop_word_ends_the_request_in_triton(stop):
    async def run():
        async with triton() as (peer, engine):
            await engine.connect()
            peer.script = [event(text_output=" one"), event(text_output=" two"), 60.0]
            async with engine.open(call(COMPLETIONS, {"prompt": "hi", "stream": True, "stop": stop})) as reply:
                first = await reply.read()
                rest = await reply.body() if stop else b""
            await asyncio.wait_for(peer.gone.wait(), 5)
            return first + rest

    data = asyncio.run(run())
    assert b" one" in data
    if stop:
        assert b"two" not in data and b'"finish_reason":"stop"' in data and data.endswith(b"[DONE]\n\n")
