import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.physics.catalogue import Catalogue
from throttllem.physics.clock import clock_scale

A100 = Catalogue.load().gpu("a100-40gb-pcie")
SIMPLE_TIME = A100.time.model_copy(
    update={
        "memory_knee_mhz": 1000.0,
        "memory_sharpness": 2.0,
        "compute_clock_share": 1.0,
        "latency_clock_share": 0.5,
    }
)
SIMPLE_POWER = A100.power.model_copy(update={"knee_mhz": 1000.0, "voltage_rise": 1.0, "voltage_exponent": 1.0})


def test_all_one_at_the_top_clock() -> None:
    assert clock_scale(A100.time, A100.power, 1410, 1410) == pytest.approx((1, 1, 1, 1))


def test_by_hand() -> None:
    scale = clock_scale(SIMPLE_TIME, SIMPLE_POWER, 1000, 2000)
    assert scale.compute == 2
    assert scale.latency == 1.5  # half of it takes twice the time
    assert scale.memory == pytest.approx((2 / 1.25) ** 0.5)  # sqrt(1 + 1) at the knee, sqrt(1 + 1/4) at twice the knee
    assert scale.switching == pytest.approx(0.25)  # half the clock, half of the squared voltage
    assert clock_scale(SIMPLE_TIME, SIMPLE_POWER, 1500, 2000).switching == pytest.approx(0.75 * 1.5 / 2)


def test_watts_rise_no_further_above_the_ceiling() -> None:
    law = SIMPLE_POWER.model_copy(update={"ceiling_mhz": 1600.0})
    found = [clock_scale(SIMPLE_TIME, law, clock, 2000).switching for clock in (800, 1600, 1700, 2000)]
    assert found == pytest.approx([0.25, 1, 1, 1])  # half the ceiling, half of the squared voltage there
    assert clock_scale(SIMPLE_TIME, law, 1600, 2000).compute == 1.25  # the time still follows the clock


def test_the_share_of_compute_that_ignores_the_clock_stays() -> None:
    law = SIMPLE_TIME.model_copy(update={"compute_clock_share": 0.9, "latency_clock_share": 0.0})
    scale = clock_scale(law, SIMPLE_POWER, 1000, 2000)
    assert (scale.compute, scale.latency) == pytest.approx((1.9, 1.0))
    assert scale.switching == pytest.approx(0.25)  # the clock itself, whatever follows it


def test_switching_is_linear_below_the_knee() -> None:
    at_400, at_800 = (clock_scale(A100.time, A100.power, clock, 1410).switching for clock in (400, 800))
    assert at_800 == pytest.approx(2 * at_400)


@given(st.floats(210, 1409), st.floats(0.5, 200))
def test_monotone(clock_mhz: float, step_mhz: float) -> None:
    low = clock_scale(A100.time, A100.power, clock_mhz, 1410)
    high = clock_scale(A100.time, A100.power, clock_mhz + step_mhz, 1410)
    assert low.compute > high.compute
    assert low.memory > high.memory
    assert low.latency > high.latency
    assert low.switching < high.switching
    assert low.memory <= low.compute * (1 + 1e-12)
