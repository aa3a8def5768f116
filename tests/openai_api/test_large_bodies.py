import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.openai_api.errors import ApiError
from throttllem.openai_api.large_bodies import LARGE_BYTES, MOST_ELEMENTS, PIECE_BYTES
from throttllem.openai_api.requests import CHAT, COMPLETIONS, model_of, parse_request

PADDING = " " * LARGE_BYTES
MESSAGES = [{"role": "user", "content": "x"}]
GENERATE = "/v2/models/ensemble/generate_stream"


def read(path, body):
    """What is read of a body, or the field at fault."""
    try:
        request = parse_request(path, body)
    except ApiError as error:
        return error.status, error.param
    return (
        request.model,
        request.max_tokens,
        request.choices,
        request.stream,
        request.caller,
        request.metrics,
        request.prompts,
    )


values = (
    st.none() | st.booleans() | st.integers(-2, 9) | st.sampled_from(["x", "4", 4.0, [], {}, [1, 2], [[1], [2]], ["a"]])
)
names = st.sampled_from(
    ["model", "prompt", "messages", "max_tokens", "n", "stream", "user", "echo", "throttllem", "other"]
)


@given(st.dictionaries(names, values), st.sampled_from([COMPLETIONS, CHAT, GENERATE]))
def test_a_large_body_is_read_as_a_small_one(fields, path):
    small = {"model": "tiny", "prompt": "x", "messages": MESSAGES, "text_input": "x", **fields}
    large = json.dumps(small)
    assert read(path, (large[:-1] + PADDING + "}").encode()) == read(path, large.encode())


@pytest.mark.parametrize(
    "body", [b"[1]", b"1", b"{", b'{"a":1}x', b'{"a":' * 5000, b"\xff", b'{"a":"\\ud800","prompt":"\\ud800"}']
)
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(ApiError) as caught:
        parse_request(COMPLETIONS, PADDING.encode() + body)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("prompt", "lengths"),
    [
        ([1] * 300_000, (300_000,)),
        ([[1, 23]] * 100_000, (2,) * 100_000),
        ([[1] * 50_000, [1] * 25_000], (37_500, 37_500)),
        (["word " * 20_000] * 3, (100_000,) * 3),
    ],
)
def test_large_prompts_have_their_lengths(prompt, lengths):
    request = parse_request(COMPLETIONS, json.dumps({"model": "tiny", "prompt": prompt}).encode())
    assert tuple(map(len, request.prompts)) == lengths


@pytest.mark.parametrize(
    "ids", ["[1.0,true,2]", '["4",5]', "[[1.0,2],[false,3]]", "[1e2]", "[1.5]", "[-1]", "[null]", '["a",1]']
)
def test_token_ids_are_taken_in_a_large_prompt_as_in_a_small_one(ids):
    large = ids[0] + PADDING + ids[1:]
    found = [read(COMPLETIONS, b'{"model":"tiny","prompt":%s}' % value.encode()) for value in (ids, large)]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "prompt", ["[" + "[]," * 90_000 + "[]]", "[" + '"a",' * 90_000 + "1]", "[" + "{}," * 90_000 + "1]"]
)
def test_large_prompts_of_another_shape_are_refused(prompt):
    with pytest.raises(ApiError) as caught:
        parse_request(COMPLETIONS, b'{"model":"tiny","prompt":%s}' % prompt.encode())
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("part", [b"1,", b"[],", b"{},", b'{"a":1},', b"[[[[[]]]]],", b'"\\ud83d\\ude00",'])
def test_what_is_not_ours_is_passed_over_and_no_object_made_of_it(part):
    body = b'{"other":[' + part * (3_000_000 // len(part)) + b'1],"model":"tiny","prompt":"x"}'
    began_s = time.thread_time()
    assert parse_request(COMPLETIONS, body).model == model_of(body) == "tiny"
    assert time.thread_time() - began_s < 0.15  # objects of all would take 0.3 s to 1 s


def test_a_body_of_too_many_elements_is_refused():
    body = b'{"model":"tiny","prompt":[' + b"1," * MOST_ELEMENTS + b"1]}"
    for reader in (model_of, lambda body: parse_request(COMPLETIONS, body)):
        with pytest.raises(ApiError, match="more lists, objects and elements"):
            reader(body)


@pytest.mark.parametrize("own", ['"throttllem":{"metrics":true}', '"\\u0074hrottllem" : {"metrics" : true }'])
@pytest.mark.parametrize("shape", ["{%s,%s}", "{ %s , %s}", "{%s\n,\t%s }"])
@pytest.mark.parametrize("first", [True, False])
def test_the_own_field_is_cut_out_of_a_large_body(own, shape, first):
    rest = '"model":"tiny","prompt":"%s"' % ('\\"throttllem\\":{},' * 5000)
    request = parse_request(COMPLETIONS, (shape % ((own, rest) if first else (rest, own))).encode())
    assert request.metrics and json.loads(request.body) == json.loads("{" + rest + "}")


class Read(bytes):
    """Counts how often bytes are taken out of it."""

    times = 0

    def __getitem__(self, at):
        self.times += 1
        return super().__getitem__(at)


@pytest.mark.parametrize("blanks", [PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 5 * PIECE_BYTES])
@pytest.mark.parametrize(
    "shape", [b'{"a":1,%s"throttllem":{}%s}', b'{"a":1%s,"throttllem":{}}%s', b'{%s"throttllem":{}%s,"a":1}']
)
def test_blanks_around_the_own_field_are_not_read_one_by_one(shape, blanks):
    fields = b'{"model":"tiny","prompt":"x",'
    body = fields + (shape % (b" " * blanks, b"\n" * blanks))[1:]
    request = parse_request(COMPLETIONS, read := Read(body))
    assert read.times < 50
    assert json.loads(request.body) == {"model": "tiny", "prompt": "x", "a": 1}


@pytest.mark.parametrize("blanks", [0, 1, PIECE_BYTES, 2 * PIECE_BYTES + 1])
def test_the_model_is_found_behind_blanks(blanks):
    assert model_of(b" " * blanks + b'{"model":"tiny"}') == "tiny"
    assert model_of(b"\n" * blanks) is None


def test_the_own_field_twice_is_refused():
    body = b'{"throttllem":{"metrics":true},"model":"tiny","prompt":"%s","throttllem":{"metrics":true}}' % (
        b"x" * LARGE_BYTES
    )
    with pytest.raises(ApiError, match="twice"):
        parse_request(COMPLETIONS, body)


def test_of_a_counted_large_body_its_bytes_are_kept_alone():
    body = json.dumps(
        {"model": "tiny", "messages": [{"role": "user", "content": "x" * LARGE_BYTES}], "other": 1}
    ).encode()
    request = parse_request(CHAT, body, key_name="k").counted()
    assert request.fields == {} and request.caller == "k"
    assert request.whole().fields == json.loads(body) and request.whole().caller == "k"
