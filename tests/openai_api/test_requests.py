import json
import math
import sys

import pytest

from throttllem.openai_api.errors import ApiError
from throttllem.openai_api.requests import (
    CHAT,
    COMPLETIONS,
    check_sequences,
    is_controlled,
    model_of,
    parse_request,
    stop_texts,
)

STREAM = "/v2/models/ensemble/generate_stream"


def parsed(path, fields, **more):
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return parse_request(path, body, **more)


def refusal(path, fields):
    with pytest.raises(ApiError) as caught:
        parsed(path, fields)
    assert caught.value.status == 400
    return caught.value


def complete(**fields):
    return parsed(COMPLETIONS, {"model": "tiny", "prompt": "x", **fields})


def chat(**fields):
    return parsed(CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **fields})


def test_controlled_paths():
    assert is_controlled(COMPLETIONS) and is_controlled(CHAT) and is_controlled(STREAM)
    assert is_controlled("/v2/models/m/versions/1/generate")
    assert not any(
        map(is_controlled, ("/v1/embeddings", "/v2/models/m/infer", "/v2/models/a/b/generate", COMPLETIONS + "/"))
    )


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("x", ("x",)),
        (["x", "y"], ("x", "y")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_prompts_have_four_shapes(prompt, prompts):
    request = complete(prompt=prompt, n=2)
    assert (request.prompts, request.sequences) == (prompts, 2 * len(prompts))


@pytest.mark.parametrize("prompt", [None, 1, [], {}, ["x", 1], [1, "x"], [[]], [[1], 2], [[1], ["x"]], [-1], [2**40]])
def test_other_prompts_are_refusal(prompt):
    assert refusal(COMPLETIONS, {"model": "tiny", "prompt": prompt}).param == "prompt"


def test_limits_choices_and_stream():
    assert (complete().max_tokens, complete().choices, complete().stream) == (None, 1, False)
    assert complete(max_tokens=7, max_completion_tokens=9).max_tokens == 7
    assert chat(max_tokens=7, max_completion_tokens=9).max_tokens == 9
    assert chat(max_tokens=7).max_tokens == 7
    assert complete(n=2, best_of=5).choices == 5
    assert chat(n=2, best_of=5).choices == 2
    assert complete(stream=True).stream and not complete(stream=None).stream


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_tokens", value) for value in (0, -1, 1.5, "7.5", "", "0x7", False, [], 2**31, math.nan, 10**400)),
        *(("n", value) for value in (0, "x", "-1", 2**31)),
        *(("stream", value) for value in (2, "", "maybe", 1.5, {})),
        *(("model", value) for value in (1, True, [])),
        *(("throttllem", value) for value in (None, True, {"metrics": 1}, {"speed": 1})),
    ],
)
def test_wrong_values_name_their_field(name, value):
    assert refusal(COMPLETIONS, {"model": "tiny", "prompt": "x", name: value}).param == name


@pytest.mark.parametrize("value", [4, 4.0, "4", "4.0", " 4 ", "+4"])
def test_whole_numbers_as_vllm_takes_them(value):
    """Recorded from vLLM 0.32, as are the others here; engines that read `fields` get numbers."""
    request = complete(max_tokens=value, n=value)
    assert (request.max_tokens, request.choices, request.fields["max_tokens"], request.fields["n"]) == (4, 4, 4, 4)
    assert chat(max_completion_tokens=value, max_tokens=0).max_tokens == 4


@pytest.mark.parametrize("value", [True, 1, 1.0, "true", "True", "ON", "yes", "y", "t", "1"])
def test_truth_values_as_vllm_takes_them(value):
    assert complete(stream=value, stream_options={"include_usage": value}).include_usage
    assert chat(stream=value).fields["stream"] is True


@pytest.mark.parametrize("value", [False, 0, 0.0, "false", "off", "no", "n", "f", "0", None])
def test_values_that_are_false(value):
    assert not chat(stream=value).stream


def test_an_echo_alone_is_one_token_of_work():
    assert complete(max_tokens=0, echo=True).max_tokens == complete(max_tokens="0", echo="true").max_tokens == 1
    for fields in ({"max_tokens": 0, "echo": "off"}, {"max_tokens": -1, "echo": True}):
        assert refusal(COMPLETIONS, {"model": "tiny", "prompt": "x", **fields}).param == "max_tokens"
    assert refusal(CHAT, {"messages": [{"role": "user"}], "max_tokens": 0, "echo": True}).param == "max_tokens"


def test_a_request_may_name_no_model():
    assert complete(model=None).model == complete(model="").model == ""


def test_token_ids_may_be_written_otherwise():
    assert complete(prompt=[1.0, "2", True]).prompts == ((1, 2, 1),) and complete(prompt=[["3"]]).prompts == ((3,),)


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32-le"])
def test_json_in_other_encodings(coding):
    body = json.dumps({"model": "tiny", "prompt": "ü"}, ensure_ascii=False).encode(coding)
    assert parse_request(COMPLETIONS, body).prompts == ("ü",)


def test_a_lone_surrogate_is_read_as_engines_in_python_read_it():
    body = b'{"model": "tiny", "prompt": "x", "user": "\\ud800"}'
    assert parse_request(COMPLETIONS, body).body == body


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_lone_surrogate_in_a_prompt_is_no_text(path):
    said = {"prompt": "\ud800", "messages": [{"role": "user", "content": "\udc00x"}]}
    name = "messages" if path == CHAT else "prompt"
    assert refusal(path, {"model": "tiny", name: said[name]}).param == name


@pytest.mark.parametrize("messages", [None, "x", [], ["x"], [None], {}])
def test_messages_are_a_list_of_objects(messages):
    assert refusal(CHAT, {"model": "tiny", "messages": messages}).param == "messages"


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"1", b'"x"', b"\xff", b'{"a":' * 5000, b"{'model': 1}"])
def test_what_is_no_json_object_is_refusal(body):
    assert refusal(CHAT, body)


def test_tritons_native_requests():
    request = parsed(STREAM, {"text_input": "x", "max_tokens": 5, "stream": True})
    assert (request.model, request.prompts, request.max_tokens, request.stream) == ("ensemble", ("x",), 5, True)
    assert not parsed(STREAM, {"text_input": "x"}).stream
    assert not parsed("/v2/models/m/generate", {"text_input": "x", "stream": True}).stream
    assert "text_input" in str(refusal(STREAM, {"max_tokens": 5}))
    assert "max_tokens" in str(refusal(STREAM, {"text_input": "x", "max_tokens": 2**31}))
    assert parsed("/v2/models/m/versions/1/generate", {"text_input": ["a", "b"], "max_tokens": [5]}).max_tokens == 5


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", {}, {"text_input": 3}, {"text_input": []}, {"text_input": "a", "max_tokens": 0}]
)
def test_native_requests_without_a_text_or_with_a_wrong_limit_are_refused(body):
    assert refusal("/v2/models/m/generate", body)


def test_native_streams_are_true_or_false():
    assert refusal(STREAM, {"text_input": "x", "stream": "yes"}).param == "stream"


def test_no_other_path_is_read():
    with pytest.raises(ApiError) as caught:
        parsed("/v1/embeddings", {"model": "tiny"})
    assert caught.value.status == 404


def test_usage_in_a_stream():
    assert complete(stream_options={"include_usage": True}).include_usage
    assert not any(complete(stream_options=options).include_usage for options in (None, {}, 5, {"include_usage": 2}))


def test_texts_that_end_an_answer():
    found = [stop_texts(complete(stop=stop)) for stop in (None, "a", ["a", "", "b"], [])]
    assert found == [(), ("a",), ("a", "b"), ()]
    for stop in (3, [3], {"a": 1}):
        with pytest.raises(ApiError) as caught:
            stop_texts(complete(stop=stop))
        assert caught.value.param == "stop"


def test_a_plain_request_is_read_in_a_few_calls():
    body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 5, "stream": True}).encode()
    calls = []
    sys.setprofile(lambda frame, event, _: event == "call" and calls.append(frame.f_code.co_name))
    try:
        parse_request(COMPLETIONS, body)
    finally:
        sys.setprofile(None)
    assert len(calls) <= 6, calls


def test_body_goes_on_as_it_came_but_for_our_key():
    body = b'{ "model":"tiny",\n "prompt":"\\u00e4", "x": 1.0 }'
    assert parsed(COMPLETIONS, body).body is body
    read = parsed(COMPLETIONS, body[:-1] + b', "throttllem": {"metrics": true}}')
    assert json.loads(read.body) == json.loads(body)
    assert read.metrics and "throttllem" not in read.fields
    assert not parsed(COMPLETIONS, body).metrics
    assert parsed(COMPLETIONS, body, metrics=True).metrics


def test_number_that_cannot_be_written_again():
    body = b'{"model":"tiny","prompt":"x","throttllem":{},"seed":' + b"9" * 5000 + b"}"
    with pytest.raises(ApiError) as caught:
        parsed(COMPLETIONS, body)
    assert caught.value.status == 400


def test_more_answers_than_any_engine_can_run():
    many = complete(prompt=["x"] * 5, n=2)
    check_sequences(many, 10)
    check_sequences(complete(n=4096), None)
    cases = ((many, 9, "n"), (many, 4, "prompt"), (complete(n=2**31 - 1), 256, "n"), (chat(n=4097), None, "n"))
    for request, most, param in cases:
        with pytest.raises(ApiError, match=f"at most {most or 4096} answers run side by side") as caught:
            check_sequences(request, most)
        seen = caught.value
        assert (seen.status, seen.param, seen.code) == (400, param, "too_many_sequences")


def test_long_bodies_of_text_and_tokens_are_read():
    assert len(complete(prompt=[1] * 400_000).prompts[0]) == 400_000
    assert complete(prompt="x [y]: z. " * 50_000).prompts


def test_a_callers_name_is_short_and_still_unique():
    fields = {"model": "tiny", "prompt": "x"}
    assert parsed(COMPLETIONS, fields | {"user": "u" * 64}).caller == "u" * 64
    one, other = (parsed(COMPLETIONS, fields | {"user": "u" * 10_000 + end}).caller for end in "ab")
    assert len(one) == len(other) == 64 and one != other and one.startswith("uuuu")


def test_caller_is_the_key_else_the_user():
    fields = {"model": "tiny", "prompt": "x", "user": "u"}
    assert parsed(COMPLETIONS, fields).caller == "u"
    assert parsed(COMPLETIONS, fields, key_name="k").caller == "k"
    assert parsed(COMPLETIONS, fields | {"user": 7}).caller == ""


@pytest.mark.parametrize(
    ("body", "model"),
    [(b' {"model": "m"}', "m"), (b'{"model": 1}', None), (b"{", None), (b"--form", None), (b"", None), (b"[]", None)],
)
def test_model_of_an_uncontrolled_body(body, model):
    assert model_of(body) == model


def test_a_clients_broken_form_writes_nothing_into_the_log(caplog):
    assert model_of(b"--x no boundary", "multipart/form-data; boundary=x") is None
    assert caplog.records == []


@pytest.mark.parametrize(
    ("path", "repeatable"), [("/v1/completions", True), ("/v1/messages", True), ("/v1/responses", False)]
)
def test_what_an_engine_stores_is_not_sent_twice(path, repeatable):
    body = {"model": "m", "max_tokens": 3, "prompt": "a", "input": "a", "messages": [{"role": "user", "content": "a"}]}
    assert parse_request(path, json.dumps(body).encode()).repeatable is repeatable
