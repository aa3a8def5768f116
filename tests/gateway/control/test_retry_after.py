"""When a rejected client may try again: by the rate of ends in the last minute, from 1 to 60 seconds."""

from throttllem.gateway.control.retry_after import RetryEstimator


def test_the_estimate_follows_the_rate_of_ends_and_the_queue():
    retry = RetryEstimator()
    assert retry.retry_after_s(99, 0.0) == 5
    for second in range(10):
        retry.ended(float(second))
    assert retry.retry_after_s(0, 10.0) == 1
    assert retry.retry_after_s(9, 10.0) == 10
    assert retry.retry_after_s(10_000, 10.0) == 60
    assert retry.retry_after_s(9, 100.0) == 5
