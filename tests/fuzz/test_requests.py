"""Request parsing and SLO headers: a request that can be run, or an error 400 or 404; nothing else."""

import json

from hypothesis import strategies as st

from tests.fuzz.properties import fuzzed, mutated
from tests.gateway.http.test_app_garbage import bodies
from throttllem.core.types import Slo
from throttllem.gateway.http.slo_headers import TARGETS, read_slo
from throttllem.openai_api.conversations import texts_in
from throttllem.openai_api.errors import MESSAGES, RESPONSES, ApiError
from throttllem.openai_api.large_bodies import LARGE_BYTES
from throttllem.openai_api.requests import CHAT, COMPLETIONS, model_of, parse_request, stop_texts

PATHS = (COMPLETIONS, CHAT, RESPONSES, MESSAGES, "/v2/models/m/generate", "/v2/models/m/generate_stream")
TEXT = {"type": "text", "text": "y"}
TOOL = {"type": "function", "name": "f", "parameters": {}, "input_schema": {}}
CONVERSATION = {
    "model": "tiny",
    "system": [TEXT],
    "instructions": "i",
    "messages": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"a": [1]}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [TEXT]}]},
    ],
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "y"},
    ],
    "tools": [TOOL],
    "max_tokens": 5,
    "max_output_tokens": "5",
    "stream": "true",
}  # fmt: skip
SIMPLE = {
    "model": "tiny", "prompt": [[1, 2], [3]], "text_input": ["x"], "messages": [{"role": "user", "content": "x"}],
    "max_tokens": 4.0, "n": "2", "best_of": 3, "echo": 1, "stream": True, "user": "u", "stop": ["a"],
    "throttllem": {"metrics": True}, "stream_options": {"include_usage": True},
}  # fmt: skip
VALUES = [
    b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"[]", b"{}", b'""', b'"\\ud800"', b"9" * 400, b"\x00",
    b"[[", b"}",
]  # fmt: skip
written = st.one_of(
    bodies.map(lambda body: json.dumps(body).encode()),
    mutated(json.dumps(CONVERSATION).encode(), json.dumps(SIMPLE).encode(), tokens=VALUES),
)


@fuzzed(path=st.sampled_from(PATHS), body=written, padding=st.sampled_from([0, 0, 0, LARGE_BYTES]), whole=st.booleans())
def test_a_body_is_a_request_or_an_error_of_the_client(path, body, padding, whole):
    try:
        request = parse_request(path, b" " * padding + body, whole=whole)
        stop_texts(request)
        request.counted().whole()
    except ApiError as error:
        assert error.status in (400, 404) and str(error)
        return
    assert request.sequences >= 1 and request.choices >= 1
    assert request.max_tokens is None or 1 <= request.max_tokens < 2**31
    assert isinstance(request.model, str) and isinstance(request.stream, bool) and len(request.caller) <= 64
    assert b'"throttllem"' not in request.body or b'"throttllem"' in body
    assert request.chat is None or request.chat["messages"]
    for name in ("input", "messages", "system"):
        assert all(isinstance(text, str) for text in texts_in(request.fields.get(name)))


FORM = (
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n'
    b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\ntiny\r\n--x--\r\n'
)
TYPES = [
    "",
    "application/json",
    "multipart/form-data; boundary=x",
    "multipart/form-data",
    "multipart/form-data; boundary=",
]


@fuzzed(
    body=mutated(FORM, b'{"model": "tiny"}', tokens=[b"\r\n", b"--x", b"--", b'name="model"', b"\n\n", *VALUES]),
    kind=st.sampled_from(TYPES) | st.text(st.characters(max_codepoint=255), max_size=20).map("multipart/".__add__),
)
def test_a_model_is_a_text_or_none(body, kind):
    try:
        model = model_of(body, kind)
    except ApiError as error:
        assert error.status == 400
        return
    assert model is None or isinstance(model, str)


texts = st.sampled_from(["1", "0", "-0", "1e3", "1e-400", "1e999", "nan", "inf", "1_0", " 7 ", "٣", "gold", ""])
names = st.sampled_from([*TARGETS, "x-slo-class", "x-slo-", "x-slo-ttft", "x-other"])


@fuzzed(
    headers=st.dictionaries(names | st.text(max_size=5).map("x-slo-".__add__), texts | st.text(max_size=8), max_size=3)
)
def test_headers_are_an_slo_or_an_error_of_the_client(headers):
    default = Slo(e2e_s=9.0)
    try:
        slo = read_slo(headers, default, {"gold": Slo(ttft_s=1.0)})
    except ApiError as error:
        assert error.status == 400 and str(error)
        return
    set_ = [value for value in (slo.e2e_s, slo.tbt_s, slo.ttft_s) if value is not None]
    assert all(0 < value < float("inf") for value in set_)
    assert slo == default or any(name.startswith("x-slo-") for name in headers)
