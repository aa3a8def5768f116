"""When to come back: by the pace of the last minute, from 1 to 60 seconds."""

from throttllem.gateway.control.retry_after import RetryEstimator


def test_by_how_many_ended_and_how_many_wait():
    pace = RetryEstimator()
    assert pace.retry_after_s(99, 0.0) == 5
    for second in range(10):
        pace.ended(float(second))
    assert pace.retry_after_s(0, 10.0) == 1
    assert pace.retry_after_s(9, 10.0) == 10
    assert pace.retry_after_s(10_000, 10.0) == 60
    assert pace.retry_after_s(9, 100.0) == 5
