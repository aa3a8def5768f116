"""Who is named by an event or a command."""

import pytest
from throttllem.gateway.control.named import done, named

from throttllem.core.types import (
    Arrived,
    Cancelled,
    Dispatch,
    EngineLost,
    Fail,
    Progressed,
    Reason,
    Reject,
    Request,
    Slo,
    Stepped,
    Timer,
)

REQUEST = Request(id=7, arrival_s=0.0, prompt_tokens=1, max_tokens=1, slo=Slo())


@pytest.mark.parametrize(
    ("what", "who"),
    [
        (Arrived(request=REQUEST), (7,)),
        (Cancelled(request_id=7), (7,)),
        (Progressed(engine=0, request_id=7, tokens=1), (7,)),
        (Dispatch(engine=0, request_id=7), (7,)),
        (Reject(request_id=7, why=Reason.BATCH), (7,)),
        (Fail(request_id=7, why=Reason.ENGINE_LOST), (7,)),
        (Stepped(engine=0, iteration=1, started=(1, 2), preempted=(3,), finished=(4,)), (1, 2, 3)),
        (Timer(), ()),
        (EngineLost(engine=0), ()),
    ],
)
def test_named(what, who):
    assert named(what) == who
    assert done(what) == ((4,) if isinstance(what, Stepped) else ())
