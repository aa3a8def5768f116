"""The load estimate against a direct sum, and what serving a load for good costs at each clock."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.toy import SPEC, request, spec, table
from throttllem.core.clocks.steady_load import Load, LoadEstimator, Recent, _quantile, settled, steady
from throttllem.core.types import Slo

TABLE = table(SPEC)


def came(estimator, now_s, prompt, output, slo, sequences=1, key=None):
    """One request, under the next unused id."""
    one = request(estimator.seen if key is None else key, prompt, output, slo=slo, sequences=sequences)
    estimator.arrived(one, now_s, predicted_tokens=output, expected_tokens=output)


arrivals = st.lists(st.tuples(st.floats(0.0, 30.0), st.integers(1, 500), st.integers(1, 500)), min_size=1, max_size=40)


@given(arrivals, st.floats(5.0, 60.0), st.floats(1.0, 100.0))
def test_equals_the_direct_sum(gaps, later_s, window_s):
    estimator, now_s, seen = LoadEstimator(window_s=window_s), 100.0, []
    for gap_s, prompt, output in gaps:
        now_s += gap_s
        came(estimator, now_s, prompt, output, Slo())
        seen.append((now_s, prompt, output))
    now_s += later_s
    load = estimator.load(now_s)
    first_s = seen[0][0]
    if now_s - first_s < window_s / 2:
        assert load is None
        return
    weights = np.array([math.exp(-(now_s - at_s) / window_s) for at_s, _, _ in seen])
    # The same weights over the time that was seen, were it full of arrivals.
    assert load.requests_per_s == pytest.approx(
        weights.sum() / (window_s * (1 - math.exp(-(now_s - first_s) / window_s))), rel=1e-6
    )
    assert load.prompt_tokens == pytest.approx(np.average([p for _, p, _ in seen], weights=weights), rel=1e-6)
    assert load.output_tokens == pytest.approx(np.average([a for _, _, a in seen], weights=weights), rel=1e-6)


def test_several_sequences_are_as_many_requests():
    wide, single = LoadEstimator(window_s=10.0), LoadEstimator(window_s=10.0)
    for at_s, width in ((0.0, 1), (3.0, 4), (5.0, 2)):
        came(wide, at_s, 10 * width, 20, Slo(), width)
        for _ in range(width):
            came(single, at_s, 10 * width, 20, Slo())
    found, expected = wide.load(9.0), single.load(9.0)
    assert found.requests_per_s == pytest.approx(expected.requests_per_s)
    assert found.prompt_tokens == pytest.approx(expected.prompt_tokens)
    assert found.output_tokens == pytest.approx(expected.output_tokens)


def test_no_load_is_known_before_half_a_window():
    estimator = LoadEstimator(window_s=60.0)
    assert estimator.load(1000.0) is None
    came(estimator, 1000.0, 10, 10, Slo())
    assert estimator.load(1029.9) is None
    assert estimator.load(1030.0) is not None


def test_a_steady_rate_is_found_and_forgotten():
    estimator = LoadEstimator(window_s=10.0)
    for n in range(400):
        came(estimator, n / 4, 30, 7, Slo())
    found = estimator.load(100.0)
    assert (found.requests_per_s, found.prompt_tokens, found.output_tokens) == (
        pytest.approx(4.0, rel=0.02),
        pytest.approx(30),
        pytest.approx(7),
    )
    assert estimator.load(110.0).requests_per_s == pytest.approx(found.requests_per_s / math.e, rel=1e-3)


def test_long_outputs_tight_slos_and_bursts():
    estimator = LoadEstimator(window_s=10.0)
    for n in range(400):
        came(estimator, n / 4, 30, 100 if n % 40 == 0 else 10, Slo(e2e_s=[None, 9.0, 4.0][n % 3]))
    found = estimator.load(100.0)
    # One output in forty is long: below the longest hundredth.
    assert (found.long_output_tokens, found.e2e_s) == (100.0, 4.0)
    lengths = np.array([100.0] + [10.0] * 39)
    # Inflow over one SLO (4 s): the count is Poisson, so variance over squared mean is (1 + CV^2) / n.
    expected = 1 + 2 * math.sqrt((1 + lengths.var() / lengths.mean() ** 2) / (found.requests_per_s * 4.0))
    assert found.burst == pytest.approx(expected, rel=1e-6)


def load(rate, **changes):
    plain = {"prompt_tokens": 16.0, "output_tokens": 16.0, "long_output_tokens": 16.0, "burst": 1.0, "e2e_s": None}
    return Load(requests_per_s=rate, **plain | changes)


def power_w(load, spec=SPEC, reserve=0.0):
    return steady(load, TABLE, spec, reserve=reserve).watts


def test_no_load_costs_idle_power():
    idle_w = power_w(load(1e-6))
    top_w = TABLE.watts.max()
    # The grid of means begins at 0.02: idle 98 % of the time.
    assert np.all(idle_w >= SPEC.idle_w)
    assert np.all(idle_w - SPEC.idle_w < 0.02 * top_w)


def test_more_than_the_engine_can_do_is_infinite_first_at_low_clocks():
    assert np.isinf(power_w(load(1e4))).all()
    finite = [int(np.isfinite(power_w(load(rate))).sum()) for rate in np.linspace(1, 40, 60)]
    assert finite[0] == len(SPEC.clocks_mhz) and finite[-1] == 0
    assert finite == sorted(finite, reverse=True)
    assert any(0 < count < len(SPEC.clocks_mhz) for count in finite)
    for rate in np.linspace(1, 40, 60):
        holds = np.isfinite(power_w(load(rate)))
        assert holds.tolist() == sorted(holds.tolist()), "what a clock can do, every higher one can"


def test_peaks_must_fit_the_kv_cache():
    # One mean request holds (16 + 8) / 4 + 0.5 = 6.5 blocks: 0.85 of 7 blocks hold none.
    assert np.isinf(power_w(load(0.1), spec(kv_blocks=7))).all()
    assert np.isfinite(power_w(load(0.1), spec(kv_blocks=9))).all()


@given(st.floats(0.01, 5.0), st.floats(1.05, 3.0))
def test_more_load_never_costs_less(rate, factor):
    less, more = (power_w(load(r)) for r in (rate, rate * factor))
    assert np.all(more >= less * 0.97), "but for the steps of the grid"


def test_by_hand_at_a_load_of_one_sequence():
    # 0.005 + 0.0092 s at the maximum clock for a sequence with 6 to 8 blocks (steps of 4), prompts of 16 tokens.
    step_s, step_w = TABLE.at(1400, 1, 6, 0)
    mixed_s, mixed_w = TABLE.at(1400, 1, 6, 16)
    rate = 0.5
    share = rate * (mixed_s - step_s)
    needed = rate * 16 * step_s / (1 - share)
    mean = next(m for m in (0.02, 0.05, 0.1, 0.2, 0.35) if m >= needed)
    busy = 1 - math.exp(-mean)
    active_w = step_w + (mixed_w - step_w) * min(1.0, share / busy)
    expected_w = busy * active_w + (1 - busy) * SPEC.idle_w
    assert power_w(load(rate))[-1] == pytest.approx(expected_w, rel=1e-5)


def test_a_clock_must_hold_the_bursts_too():
    rate = next(r for r in np.linspace(1, 40, 200) if 0 < np.isfinite(power_w(load(r))).sum() < len(SPEC.clocks_mhz))
    held = np.isfinite(power_w(load(rate)))
    mean, burst = power_w(load(rate / 2)), power_w(load(rate / 2, burst=2.0))
    assert np.isfinite(burst).tolist() == held.tolist()
    # What is paid is the mean all the same.
    assert burst[held].tolist() == mean[held].tolist()


def test_where_the_mean_load_settles_does_not_ask_for_its_bursts():
    bursty = load(2, burst=50.0)
    found, mean = steady(bursty, TABLE, SPEC, reserve=0.0), settled(bursty, TABLE, SPEC)
    assert np.isinf(found.watts).all() and np.isfinite(mean.watts).all()
    assert mean.stretch.tolist() == found.stretch.tolist()


def test_prompts_to_come_stretch_every_iteration():
    # Two prompts of 16 tokens a second take 2 * 16 * 0.3 ms at the top clock, more at a lower one.
    stretch = steady(load(2), TABLE, SPEC, reserve=0.0).stretch
    for found, mhz in zip(stretch, SPEC.clocks_mhz, strict=True):
        assert found == pytest.approx(1 / (1 - 2 * 16 * 0.0003 * SPEC.clocks_mhz[-1] / mhz), rel=1e-4)


def test_a_long_answer_must_come_in_time():
    # A sequence gets a token every 14 to 28 ms: 50 of them within a second only at high clocks.
    held = np.isfinite(power_w(load(0.5, long_output_tokens=50, e2e_s=1.0)))
    assert held.any() and not held.all() and held.tolist() == sorted(held.tolist())
    stricter = np.isfinite(power_w(load(0.5, long_output_tokens=50, e2e_s=1.0), reserve=0.2))
    assert 0 < stricter.sum() < held.sum()


def test_inflated_predictions_are_corrected_by_what_finished_requests_say():
    estimator = LoadEstimator(window_s=60.0)
    for n in range(400):
        came(estimator, n / 4, 30, 130, Slo(e2e_s=20.0))
    before = estimator.load(100.0)
    for _ in range(31):
        estimator.finished(-1, 130, 100)
    assert estimator.load(100.0) == before  # too few to be believed
    estimator.finished(-1, 130, 100)
    after = estimator.load(100.0)
    assert before is not None and after is not None
    assert (before.output_tokens, after.output_tokens) == pytest.approx((130.0, 100.0))
    assert after.long_output_tokens == 100.0


@given(st.lists(st.floats(0.0, 1e5), min_size=1, max_size=40), st.floats(0.0, 1.0))
def test_the_quantile_is_numpys_to_the_bit(values, share):
    assert _quantile(np.array(values), share) == np.quantile(values, share)


def test_long_outputs_are_those_that_came_out_at_the_fraction_for_which_slos_are_asked():
    estimator = LoadEstimator(window_s=60.0)
    for n in range(400):
        came(estimator, n / 4, 30, 500, Slo(e2e_s=20.0, attainment=0.9))
        estimator.finished(-1, 500, n + 1)
    # Of the last 512 outputs, all 400 are known: one in ten is longer than 360 tokens.
    assert estimator.load(100.0).long_output_tokens == pytest.approx(360.1)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (Recent.ARRIVAL_S, math.nan),
        (Recent.ARRIVAL_S, 1e9),
        (Recent.PROMPT_TOKENS, -5),
        (Recent.OUTPUT_TOKENS, 2**40),
        (Recent.OUTPUT_TOKENS, math.nan),
        (Recent.SEQUENCES, 0),
        (Recent.CACHED_TOKENS, 31),
        (Recent.SLO_CLASS, 1),
        (Recent.SLO_CLASS, -1),
        (None, None),
    ],
)
def test_a_state_whose_requests_no_request_can_be_is_refused(at, value):
    estimator = LoadEstimator(window_s=60.0)
    for n in range(3):
        came(estimator, n / 4, 30, 500, Slo(e2e_s=20.0))
    recent = dict(estimator.recent)
    assert LoadEstimator(window_s=60.0, recent=recent, classes=("",)).recent == recent
    values = list(recent[1])
    if at is None:
        values.pop()
    else:
        values[at] = value
    with pytest.raises(ValueError, match="no request has"):
        LoadEstimator(window_s=60.0, recent=recent | {1: tuple(values)}, classes=("",))
