"""What iterations took and drew against what the performance table says, by clock band: for people and alerts.

The core corrects seconds by a meter of its own (`core/forecast/table_drift.py`), which sees no watts, and nothing in a
dry run, as it plans with clocks that are not set. This one reads the GPUs, so it goes on there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from throttllem.core.forecast.performance_table import PerformanceTable

_FADE_S = 60.0
"""Seconds of decoding in which a slice's weight halves, about."""
_LEAST_S = 3.0
"""Seconds of decoding before a bias is shown."""
_NEAR = 0.03
"""A clock that is this close to a profiled one is taken for it; further away it says nothing of the table."""


@dataclass(slots=True)
class _Sums:
    seconds: float = 0.0
    table_seconds: float = 0.0
    joules: float = 0.0
    table_joules: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BandMeter:
    """One clock band: what decoding took and drew over what the table says (1.1: 10 % more; None: not metered)."""

    low_mhz: int
    high_mhz: int
    seconds_bias: float | None
    watts_bias: float | None


@dataclass(slots=True, kw_only=True)
class TableMeter:
    """The meter of one engine; `table` as it was trained, without corrections."""

    table: PerformanceTable
    _bands: dict[int, _Sums] = field(default_factory=dict)

    def decoded(
        self,
        *,
        seconds: float,
        joules: float,
        steps: int,
        output_tokens: int,
        kv_block_steps: int,
        clock_mhz: int | None,
        tokens_per_step: float = 1.0,
    ) -> None:
        """`steps` iterations in `seconds` at a clock, of decoding alone; each is a step's part of one token."""
        column = self._column(clock_mhz)
        if column is None or seconds <= 0 or steps < 1:
            return
        cell = self.table.cell(round(output_tokens / steps), kv_block_steps // steps, 0)
        sums = self._bands.setdefault(self.table.band(column), _Sums())
        keep = _FADE_S / (_FADE_S + seconds)
        sums.seconds = sums.seconds * keep + seconds
        sums.table_seconds = (
            sums.table_seconds * keep + steps * float(self.table.seconds[cell, column]) / tokens_per_step
        )
        sums.joules = sums.joules * keep + joules
        sums.table_joules = sums.table_joules * keep + seconds * float(self.table.watts[cell, column])

    def view(self) -> tuple[BandMeter, ...]:
        """All bands, ascending."""
        found = []
        for number, (low, high) in enumerate(self.table.bands()):
            sums = self._bands.get(number, _Sums())
            known = sums.seconds >= _LEAST_S
            found.append(
                BandMeter(
                    low_mhz=low,
                    high_mhz=high,
                    seconds_bias=sums.seconds / sums.table_seconds if known else None,
                    watts_bias=sums.joules / sums.table_joules if known else None,
                )
            )
        return tuple(found)

    def _column(self, clock_mhz: int | None) -> int | None:
        if clock_mhz is None:
            return None
        clocks = self.table.clocks_mhz
        column = min(range(len(clocks)), key=lambda one: abs(clocks[one] - clock_mhz))
        return column if abs(clocks[column] - clock_mhz) <= _NEAR * clock_mhz else None
