"""How far an engine is from its performance table while it serves, by clock band, and the factors that correct it.

Bounded and smoothed; deterministic. Knows nothing of SLOs, nor of how a clock is set.
"""

# What is metered. A table can be stale (another driver, another engine version, a hot room), and so can its model be
# wrong where this load is. But an iteration may take longer for reasons that are not the table's: a prompt that the
# engine took in another step than expected, sequences of other clients, GPUs that are held down, a clock that is being
# switched. So only *spans* are metered in which nothing but decoding is going on: from one plan to the next, no prompt
# pending, no external load, no limit, the planned clock in force, and iterations that the engine itself showed. Their
# batch is known, and their KV blocks grow by one token a sequence, so what the table says of them is one look-up.
#
# Each band of clocks keeps two sums, seconds that its spans took and seconds that the table says, both fading as time
# in the band goes on. Their quotient is the *bias*; it counts once the band has evidence. A bias beyond the table's
# own error makes a factor for the band; while there is one it follows the bias, and it is gone when the bias is.
# A band without evidence takes the factor of the nearest band that has one, but is never taken to be faster than its
# table. Beyond the bounds the table is no basis to plan on: the maximum clock, until the bias there is within them.

from __future__ import annotations

from dataclasses import dataclass

from throttllem.core.forecast.performance_table import PerformanceTable

LEAST_FACTOR, MOST_FACTOR = 0.5, 2.0
"""A bias beyond these is not corrected: the engine runs at the maximum clock."""
LEAST_TOLERANCE = 0.08
"""A bias within this is the table's resolution: a bin of batch or KV spans some per cent of an iteration."""
_OWN_ERRORS = 2.0
"""The tolerance is at least this many mean errors of held-out rows (`TableVerdict.seconds_error`)..."""
_MOST_TOLERANCE = 0.12
"""...but no more than this: what is beyond it violates SLOs, whatever the table was expected to miss."""
_STEP = 0.02
"""A factor follows the bias in steps of this size: each makes a table."""
_FADE_S = 10.0
"""Predicted seconds in which a span's weight halves, about."""
_FADE_ELSEWHERE_S = 60.0
"""The same while the engine runs in other bands."""
_EVIDENCE_S = 3.0
"""Predicted seconds after which a bias counts."""
_FORGOTTEN_S = 1.0
"""Evidence that has faded below this counts no more."""
_LONGEST = 8.0
"""A span counts as at most this many times what the table says: an engine that paused for a moment is not slow."""
_HOLD_S = 30.0
"""Shortest time at the maximum clock once the bias was beyond the bounds."""


@dataclass(slots=True, kw_only=True)
class Band:
    """The fading sums of one band, and its factor (None: no evidence)."""

    actual_s: float = 0.0
    predicted_s: float = 0.0
    factor: float | None = None

    @property
    def bias(self) -> float | None:
        """Seconds that iterations took over those of the table; None: none was metered."""
        return self.actual_s / self.predicted_s if self.predicted_s else None

    def forget(self) -> None:
        """Begin again."""
        self.actual_s, self.predicted_s, self.factor = 0.0, 0.0, None

    def fade(self, predicted_s: float, over_s: float) -> None:
        """Older spans count less after `predicted_s` more."""
        keep = over_s / (over_s + predicted_s)
        self.actual_s *= keep
        self.predicted_s *= keep
        if self.predicted_s < _FORGOTTEN_S:
            self.factor = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Decoding alone, since `began_s` and iteration `first`, at column `column` of the table."""

    first: int
    began_s: float
    column: int
    batch: int
    kv_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BandBias:
    """One band for telemetry: its clocks, the bias (1.15: iterations take 15 % longer than the table says; None: not
    metered), the factor in force, and the predicted seconds that the bias rests on.
    """

    low_mhz: int
    high_mhz: int
    bias: float | None
    factor: float
    metered_s: float


@dataclass(slots=True, kw_only=True)
class TableDrift:
    """The drift of one engine. `followed` False: the engine does not run at the planned clock (a dry run), so nothing
    is metered. `beyond_since_s`: the bias is beyond the bounds, since then (None: it is not).
    """

    bands: tuple[Band, ...] = ()
    span: Span | None = None
    followed: bool = True
    beyond_since_s: float | None = None

    def open(self, span: Span) -> None:
        """A span begins."""
        self.span = span if self.followed else None

    def close(self, table: PerformanceTable, block_tokens: int, iteration: int, now_s: float) -> bool:
        """The span that is open, if one is, ends before `iteration`, which began at `now_s`. Whether factors or the
        bounds may have changed.
        """
        span, self.span = self.span, None
        if span is None or iteration <= span.first or now_s < span.began_s:
            return False
        plain, steps = table.base or table, iteration - span.first
        grown = span.kv_blocks + steps * span.batch // (2 * block_tokens)
        predicted_s = (
            steps / table.tokens_per_step * float(plain.seconds[plain.cell(span.batch, grown, 0), span.column])
        )
        if not self.bands:
            self.bands = tuple(Band() for _ in plain.bands())
        here = self.bands[plain.band(span.column)]
        for band in self.bands:
            band.fade(predicted_s, _FADE_S if band is here else _FADE_ELSEWHERE_S)
        here.actual_s += min(now_s - span.began_s, _LONGEST * predicted_s)
        here.predicted_s += predicted_s
        return here.predicted_s >= _EVIDENCE_S and self._judge(here, tolerance(plain), now_s)

    def factors(self) -> tuple[float, ...]:
        """The factor of each band; () where all are 1."""
        known = [(number, band.factor) for number, band in enumerate(self.bands) if band.factor is not None]
        found = []
        for number, band in enumerate(self.bands):
            factor = band.factor
            if factor is None:
                nearest = min(known, key=lambda one: abs(one[0] - number), default=(0, 1.0))
                factor = max(1.0, nearest[1])
            found.append(factor)
        return tuple(found) if any(factor != 1.0 for factor in found) else ()

    def view(self, table: PerformanceTable | None) -> tuple[BandBias, ...]:
        """All bands, for telemetry; () without a table."""
        if table is None or not self.bands:
            return ()
        factors = self.factors() or (1.0,) * len(self.bands)
        return tuple(
            BandBias(low_mhz=low, high_mhz=high, bias=band.bias, factor=factor, metered_s=band.predicted_s)
            for (low, high), band, factor in zip(table.bands(), self.bands, factors, strict=True)
        )

    def _judge(self, here: Band, tolerated: float, now_s: float) -> bool:
        """The factor that the band's bias calls for, and whether any table can be planned with."""
        bias = here.actual_s / here.predicted_s
        before, top = (here.factor, self.beyond_since_s), self.bands[-1]
        within = LEAST_FACTOR <= bias <= MOST_FACTOR
        if not within and self.beyond_since_s is None:
            self.beyond_since_s = now_s
            if here is not top:
                top.forget()  # what it was before does not show that it is well now
        elif within and self.beyond_since_s is not None and here is top and now_s - self.beyond_since_s >= _HOLD_S:
            self.beyond_since_s = None
            for band in self.bands[:-1]:
                band.forget()
        corrected = here.factor is not None and here.factor != 1.0
        wanted = min(max(bias, LEAST_FACTOR), MOST_FACTOR)
        if abs(bias - 1.0) <= (tolerated / 2 if corrected else tolerated):
            here.factor = 1.0
        elif not corrected or here.factor is None or abs(wanted / here.factor - 1.0) > _STEP:
            here.factor = wanted
        return before != (here.factor, self.beyond_since_s)


def tolerance(table: PerformanceTable) -> float:
    """The bias that is within a table's own error."""
    error = None if table.verdict is None else table.verdict.seconds_error
    return min(max(LEAST_TOLERANCE, _OWN_ERRORS * (error or 0.0)), _MOST_TOLERANCE)
