"""The simulated engine's answers: texts, lengths, usage, and errors that name the field."""

import json

import pytest

from engines.contract import events_of, text_of
from engines.live import answers, asked, call
from throttllem.engines.simulated.text import count_tokens


@pytest.mark.parametrize("chat", [False, True])
def test_every_token_is_an_event(chat):
    ((status, data),) = answers(asked(chat, max_tokens=20, stream=True, ignore_eos=True))
    events = events_of(data)
    assert status == 200
    assert events[-1] == "[DONE]"
    words = [event for event in events[:-1] if text_of(event)]
    assert len(words) == 20
    assert [event["choices"][0]["finish_reason"] for event in words] == [None] * 19 + ["length"]
    assert {event["id"] for event in events[:-1]} == {"chatcmpl-1" if chat else "cmpl-1"}
    assert count_tokens("".join(map(text_of, words))) == 20
    opening = [event["choices"][0]["delta"] for event in events[: len(events) - 21]]
    assert opening == ([{"role": "assistant", "content": ""}] if chat else [])


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_and_a_whole_answer_are_the_same_text(chat):
    shared = {"max_tokens": 300, "temperature": 0}
    (_, stream), (_, whole) = answers(asked(chat, stream=True, **shared), asked(chat, **shared))
    choice = json.loads(whole)["choices"][0]
    text = choice["message"]["content"] if chat else choice["text"]
    assert text == "".join(map(text_of, events_of(stream)))
    assert json.loads(whole)["usage"]["completion_tokens"] == count_tokens(text)


def test_usage_comes_at_the_end_if_asked_for():
    options = {"include_usage": True}
    ((_, data),) = answers(asked(max_tokens=3, stream=True, ignore_eos=True, stream_options=options))
    *_, usage, done = events_of(data)
    assert (usage["choices"], done) == ([], "[DONE]")
    prompt = count_tokens("Hello there.")
    assert usage["usage"] == {"prompt_tokens": prompt, "completion_tokens": 3, "total_tokens": prompt + 3}


def test_answers_differ_but_for_a_seed_or_no_temperature():
    plain = asked(chat=True, stream=False)
    seeded = [asked(chat=True, seed=seed) for seed in (1, 1, 2)]
    texts = [json.loads(data)["choices"] for _, data in answers(plain, plain, *seeded)]
    assert texts[0] != texts[1]
    assert texts[2] == texts[3] != texts[4]
    again = [json.loads(data)["choices"] for _, data in answers(plain, plain)]
    assert again == texts[:2], "the engine's own seed makes it repeatable"


def test_lengths_are_those_of_a_chat():
    found = [json.loads(data)["usage"]["completion_tokens"] for _, data in answers(*[asked(chat=True)] * 200)]
    # The mean of 200 draws of a log-normal of sigma 0.9 scatters by 8 %.
    assert 150 < sum(found) / len(found) < 260
    assert len(set(found)) > 80
    reasons = [json.loads(data)["choices"][0] for _, data in answers(*[asked(chat=True, max_tokens=100)] * 40)]
    assert {choice["finish_reason"] for choice in reasons} == {"stop", "length"}


def test_a_completion_takes_16_tokens_where_it_names_no_limit():
    ((_, data),) = answers(asked(ignore_eos=True))
    assert json.loads(data)["usage"]["completion_tokens"] == 16
    ((_, data),) = answers(asked(chat=True, ignore_eos=True), max_context_tokens=200)
    assert json.loads(data)["usage"]["total_tokens"] == 200


REFUSED = [
    ({"n": 2}, "n"),
    ({"best_of": 3}, "best_of"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"logprobs": 2}, "logprobs"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"echo": True}, "echo"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"max_tokens": False}, "max_tokens"),
    ({"stream": "maybe"}, "stream"),
    ({"stream_options": 5}, "stream_options"),
    ({"stop": 5}, "stop"),
    ({"stop": "the"}, "stop"),
    ({"seed": 0.5}, "seed"),
]


@pytest.mark.parametrize(("change", "param"), REFUSED, ids=str)
def test_what_it_cannot_do_is_an_error_that_names_the_field(change, param):
    ((status, data),) = answers(call(**({"prompt": "Hello", "max_tokens": 4} | change)))
    assert status == 400
    assert json.loads(data)["error"]["param"] == param
    assert param in json.loads(data)["error"]["message"]


def test_refusals_have_their_status():
    found = answers(
        asked(model="another"),
        call("/v1/embeddings"),
        call(method="GET"),
        asked(max_tokens=5000),
        call(raw=b"\xff"),
        call("/v1/chat/completions", messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        call("/v1/models", method="GET"),
    )
    assert [status for status, _ in found] == [404, 404, 405, 400, 400, 400, 200]
    assert json.loads(found[3][1])["error"]["code"] == "context_length_exceeded"
    assert [model["id"] for model in json.loads(found[-1][1])["data"]] == ["toy"]


def test_a_stop_that_never_comes_and_a_tool_that_need_not_be_used_do_no_harm():
    ((status, _),) = answers(asked(stop=["\n\nUser:", "###"], tools=[{}], tool_choice="auto", n=1, max_tokens=4))
    assert status == 200
