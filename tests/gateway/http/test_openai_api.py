import json

import pytest

from throttllem.core.types import Slo
from throttllem.engines.paths import CHAT, COMPLETIONS
from throttllem.gateway.http.errors import HttpError
from throttllem.gateway.http.openai_api import check_sequences, controlled, model_of, read_slo, read_wish

STREAM = "/v2/models/ensemble/generate_stream"


def wish(path, fields, headers=None, key_name=None):
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return read_wish(path, body, headers or {}, key_name)


def refused(path, fields):
    with pytest.raises(HttpError) as caught:
        wish(path, fields)
    assert caught.value.status == 400
    return caught.value


def complete(**fields):
    return wish(COMPLETIONS, {"model": "tiny", "prompt": "x", **fields}).ask


def chat(**fields):
    return wish(CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **fields}).ask


def test_controlled_paths():
    assert controlled(COMPLETIONS) and controlled(CHAT) and controlled(STREAM)
    assert controlled("/v2/models/m/versions/1/generate")
    assert not any(
        map(controlled, ("/v1/embeddings", "/v2/models/m/infer", "/v2/models/a/b/generate", COMPLETIONS + "/"))
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
    ask = complete(prompt=prompt, n=2)
    assert (ask.prompts, ask.sequences) == (prompts, 2 * len(prompts))


@pytest.mark.parametrize(
    "prompt", [None, 1, [], {}, ["x", 1], [1, "x"], [1, True], [[]], [[1], 2], [[1], ["x"]], [-1], [2**40]]
)
def test_other_prompts_are_refused(prompt):
    assert refused(COMPLETIONS, {"model": "tiny", "prompt": prompt}).param == "prompt"


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
        *(("max_tokens", value) for value in (0, -1, 1.5, "7", True, [], 2**31)),
        *(("n", value) for value in (0, "1", 2**31)),
        ("best_of", 0),
        *(("stream", value) for value in (1, "true", {})),
        *(("model", value) for value in (None, 1, "")),
        *(("throttllem", value) for value in (None, True, {"metrics": 1}, {"speed": 1})),
    ],
)
def test_wrong_values_name_their_field(name, value):
    assert refused(COMPLETIONS, {"model": "tiny", "prompt": "x", name: value}).param == name


@pytest.mark.parametrize("messages", [None, "x", [], ["x"], [None], {}])
def test_messages_are_a_list_of_objects(messages):
    assert refused(CHAT, {"model": "tiny", "messages": messages}).param == "messages"


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"1", b'"x"', b"\xff", b'{"a":' * 5000, b"{'model': 1}"])
def test_what_is_no_json_object_is_refused(body):
    assert refused(CHAT, body)


def test_native_way_of_triton():
    ask = wish(STREAM, {"text_input": "x", "max_tokens": 5, "stream": True}).ask
    assert (ask.model, ask.prompts, ask.max_tokens, ask.stream) == ("ensemble", ("x",), 5, True)
    assert not wish(STREAM, {"text_input": "x"}).ask.stream
    assert not wish("/v2/models/m/generate", {"text_input": "x", "stream": True}).ask.stream
    assert "text_input" in str(refused(STREAM, {"max_tokens": 5}))
    assert "max_tokens" in str(refused(STREAM, {"text_input": "x", "max_tokens": 2**31}))


def test_body_goes_on_as_it_came_but_for_our_key():
    body = b'{ "model":"tiny",\n "prompt":"\\u00e4", "x": 1.0 }'
    assert wish(COMPLETIONS, body).body is body
    read = wish(COMPLETIONS, body[:-1] + b', "throttllem": {"metrics": true}}')
    assert json.loads(read.body) == json.loads(body)
    assert read.metrics and "throttllem" not in read.ask.body
    assert not wish(COMPLETIONS, body).metrics
    assert wish(COMPLETIONS, body, {"x-throttllem-metrics": "1"}).metrics


def test_number_that_cannot_be_written_again():
    body = b'{"model":"tiny","prompt":"x","throttllem":{},"seed":' + b"9" * 5000 + b"}"
    with pytest.raises(HttpError) as caught:
        wish(COMPLETIONS, body)
    assert caught.value.status == 400


def test_more_answers_than_any_engine_can_run():
    many = complete(prompt=["x"] * 5, n=2)
    check_sequences(many, 10)
    check_sequences(complete(n=4096), None)
    cases = ((many, 9, "n"), (many, 4, "prompt"), (complete(n=2**31 - 1), 256, "n"), (chat(n=4097), None, "n"))
    for ask, most, param in cases:
        with pytest.raises(HttpError, match=f"at most {most or 4096} answers run side by side") as caught:
            check_sequences(ask, most)
        seen = caught.value
        assert (seen.status, seen.param, seen.code) == (400, param, "too_many_sequences")


@pytest.mark.parametrize("part", [b"[],", b"{},", b'"a":1,'])
def test_bodies_that_would_take_long_to_read_are_not_read(part):
    body = b'{"model":"tiny","x":[{' + part * 250_000  # no JSON at all, which nobody finds out
    for read in (model_of, lambda body: wish(COMPLETIONS, body)):
        with pytest.raises(HttpError, match="more lists, objects or keys than 200000"):
            read(body)


def test_long_bodies_of_text_and_tokens_are_read():
    assert len(complete(prompt=[1] * 400_000).prompts[0]) == 400_000
    assert complete(prompt="x [y]: z. " * 50_000).prompts


def test_caller_is_short_and_still_his_own():
    fields = {"model": "tiny", "prompt": "x"}
    assert wish(COMPLETIONS, fields | {"user": "u" * 64}).caller == "u" * 64
    one, other = (wish(COMPLETIONS, fields | {"user": "u" * 10_000 + end}).caller for end in "ab")
    assert len(one) == len(other) == 64 and one != other and one.startswith("uuuu")


def test_caller_is_the_key_else_the_user():
    fields = {"model": "tiny", "prompt": "x", "user": "u"}
    assert wish(COMPLETIONS, fields).caller == "u"
    assert wish(COMPLETIONS, fields, key_name="k").caller == "k"
    assert wish(COMPLETIONS, fields | {"user": 7}).caller == ""


@pytest.mark.parametrize(
    ("body", "model"),
    [(b' {"model": "m"}', "m"), (b'{"model": 1}', None), (b"{", None), (b"--form", None), (b"", None), (b"[]", None)],
)
def test_model_of_an_uncontrolled_body(body, model):
    assert model_of(body) == model


def test_promises_by_class_and_by_header():
    classes = {"fast": Slo(ttft_s=0.1, e2e_s=2.0)}
    default = Slo(e2e_s=30.0)
    assert read_slo({}, default, classes) == default
    assert read_slo({"x-slo-class": "fast"}, default, classes) == classes["fast"]
    headers = {"x-slo-class": "fast", "x-slo-ttft-ms": "250", "x-slo-tpot-ms": " 1.5e1 "}
    assert read_slo(headers, default, classes) == Slo(ttft_s=0.25, tbt_s=0.015, e2e_s=2.0)
    assert read_slo({"x-slo-e2e-ms": "500"}, default, classes) == Slo(e2e_s=0.5)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e400", "1_0", "", "ten", "1e-323"])
@pytest.mark.parametrize("header", ["x-slo-ttft-ms", "x-slo-tpot-ms", "x-slo-e2e-ms"])
def test_promises_are_positive_numbers(header, text):
    with pytest.raises(HttpError, match=header) as caught:
        read_slo({header: text}, Slo(), {})
    assert (caught.value.status, caught.value.param) == (400, header)


def test_unknown_class_names_the_known_ones():
    with pytest.raises(HttpError, match="batch, fast"):
        read_slo({"x-slo-class": "slow"}, Slo(), {"fast": Slo(), "batch": Slo()})
    with pytest.raises(HttpError, match="none are configured"):
        read_slo({"x-slo-class": "slow"}, Slo(), {})


@pytest.mark.parametrize(("header", "near"), [("x-slo-tbt-ms", "x-slo-tpot-ms"), ("x-slo-e2e", "x-slo-e2e-ms")])
def test_a_promise_that_is_not_known_is_refused_with_the_nearest(header, near):
    with pytest.raises(HttpError, match=near):
        read_slo({header: "5", "content-type": "application/json"}, Slo(), {})
