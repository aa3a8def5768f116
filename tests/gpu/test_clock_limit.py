"""When a clock counts as limited, why, and until when: samples and times go in."""

import pytest

from throttllem.gpu.clock_limit import NOT_REACHED, OTHER_CONTROLLER, SWITCH_S, Limit, LimitDetector, follows
from throttllem.gpu.nvml import Sample, ThrottleReason


def sample(mhz, throttle=ThrottleReason.NONE):
    return Sample(at_s=0.0, clock_mhz=mhz, watts=100.0, energy_j=None, throttle=throttle)


def test_a_gpu_follows_at_its_clock_and_idle_below_it():
    assert follows(sample(1200), 1200) and follows(sample(1207), 1200)
    assert follows(sample(210, ThrottleReason.IDLE), 1200)
    assert not follows(sample(210), 1200)
    assert not follows(sample(210, ThrottleReason.IDLE | ThrottleReason.THERMAL), 1200)
    assert not follows(sample(1410, ThrottleReason.IDLE), 1200)


def test_a_switch_is_no_limit_until_it_takes_too_long():
    limits = LimitDetector()
    limits.update([sample(1410)], 900, 10.0, set_s=10.0)
    limits.update([sample(1410)], 900, 9.9 + SWITCH_S, set_s=10.0)
    assert limits.limit is None
    limits.update([sample(1410)], 900, 10.1 + SWITCH_S, set_s=10.0)
    assert limits.limit == Limit(mhz=1410, reason=OTHER_CONTROLLER)
    limits.update([sample(900)], 900, 11.0, set_s=10.0)
    assert limits.limit is None


@pytest.mark.parametrize(
    ("throttle", "reason"),
    [
        (ThrottleReason.POWER_CAP | ThrottleReason.THERMAL, "power cap, thermal"),
        (ThrottleReason.IDLE, OTHER_CONTROLLER),
        (ThrottleReason.NONE, OTHER_CONTROLLER),
    ],
)
def test_the_slowest_gpu_has_the_reason(throttle, reason):
    limits = LimitDetector()
    samples = [sample(1200), sample(1395, throttle), sample(1380, throttle)]
    limits.update(samples, 1200, 5.0, set_s=5.0, switched=True)
    assert limits.limit == Limit(mhz=1380, reason=reason)


def test_one_step_beside_the_clock_is_followed():
    limits = LimitDetector()
    limits.update([sample(1395), sample(1425)], 1410, 5.0, set_s=5.0, switched=True)
    assert limits.limit is None and not follows(sample(1380), 1410)


@pytest.mark.parametrize("locked", [True, False])
def test_a_boost_that_ends_below_the_clock_is_no_other_controller(locked):
    """A card that was never locked stands at 2,730 of 3,105 MHz, and NVML reports no reason."""
    limits = LimitDetector()
    limits.was_set(3105)
    limits.update([sample(2730)], 3105, 5.0, locked=locked, set_s=5.0, switched=True)
    assert limits.limit == Limit(mhz=2730, reason=NOT_REACHED)


def test_a_clock_that_was_reached_and_left_is_another_controllers():
    limits = LimitDetector()
    limits.was_set(1200)
    limits.update([sample(1200)], 1200, 5.0, set_s=5.0)
    limits.update([sample(510)], 1200, 6.0, set_s=5.0, switched=True)
    assert limits.limit == Limit(mhz=510, reason=OTHER_CONTROLLER)


def test_a_lower_clock_lifts_the_limit_and_a_higher_one_does_not():
    limits = LimitDetector()
    limits.update([sample(900)], 1200, 5.0, set_s=5.0, switched=True)
    limits.was_set(1000)
    assert limits.limit is not None
    limits.was_set(600)
    assert limits.limit is None


def test_free_gpus_may_be_faster_than_the_clock_of_a_dry_run():
    limits = LimitDetector()
    limits.update([sample(1410)], 900, 5.0, locked=False, set_s=0.0, switched=True)
    assert limits.limit is None
    limits.update([sample(705, ThrottleReason.THERMAL)], 900, 5.0, locked=False, set_s=0.0, switched=True)
    assert limits.limit == Limit(mhz=705, reason="thermal")
