import json

import pytest

from throttllem.engines.base import EngineError
from throttllem.gateway.http.errors import not_allowed, unavailable
from throttllem.openai_api.errors import ApiError, as_api_error, error_body, error_event, invalid
from throttllem.openai_api.requests import CHAT


def shown(error):
    """Status, error object and headers, as a client gets them."""
    seen = as_api_error(error)
    assert error_body(seen, CHAT) == seen.body and error_event(seen, CHAT) == b"data: " + seen.body + b"\n\n"
    return seen.status, json.loads(seen.body)["error"], dict(seen.headers)


def test_a_rejection_has_its_type_its_code_and_when_to_retry():
    rejection = ApiError(429, "full", kind="rate_limit_error", code="queue_full", retry_after_s=3)
    assert shown(rejection) == (
        429,
        {"message": "full", "type": "rate_limit_error", "param": None, "code": "queue_full"},
        {b"retry-after": b"3"},
    )
    assert shown(ApiError(400, "no", kind="k"))[2] == {}


def test_the_type_follows_from_the_status():
    assert [shown(ApiError(status, "no"))[1]["type"] for status in (400, 500)] == [
        "invalid_request_error",
        "server_error",
    ]


@pytest.mark.parametrize("status", [502, 503, 504])
def test_an_engine_error_keeps_its_status(status):
    seen, error, _ = shown(EngineError("gone", status=status))
    assert (seen, error["type"]) == (status, "engine_error") and "gone" not in error["message"]


def test_an_engines_address_and_page_are_for_the_log():
    for error in (
        EngineError("http://10.0.0.1:8000/tokenize answers 500: <html>"),
        EngineError("[Errno 111] Connect call failed ('10.0.0.1', 8000)", message="the engine cannot be reached"),
        ApiError(503, "no engine is up", kind="engine_error", detail="http://10.0.0.1 is gone"),
    ):
        assert "10.0.0.1" not in shown(error)[1]["message"]
        assert "10.0.0.1" in str(error)
    assert str(ApiError(400, "no")) == "no"


def test_any_other_exception_shows_nothing_of_the_inside():
    status, error, _ = shown(KeyError("secret"))
    assert status == 500
    assert "secret" not in json.dumps(error) and error["code"] == "internal_error"


def test_our_own_errors():
    assert shown(invalid("n: wrong", "n"))[1]["param"] == "n"
    assert shown(not_allowed("PUT", "/x", "GET"))[2] == {b"allow": b"GET"}
    assert shown(unavailable("later", code="c", retry_after_s=2))[2] == {b"retry-after": b"2", b"connection": b"close"}
    assert as_api_error(error := ApiError(418, "tea")) is error
