"""The core's reasons as a client gets them: OpenAI's shape, a status that fits, and what to do."""

import pytest
from core.toy import spec

from throttllem.core.types import Reason, Request, Slo
from throttllem.gateway.control.rejections import (
    draining,
    engine_silent,
    no_engine,
    queue_timeout,
    rejected,
    unknown_model,
)

REQUEST = Request(id=1, arrival_s=0.0, prompt_tokens=100, max_tokens=200, slo=Slo(), sequences=3)


@pytest.mark.parametrize("known", [None, spec()])
@pytest.mark.parametrize("why", Reason)
def test_every_reason_has_a_message_and_a_status(why, known):
    error = rejected(why, REQUEST, known, 7)
    assert error.status in (400, 429, 502)
    assert error.kind in ("invalid_request_error", "rate_limit_error", "engine_error")
    assert str(error) and error.code
    assert (error.retry_after_s == 7) == (error.status == 429)


def test_limits_are_named_where_they_are_known():
    assert "100 + max_tokens 200 = 300 tokens; the model's context holds 256" in str(
        rejected(Reason.NEVER_FITS_CONTEXT, REQUEST, spec(), 1)
    )
    assert "for each of 3 answers; the engine's KV cache holds 256" in str(
        rejected(Reason.NEVER_FITS_KV, REQUEST, spec(), 1)
    )


def test_the_gateways_own_rejections():
    errors = [queue_timeout(2.0, 9), no_engine("it is out"), no_engine(None), engine_silent(3.0), draining()]
    assert [error.status for error in errors] == [503, 503, 503, 504, 503]
    assert [error.retry_after_s for error in errors] == [9, 5, 5, None, 5]
    assert [str(error) for error in errors[1:3]] == ["no engine is up: it is out", "no engine is up"]
    assert errors[1].message == "no engine is up"
    assert "'x' does not exist; there is: a, b" in str(unknown_model("x", ("a", "b")))
    assert "none yet" in str(unknown_model("x", ()))
    assert len(str(unknown_model("x" * 10_000, ("a",)))) < 200
