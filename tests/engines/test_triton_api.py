import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.engines.triton.api import (
    ENSEMBLE,
    UnsupportedError,
    error_reply,
    parse_native,
    prompt_text,
    refused,
    stop_words,
    to_triton,
    token_limit,
    wants_usage,
)

OLD = ENSEMBLE - {"seed", "min_tokens", "frequency_penalty"} | {"random_seed", "min_length"}


def native(body, inputs=ENSEMBLE):
    return to_triton(body, text="hi", limit=7, inputs=inputs)


def test_a_plain_request_asks_for_nothing_else():
    assert native({"model": "m", "prompt": "hi", "max_tokens": 7, "user": "u", "stream": False}) == {
        "text_input": "hi",
        "max_tokens": 7,
        "stream": True,
    }


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
        ({"temperature": 0.5}, {"temperature": 0.5, "top_p": 1.0}),
        ({"temperature": 0.5, "top_k": 40}, {"temperature": 0.5, "top_k": 40}),
        ({"temperature": 0, "top_p": 0.9}, {"top_k": 1, "top_p": 0.9}),
        ({"seed": 3}, {"seed": 3}),
        ({"stop": "a"}, {"stop_words": ["a"]}),
        ({"stop": ["a", "", "b"]}, {"stop_words": ["a", "b"]}),
        ({"min_tokens": 4, "presence_penalty": 0.1}, {"min_tokens": 4, "presence_penalty": 0.1}),
        ({"end_id": 2}, {"end_id": 2}),
        ({"ignore_eos": True, "min_tokens": 2}, {"min_tokens": 7}),
        ({"ignore_eos": False}, {}),
        ({"n": 1, "best_of": 1, "logprobs": False, "tools": [], "logit_bias": {}, "top_k": -1, "echo": None}, {}),
        ({"response_format": {"type": "text"}, "frequency_penalty": 0, "throttllem": {"metrics": True}}, {}),
    ],
)
def test_fields_are_translated(body, expected):
    assert native(body) == {"text_input": "hi", "max_tokens": 7, "stream": True} | expected


def test_older_models_call_some_inputs_otherwise():
    found = native({"seed": 3, "min_tokens": 2}, OLD)
    assert (found["random_seed"], found["min_length"]) == (3, 2)
    with pytest.raises(UnsupportedError, match="frequency_penalty"):
        native({"frequency_penalty": 0.5}, OLD)


@pytest.mark.parametrize(
    "body",
    [
        {"n": 2},
        {"best_of": 2},
        {"logprobs": 0},
        {"logprobs": True},
        {"echo": True},
        {"suffix": "x"},
        {"logit_bias": {"1": 2}},
        {"tools": [{}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"temperature": "hot"},
        {"top_p": True},
        {"top_k": 1.5},
        {"seed": -1},
        {"stop": 3},
        {"stop": [3]},
        {"text_input": "other"},
        {"beam_width": 4},
        {"no_such_field": 1},
    ],
)
def test_what_triton_cannot_do_is_refused_by_name(body):
    with pytest.raises(UnsupportedError) as caught:
        native(body, ENSEMBLE | {"beam_width"})
    assert caught.value.param == next(iter(body))
    assert caught.value.param in str(caught.value)


names = st.sampled_from(["n", "seed", "stop", "temperature", "top_k", "prompt", "x"])
values = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers())


@given(st.dictionaries(names, values))
def test_any_body_is_translated_or_refused(body):
    try:
        found = native(body)
    except UnsupportedError as error:
        assert error.param in body
    else:
        assert found.keys() <= ENSEMBLE
        json.dumps(found)


def test_prompts():
    assert prompt_text({"prompt": "a"}) == prompt_text({"prompt": ["a"]}) == "a"
    for prompt in (None, [], ["a", "b"], [1, 2], [[1, 2]], 3):
        with pytest.raises(UnsupportedError) as caught:
            prompt_text({"prompt": prompt})
        assert caught.value.param == "prompt"


def test_limits():
    assert token_limit({"max_tokens": 3}, chat=False) == 3
    assert token_limit({"max_tokens": 3, "max_completion_tokens": 4}, chat=True) == 4
    assert token_limit({"max_tokens": None}, chat=True) is None
    for wrong in (0, -1, 1.5, "3", True):
        with pytest.raises(UnsupportedError, match="max_tokens"):
            token_limit({"max_tokens": wrong}, chat=False)


def test_stops_and_usage():
    assert stop_words({}) == stop_words({"stop": None}) == ()
    assert wants_usage({"stream_options": {"include_usage": True}})
    assert not wants_usage({"stream_options": None})


def test_native_calls_are_understood():
    ask = parse_native("/v2/models/ensemble/generate_stream", b'{"text_input": "a b", "max_tokens": 5, "stream": true}')
    assert ask is not None
    assert (ask.model, ask.prompts, ask.max_tokens, ask.stream, ask.sequences) == ("ensemble", ("a b",), 5, True, 1)
    versioned = parse_native("/v2/models/m/versions/1/generate?x=1", {"text_input": ["a", "b"], "max_tokens": [5]})
    assert versioned is not None
    assert (versioned.model, versioned.prompts, versioned.max_tokens, versioned.stream) == ("m", ("a", "b"), 5, False)
    assert parse_native("/v2/models/m/infer", b"") is None
    assert parse_native("/v2/health/ready", b"") is None


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b"{}", b'{"text_input": 3}', b'{"text_input": "a", "max_tokens": 0}', b'{"text_input": []}'],
)
def test_native_bodies_that_say_nothing_are_errors(body):
    with pytest.raises(ValueError, match=r".+"):
        parse_native("/v2/models/m/generate", body)


def test_refusals_of_triton_in_words():
    assert refused(b'{"error":"Request for unknown model"}') == "Request for unknown model"
    assert refused(b'data: {"error":"it failed"}\n\n') == "it failed"
    assert refused(b"<html>") == "<html>"
    assert refused(b"") == "the engine gave no reason"


def test_errors_have_the_shape_of_openai():
    async def body(reply):
        return await reply.body()

    reply = error_reply("no", 400, param="n")
    assert reply.status == 400
    assert json.loads(asyncio.run(body(reply))) == {
        "error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": None}
    }
    assert json.loads(asyncio.run(body(error_reply("no", 502))))["error"]["type"] == "server_error"
