import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.engines.triton.facts import ENSEMBLE
from throttllem.engines.triton.translation import Generation, StopWords, failure_text, prompt_text, triton_body
from throttllem.openai_api.errors import ApiError
from throttllem.openai_api.requests import COMPLETIONS, Api, ParsedRequest

OLD = ENSEMBLE - {"seed", "min_tokens", "frequency_penalty"} | {"random_seed", "min_length"}


def request(*prompts, **fields):
    return ParsedRequest(api=Api.COMPLETIONS, path=COMPLETIONS, model="m", fields=fields, body=b"", prompts=prompts)


def native(fields, inputs=ENSEMBLE):
    return triton_body(request(**fields), text="hi", limit=7, inputs=inputs)


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
        ({"response_format": {"type": "text"}, "frequency_penalty": 0}, {}),
    ],
)
def test_fields_are_translated(body, expected):
    assert native(body) == {"text_input": "hi", "max_tokens": 7, "stream": True} | expected


def test_older_models_call_some_inputs_otherwise():
    found = native({"seed": 3, "min_tokens": 2}, OLD)
    assert (found["random_seed"], found["min_length"]) == (3, 2)
    with pytest.raises(ApiError, match="frequency_penalty"):
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
    with pytest.raises(ApiError) as caught:
        native(body, ENSEMBLE | {"beam_width"})
    assert caught.value.param == next(iter(body))
    assert caught.value.param in str(caught.value)


names = st.sampled_from(["n", "seed", "stop", "temperature", "top_k", "prompt", "x"])
values = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers())


@given(st.dictionaries(names, values))
def test_any_body_is_translated_or_refused(body):
    try:
        found = native(body)
    except ApiError as error:
        assert error.param in body
    else:
        assert found.keys() <= ENSEMBLE
        json.dumps(found)


def test_one_text_is_the_prompt():
    assert prompt_text(request("a")) == "a"
    for prompts in (("a", "b"), ((1, 2),)):
        with pytest.raises(ApiError) as caught:
            prompt_text(request(*prompts))
        assert caught.value.param == "prompt"


def test_errors_of_triton_in_words():
    assert failure_text(b'{"error":"Request for unknown model"}') == "Request for unknown model"
    assert failure_text(b'data: {"error":"it failed"}\n\n') == "it failed"
    assert failure_text(b"<html>") == "<html>"
    assert failure_text(b"") == "the engine gave no reason"


# ---- the stream of tokens ----------------------------------------------------------------------------------------


def event(**fields):
    return b"data: " + json.dumps({"model_name": "ensemble", "model_version": "1"} | fields).encode() + b"\n\n"


def stream(*texts):
    return b"".join(event(text_output=text) for text in texts)


def cut(data, places):
    """The bytes in pieces, cut at these places."""
    bounds = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in pairwise(bounds)]


def shown_of(answer, pieces):
    """The text that the pieces of a stream show."""
    shown = b"".join(text for piece in pieces if piece for text in answer.feed(piece)) + answer.rest()
    return json.loads(b'"' + shown + b'"')


texts = st.lists(st.text(alphabet='ab é\n"\\データ😀', max_size=5), min_size=1, max_size=8)
places = st.lists(st.integers(0, 10_000), max_size=12)


@given(texts, places, st.lists(st.text(alphabet="ab é", min_size=1, max_size=3), max_size=3))
def test_the_answer_is_the_text_before_the_first_stop_word(texts, places, words):
    full = "".join(texts)
    ends = [full.find(word) for word in words if word in full]
    answer = Generation(limit=1000, stops=tuple(words))
    shown = shown_of(answer, cut(stream(*texts), places))
    if not ends:
        assert (shown, answer.cut) == (full, False)
    else:
        # Which stop word came first in time decides; another may begin earlier but end later.
        assert full.startswith(shown)
        assert any(full.startswith(word, len(shown)) for word in words)
        assert answer.cut and answer.finish_reason == "stop"
    assert not any(word in shown for word in words)


def test_a_stop_word_over_several_tokens_is_held_back():
    stops = StopWords(("STOP",))
    assert [stops.feed(text) for text in ("a S", "TO", "x", "ST", "OP!", "more")] == ["a ", "", "STOx", "", "", ""]
    assert stops.reached
    held = StopWords(("STOP",))
    assert (held.feed("a ST"), held.rest(), held.rest()) == ("a ", "ST", "")


@pytest.mark.parametrize(
    ("texts", "limit", "tokens", "reason"),
    [
        (("a", "b", "c"), 3, 3, "length"),
        (("a", "b"), 3, 2, "stop"),
        (("a", "b", ""), 3, 2, "stop"),
        (("a", "", "b"), 9, 3, "stop"),
        (("a", "b", "c", ""), 3, 3, "length"),
        (("",), 3, 0, "stop"),
    ],
)
def test_tokens_and_the_reason_of_the_end(texts, limit, tokens, reason):
    answer = Generation(limit=limit)
    answer.feed(stream(*texts))
    assert (answer.tokens, answer.finish_reason, answer.begun, answer.rest()) == (tokens, reason, True, b"")


def test_the_models_own_reason_counts():
    answer = Generation(limit=2)
    answer.feed(event(text_output="a") + event(text_output="b", finish_reason="stop"))
    assert answer.finish_reason == "stop"


def test_an_error_in_the_stream_ends_it():
    answer = Generation(limit=9)
    assert answer.feed(stream("a", "b") + event(error="out of memory") + stream("c")) == [b"a", b"b"]
    assert (answer.failure, answer.over, answer.tokens) == ("out of memory", True, 2)


@pytest.mark.parametrize("data", [b"[1]", b"{", b'{"x": 1}', b'{"text_output": ["a"]}', b"x" * (1 << 20)])
def test_what_is_no_answer_is_an_error(data):
    with pytest.raises(ValueError, match=r".+"):
        Generation(limit=3).feed(b"data: " + data + b"\n" * (len(data) < 1000) * 2)


def test_nothing_has_begun_without_an_event():
    answer = Generation(limit=3)
    assert answer.feed(b": comment\n\n") == []
    assert not answer.begun
    with pytest.raises(ValueError, match="without an event"):
        answer.feed(b"")
