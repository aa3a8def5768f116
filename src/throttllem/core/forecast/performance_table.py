"""Seconds and watts of one iteration at every clock: boosted trees, tabulated over their own split thresholds.

A prediction is three look-ups and one row of the table, for all clocks at once. Knows nothing of how the trees were
trained, nor where a table is stored.
"""

# Why a table. A boosted ensemble is a sum of trees, and each tree is constant between its split thresholds. Between two
# neighbouring thresholds of batch, KV blocks and prompt tokens (taken over all trees) the whole ensemble is constant,
# so evaluating it once in every cell of that grid, at every clock, reproduces it exactly. The trees themselves would
# cost milliseconds per decision (bench/bench.py measures both); the table costs microseconds and needs numpy alone.
#
# Each axis is stored as an array that maps a value (batch, KV blocks, prompt tokens) to its bin; a cell is
# (prefill bin x batch bins + batch bin) x KV bins + KV bin, the sum of three precomputed offsets.

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from throttllem.core.forecast.switch_latency import ProfiledSwitches

Bins = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]
Whole = npt.NDArray[np.integer]
Steps = npt.NDArray[np.float32]
MOST_SWITCH_S = 60.0
"""The longest switch latency that a table may hold, seconds."""
_BANDS = 4
"""The drift of a table while it serves is metered, and corrected, in this many bands of clocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hull:
    """The box that was profiled, ends included. Outside it a prediction is a guess (`PerformanceTable.inside`)."""

    max_batch: int
    max_kv_blocks: int
    max_prefill_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TableVerdict:
    """What `train` found of a table. `faults` are the reasons why no clock of a GPU may be set by it, `accepted`: the
    user overruled them. `doubts` are to be known, and refuse nothing. The errors are mean relative ones of held-out
    rows (0.05 = 5 %; None: none could be held out). `tokens_per_step`: what a sequence got in the steps that were
    profiled (1: no speculation; None: not known).
    """

    faults: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    accepted: bool = False
    seconds_error: float | None = None
    watts_error: float | None = None
    tokens_per_step: float | None = None

    @property
    def sound(self) -> bool:
        """Whether clocks may be set by the table."""
        return self.accepted or not self.faults


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """The basis of a table that was computed by a law: the law was calibrated on iterations at `clocks_mhz` alone, and
    nine tenths of those that were held out of it are predicted within `seconds_error` and `watts_error` (1 = 100 %).
    """

    clocks_mhz: tuple[int, ...]
    seconds_error: float
    watts_error: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PerformanceTable:
    """What one engine size needs per iteration: one row per cell, one column per clock; C clocks, ascending.

    `batch_bin` (batch 0 to the largest), `kv_bin` (KV blocks in use, 0 to capacity) and `prefill_bin` (prompt tokens
    in the iteration, 0 to the budget) give the bin of each value: from 0, rising by at most one. `seconds` and `watts`
    (of all GPUs of the engine) have the shape (cells, C), cell = (prefill bin * batch bins + batch bin) * KV bins + KV
    bin. Batch counts decoding sequences and prompts being prefilled. `clocks_measured` False: the clock axis was not
    measured, so no clock may be chosen by it. `verdict`: what `train` found of it (None: it was not judged).
    `calibrated`: basis of a calibrated law's table, whose lowest clock is the lowest that was measured. `gpu`: the kind
    of GPU that was profiled, `model`: the figures of the model, as JSON of `physics.model.Model` (None: not known).
    `switches`: what switches of its clocks took while it was profiled, by clock (empty: not measured).
    `limit_mhz`: the GPUs are held down to that clock; `factors`: seconds of each clock band are corrected by these
    ((): by none); `base` is the table without both. `maximum_s` are the seconds at the maximum clock, `slowest` those
    that no cell up to a cell exceeds, shape (cells,). Raises ValueError where the parts do not fit together.
    """

    clocks_mhz: tuple[int, ...]
    batch_bin: Bins
    kv_bin: Bins
    prefill_bin: Bins
    seconds: Steps
    watts: Steps
    hull: Hull
    clocks_measured: bool = True
    verdict: TableVerdict | None = None
    calibrated: Calibrated | None = None
    gpu: str | None = None
    model: str | None = None
    switches: tuple[ProfiledSwitches, ...] = ()
    limit_mhz: int | None = field(default=None, init=False)
    factors: tuple[float, ...] = field(default=(), init=False)
    tokens_per_step: float = field(default=1.0, init=False)
    base: PerformanceTable | None = field(default=None, init=False, repr=False)
    maximum_s: Steps = field(init=False, repr=False)
    slowest: Steps = field(init=False, repr=False)
    _kv_offset: Ints = field(init=False, repr=False)
    _batch_offset: Ints = field(init=False, repr=False)
    _prefill_offset: Ints = field(init=False, repr=False)

    def __post_init__(self) -> None:
        kv_bins, batch_bins, prefill_bins = (
            _count(name, getattr(self, name)) for name in ("kv_bin", "batch_bin", "prefill_bin")
        )
        clocks = self.clocks_mhz
        if not clocks or any(low >= high for low, high in pairwise(clocks)):
            raise ValueError(f"performance table: clocks_mhz = {clocks}: must be ascending and not empty")
        for each in self.switches:
            if each.mhz <= 0 or each.count < 1 or not 0.0 < each.within_s <= MOST_SWITCH_S:
                raise ValueError(f"performance table: {each}: must be switches to a clock, of 0 to {MOST_SWITCH_S:g} s")
        shape = (prefill_bins * batch_bins * kv_bins, len(clocks))
        for name in ("seconds", "watts"):
            _check_steps(name, getattr(self, name), shape)
            # One layout for all tables: compiled loops are compiled again for another.
            kept = np.require(getattr(self, name), np.float32, ["C", "ALIGNED", "WRITEABLE", "ENSUREARRAY"])
            object.__setattr__(self, name, kept)
        maximum_s = self.seconds[:, -1].copy()
        slowest = maximum_s.reshape(prefill_bins, batch_bins, kv_bins)
        for axis in range(3):
            slowest = np.maximum.accumulate(slowest, axis=axis)
        object.__setattr__(self, "maximum_s", maximum_s)
        object.__setattr__(self, "slowest", slowest.ravel())
        object.__setattr__(self, "_kv_offset", self.kv_bin.astype(np.int64))
        object.__setattr__(self, "_batch_offset", self.batch_bin.astype(np.int64) * kv_bins)
        object.__setattr__(self, "_prefill_offset", self.prefill_bin.astype(np.int64) * (kv_bins * batch_bins))

    @property
    def offsets(self) -> tuple[Ints, Ints, Ints]:
        """What each batch, each number of KV blocks and of prefill tokens adds to the cell, for compiled loops; beyond
        either end the end counts.
        """
        return self._batch_offset, self._kv_offset, self._prefill_offset

    def capped(self, limit_mhz: int | None) -> PerformanceTable:
        """The same engine while its GPUs cannot exceed a limit (None: no limit): every clock above it is no faster, and
        draws no more, than the highest profiled one below it (the lowest of all, where none is).
        """
        return self._adjusted(limit_mhz, self.factors, self.tokens_per_step)

    def corrected(self, factors: tuple[float, ...]) -> PerformanceTable:
        """The same engine with the seconds of each clock band times its factor, in place of the factors before."""
        return self._adjusted(self.limit_mhz, factors, self.tokens_per_step)

    def at_rate(self, tokens_per_step: float) -> PerformanceTable:
        """The same engine with iterations of one token each, where a step gives a sequence several. Those with prompts
        stay whole: a prompt takes as many steps as ever.
        """
        return self._adjusted(self.limit_mhz, self.factors, tokens_per_step)

    def _adjusted(self, limit_mhz: int | None, factors: tuple[float, ...], tokens_per_step: float) -> PerformanceTable:
        base, clocks = self.base or self, self.clocks_mhz
        limit_mhz = None if limit_mhz is None or limit_mhz >= clocks[-1] else limit_mhz
        if (limit_mhz, factors, tokens_per_step) == (self.limit_mhz, self.factors, self.tokens_per_step):
            return self
        if limit_mhz is None and not factors and tokens_per_step == 1.0:
            return base
        seconds, watts = base.seconds, base.watts
        if factors:
            seconds = seconds * np.array([factors[self.band(column)] for column in range(len(clocks))], np.float32)
        if tokens_per_step != 1.0:
            decoding = seconds.shape[0] // (int(base.prefill_bin[-1]) + 1)
            seconds = np.concatenate([seconds[:decoding] / np.float32(tokens_per_step), seconds[decoding:]])
        if limit_mhz is not None:
            column = max(0, int(np.searchsorted(clocks, limit_mhz, side="right")) - 1)
            columns = np.minimum(np.arange(len(clocks)), column)
            seconds, watts = seconds[:, columns], watts[:, columns]
        held = replace(base, seconds=seconds, watts=watts)
        object.__setattr__(held, "limit_mhz", limit_mhz)
        object.__setattr__(held, "factors", factors)
        object.__setattr__(held, "tokens_per_step", tokens_per_step)
        object.__setattr__(held, "base", base)
        return held

    def band(self, column: int) -> int:
        """The clock band of a column: as many clocks in each of four, as far as that goes."""
        return column * min(_BANDS, len(self.clocks_mhz)) // len(self.clocks_mhz)

    def bands(self) -> tuple[tuple[int, int], ...]:
        """Lowest and highest clock of each band, ascending."""
        found: dict[int, tuple[int, int]] = {}
        for column, mhz in enumerate(self.clocks_mhz):
            low, _ = found.get(self.band(column), (mhz, mhz))
            found[self.band(column)] = (low, mhz)
        return tuple(found.values())

    def only_at(self, clock_mhz: int) -> PerformanceTable:
        """The same engine with one clock, at which it needs what it needs at the highest of the table."""
        return replace(self, clocks_mhz=(clock_mhz,), seconds=self.seconds[:, -1:], watts=self.watts[:, -1:])

    def cells(self, batch: Whole, kv_blocks: Whole, prefill_tokens: Whole) -> Ints:
        """Rows of `seconds` and `watts` for integer arrays of one shape; beyond either end the end bin counts."""
        cells: Ints = self._prefill_offset.take(prefill_tokens, mode="clip")
        cells += self._batch_offset.take(batch, mode="clip")
        cells += self._kv_offset.take(kv_blocks, mode="clip")
        return cells

    def cell(self, batch: int, kv_blocks: int, prefill_tokens: int) -> int:
        """The same for one iteration."""
        return (
            _clipped(self._prefill_offset, prefill_tokens)
            + _clipped(self._batch_offset, batch)
            + _clipped(self._kv_offset, kv_blocks)
        )

    def with_prompt(self, cell: int, prefill_tokens: int) -> int:
        """The row of the same batch and KV use with `prefill_tokens` prompt tokens instead."""
        each: int = self.seconds.shape[0] // (int(self.prefill_bin[-1]) + 1)
        return cell % each + _clipped(self._prefill_offset, prefill_tokens)

    def inside(self, batch_max: int, kv_max: int, prefill_max: int) -> bool:
        """Whether everything up to this batch, KV blocks and prefill tokens was profiled."""
        hull = self.hull
        return batch_max <= hull.max_batch and kv_max <= hull.max_kv_blocks and prefill_max <= hull.max_prefill_tokens

    def at(self, clock_mhz: int, batch: int, kv_blocks: int, prefill_tokens: int) -> tuple[float, float]:
        """Seconds and watts of one iteration. Raises ValueError for a clock that is not in the table."""
        if clock_mhz not in self.clocks_mhz:
            low, high = self.clocks_mhz[0], self.clocks_mhz[-1]
            raise ValueError(
                f"clock {clock_mhz} MHz is not in the performance table ({len(self.clocks_mhz)} from {low} to {high})"
            )
        column = self.clocks_mhz.index(clock_mhz)
        cell = self.cell(batch, kv_blocks, prefill_tokens)
        return float(self.seconds[cell, column]), float(self.watts[cell, column])


def _clipped(offsets: Ints, at: int) -> int:
    """One offset, that of either end beyond it. As `take` with "clip", which costs several times more for one."""
    return offsets.item(min(max(at, 0), offsets.size - 1))


def _count(name: str, bins: Bins) -> int:
    """How many bins there are, after checking that they are numbered from 0 without gaps."""
    if bins.ndim != 1 or not bins.size or bins[0] != 0:
        raise ValueError(f"performance table: {name} must be one-dimensional and begin with 0")
    steps = np.diff(bins)
    if steps.size and not (steps.min() >= 0 and steps.max() <= 1):
        raise ValueError(f"performance table: {name} must rise by 0 or 1 from each value to the next")
    return int(bins[-1]) + 1


def _check_steps(name: str, values: Steps, shape: tuple[int, int]) -> None:
    if values.shape != shape:
        raise ValueError(f"performance table: {name} has the shape {values.shape}, its bins and clocks require {shape}")
    low, high = float(values.min()), float(values.max())
    if not 0.0 < low <= high < float("inf"):
        raise ValueError(f"performance table: {name} must be positive and finite, found {low} to {high}")
