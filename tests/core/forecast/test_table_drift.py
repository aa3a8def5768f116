"""The drift of a performance table: what is metered, when it is corrected, and when no table can be planned with."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.toy import SPEC, flat_table, table
from throttllem.core.forecast.performance_table import TableVerdict
from throttllem.core.forecast.table_drift import LEAST_FACTOR, MOST_FACTOR, Span, TableDrift, tolerance

TICKS = (32, 28, 24, 20, 16)
FLAT = flat_table(TICKS)


class Engine:
    """Spans of ten iterations each at one column, `slower` than the table says."""

    def __init__(self, table=FLAT):
        self.table, self.drift = table, TableDrift()
        self.iteration, self.now_s = 0, 0.0

    def runs(self, seconds, slower=1.0, column=0, steps=10):
        """Until the table's own seconds have passed; whether anything changed."""
        changed, said_s = False, steps * float(self.table.seconds[0, column])
        for _ in range(max(1, round(seconds / said_s))):
            self.drift.open(Span(first=self.iteration, began_s=self.now_s, column=column, batch=1, kv_blocks=1))
            self.iteration += steps
            self.now_s += said_s * slower
            changed |= self.drift.close(self.table, 4, self.iteration, self.now_s)
        return changed


def test_a_healthy_engine_is_not_corrected():
    engine = Engine()
    for slower in (0.95, 1.05, 1.0, 0.93, 1.07):
        assert not engine.runs(20, slower) or engine.drift.factors() == ()
    assert engine.drift.factors() == ()


def test_a_sustained_bias_is_corrected_and_the_correction_goes_with_it():
    engine = Engine()
    assert not engine.runs(2, 1.15)
    engine.runs(30, 1.15)
    (factor, *others) = engine.drift.factors()
    assert factor == pytest.approx(1.15, abs=0.02)
    assert others == [factor] * 3, "bands without evidence take the factor of the nearest that has one"
    engine.runs(60)
    assert engine.drift.factors() == ()


def test_a_band_without_evidence_is_not_taken_to_be_faster_than_its_table():
    engine = Engine()
    engine.runs(20, 0.8)
    assert engine.drift.factors() == (pytest.approx(0.8, abs=0.01), 1.0, 1.0, 1.0)


def test_bands_have_factors_of_their_own():
    engine = Engine()
    for _ in range(6):
        engine.runs(10, 1.3, column=0)
        engine.runs(10, 1.0, column=4)
    assert engine.drift.factors() == (pytest.approx(1.3, abs=0.02), pytest.approx(1.3, abs=0.02), 1.0, 1.0)


def test_one_long_pause_is_no_bias():
    engine = Engine()
    engine.runs(20)
    engine.runs(0.1, slower=200.0)
    assert engine.drift.beyond_since_s is None
    engine.runs(5)
    assert all(factor < 1.2 for factor in engine.drift.factors())


@pytest.mark.parametrize("slower", [3.0, 0.3])
def test_beyond_the_bounds_until_the_bias_is_gone(slower):
    engine = Engine()
    engine.runs(5, slower)
    assert engine.drift.beyond_since_s is not None
    engine.runs(60, slower, column=4)
    assert engine.drift.beyond_since_s is not None
    engine.runs(60, 1.0, column=4)
    assert engine.drift.beyond_since_s is None
    assert engine.drift.factors() == (), "low clocks are tried again without the old bias"


def test_the_tolerance_is_the_tables_own_error_within_limits():
    judged = [replace(FLAT, verdict=TableVerdict(seconds_error=error)) for error in (None, 0.01, 0.05, 0.5)]
    assert [tolerance(one) for one in (FLAT, *judged)] == [0.08, 0.08, 0.08, 0.1, 0.12]
    engine = Engine(judged[2])
    engine.runs(30, 1.09)
    assert engine.drift.factors() == ()


def test_kv_blocks_grow_within_a_span():
    toy = table(SPEC)
    drift = TableDrift()
    said_s = 40 * float(toy.seconds[toy.cell(4, 8 + 20, 0), 0])
    for _ in range(20):
        drift.open(Span(first=0, began_s=0.0, column=0, batch=4, kv_blocks=8))
        drift.close(toy, SPEC.block_tokens, 40, said_s)
    assert drift.bands[0].bias == pytest.approx(1.0)


def test_nothing_is_metered_in_a_dry_run():
    engine = Engine()
    engine.drift.followed = False
    engine.runs(30, 1.5)
    assert engine.drift.view(FLAT) == ()


def test_what_telemetry_sees():
    engine = Engine()
    engine.runs(30, 1.2)
    low, *others = engine.drift.view(FLAT)
    assert (low.low_mhz, low.high_mhz) == (600, 800)
    assert low.bias == pytest.approx(1.2)
    assert [(other.bias, other.factor, other.metered_s) for other in others] == [(None, low.factor, 0.0)] * 3


def test_a_corrected_table():
    corrected = FLAT.corrected((1.5, 1.0, 1.0, 0.5))
    assert corrected.seconds[0].tolist() == [tick / 1024 for tick in (48, 42, 24, 20, 8)]
    assert corrected.watts is FLAT.watts
    held = corrected.capped(800)
    assert held.seconds[0].tolist() == [tick / 1024 for tick in (48, 42, 42, 42, 42)]
    assert held.factors == corrected.factors
    assert held.corrected(()).seconds.tolist() == FLAT.capped(800).seconds.tolist()
    assert held.capped(None).corrected(()) is FLAT
    assert corrected.corrected(corrected.factors) is corrected


@given(st.lists(st.tuples(st.floats(0.0, 30.0), st.integers(0, 4), st.integers(1, 50)), max_size=60))
def test_factors_are_bounded_whatever_iterations_take(spans):
    engine = Engine()
    for slower, column, steps in spans:
        engine.runs(1.0, slower, column, steps)
        assert all(LEAST_FACTOR <= factor <= MOST_FACTOR for factor in engine.drift.factors())
