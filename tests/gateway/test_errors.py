import json

import pytest

from throttllem.engines.base import EngineError
from throttllem.gateway.control.rejections import RejectedError
from throttllem.gateway.http.errors import HttpError, as_http, detail, invalid, not_allowed, unavailable


def told(error):
    seen = as_http(error)
    return seen.status, json.loads(seen.body)["error"], dict(seen.headers)


def test_a_refusal_keeps_its_words_and_says_when_to_come_back():
    refusal = RejectedError(429, "full", kind="rate_limit_error", code="queue_full", retry_after_s=3)
    assert told(refusal) == (
        429,
        {"message": "full", "type": "rate_limit_error", "param": None, "code": "queue_full"},
        {b"retry-after": b"3"},
    )
    assert told(RejectedError(400, "no", kind="k"))[2] == {}


@pytest.mark.parametrize("status", [502, 503, 504])
def test_an_engine_error_keeps_its_status(status):
    seen, body, _ = told(EngineError("gone", status=status))
    assert (seen, body["type"]) == (status, "engine_error") and "gone" not in body["message"]


def test_an_engines_address_and_page_are_for_the_log():
    for error in (
        EngineError("http://10.0.0.1:8000/tokenize answers 500: <html>"),
        EngineError("[Errno 111] Connect call failed ('10.0.0.1', 8000)", told="the engine cannot be reached"),
        RejectedError(503, "no engine is up", kind="engine_error", detail="http://10.0.0.1 is gone"),
    ):
        assert "10.0.0.1" not in told(error)[1]["message"]
        assert "10.0.0.1" in detail(error)
    assert detail(RejectedError(400, "no", kind="k")) == "no"


def test_anything_else_tells_nothing_of_the_inside():
    status, body, _ = told(KeyError("secret"))
    assert status == 500
    assert "secret" not in json.dumps(body) and body["code"] == "internal_error"


def test_our_own_errors():
    assert told(invalid("n: wrong", "n"))[1]["param"] == "n"
    assert told(not_allowed("PUT", "/x", "GET"))[2] == {b"allow": b"GET"}
    assert told(unavailable("later", code="c", retry_after_s=2))[2] == {b"retry-after": b"2", b"connection": b"close"}
    assert as_http(error := HttpError(418, "tea")) is error
