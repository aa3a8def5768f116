"""What the same load would have taken at other clocks: the maximum, or those of a dry run. An estimate by the
performance table, one slice of time after the other.

Saved (estimate) = 1 - E / E_top, with E the energy so far and E_top the sum of these slices at the maximum clock.
docs/energy.md defines it, docs/evaluation/estimate.md compares it with simulations that ran at the maximum clock.
"""

# A lower clock makes iterations longer, so more requests share each of them: the same iterations at another clock would
# be another number of iterations, with other batches. So the load of a slice is put to the model of an engine in a
# steady state (`steady_load.steady`), which gives its mean watts at every clock. Three cases:
#
# 1. Every clock holds the load: the joules of the slice, scaled by the ratio of mean watts at the other clocks to those
#    in force. Errors of the model that both sides share cancel.
# 2. A clock in force does not hold it (`throttllem` swings between one that is too low and the maximum), but the other
#    does: its mean watts over the slice, scaled by the joules of the slice over what the table says of what ran.
# 3. The other does not hold it either: the same iterations, one by one, and idle power for the time left over.
#
# Arrivals are assumed not to depend on the clock: bursts shorter than a slice, and clients that wait for an output
# before they send the next request, make the saving too high.

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from throttllem.core.clocks.steady_load import Load, steady
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.types import EngineSpec, Slo

_SLICE_S = 30.0
_PROMPT_TOKENS, _OUTPUT_TOKENS = 1024, 256
_RATES_RPS = tuple(0.001 * 1.25**step for step in range(56))
_NOTEWORTHY = 0.01

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class _Slice:
    """What ran in some seconds; `steps` are iterations, `sequence_steps` sum the decoding sequences over the engine's
    steps (fewer than `tokens` where it speculates). `busy_s` by column of the table: of the clock in force, and of the
    other.
    """

    seconds: float = 0.0
    joules: float = 0.0
    steps: int = 0
    tokens: int = 0
    sequence_steps: float = 0.0
    kv_blocks: int = 0
    prompts: int = 0
    prompt_tokens: int = 0
    busy_s: dict[tuple[int, int], float] = field(default_factory=dict)
    ran: list[tuple[int, int, int, int, float]] = field(default_factory=list)
    """Settlements: batch, KV blocks and prompt tokens of a mean step, column of the clock in force, seconds."""


@dataclass(slots=True, kw_only=True)
class SavingsEstimate:
    """The estimate of one engine. `spec` None: it was not up yet."""

    table: PerformanceTable
    spec: EngineSpec | None = None
    _closed_j: float = 0.0
    _ratio: float = 1.0
    _shown_j: float = 0.0
    _slice: _Slice = field(default_factory=_Slice)

    def idle(self, seconds: float, joules: float) -> None:
        """Time in which nothing ran."""
        self._slice.seconds += seconds
        self._slice.joules += joules
        self._close()

    def worked(
        self,
        *,
        seconds: float,
        joules: float,
        steps: int,
        output_tokens: int,
        prompts: int,
        prompt_tokens: int,
        kv_block_steps: int,
        clock_mhz: int | None,
        other_mhz: int | None = None,
        tokens_per_step: float = 1.0,
    ) -> None:
        """`steps` iterations in `seconds` at a clock (None: unknown, taken for the maximum), which would else have run
        at `other_mhz` (None: the maximum). A step of the engine gives a sequence `tokens_per_step`, an iteration one.
        """
        here = self._slice
        columns = self._column(clock_mhz), self._column(other_mhz)
        here.seconds += seconds
        here.joules += joules
        here.steps += steps
        here.tokens += output_tokens
        here.sequence_steps += output_tokens / tokens_per_step
        here.kv_blocks += kv_block_steps
        here.prompts += prompts
        here.prompt_tokens += prompt_tokens
        here.busy_s[columns] = here.busy_s.get(columns, 0.0) + seconds
        if steps:  # else tokens of which no step was reported yet
            each = (round((output_tokens + prompts) / steps), kv_block_steps // steps, prompt_tokens // steps)
            here.ran.append((*each, columns[0], seconds))
        self._close()

    def stepped(
        self,
        *,
        seconds: Floats,
        joules: Floats,
        output_tokens: Ints,
        prompts: Ints,
        prompt_tokens: Ints,
        kv_blocks: Ints,
        clocks_mhz: Ints,
    ) -> None:
        """Iterations of an engine that gives a sequence one token a step, shape (steps,) each: as `worked` for one
        after the other.
        """
        top, first = self._column(None), 0
        columns = np.maximum(np.searchsorted(self.table.clocks_mhz, clocks_mhz, side="right") - 1, 0)
        while first < seconds.size:
            here = self._slice
            elapsed_s = _running_sums(here.seconds, seconds[first:])
            last = first + min(int(np.searchsorted(elapsed_s, _SLICE_S)) + 1, seconds.size - first)
            part = slice(first, last)
            here.seconds = float(elapsed_s[last - first - 1])
            here.joules = float(_running_sums(here.joules, joules[part])[-1])
            here.steps += last - first
            here.tokens += int(output_tokens[part].sum())
            here.sequence_steps += float(output_tokens[part].sum())
            here.kv_blocks += int(kv_blocks[part].sum())
            here.prompts += int(prompts[part].sum())
            here.prompt_tokens += int(prompt_tokens[part].sum())
            for column in dict.fromkeys(columns[part].tolist()):
                at = seconds[part][columns[part] == column]
                before_s = here.busy_s.get((column, top), 0.0)
                here.busy_s[column, top] = float(_running_sums(before_s, at)[-1])
            batch = output_tokens[part] + prompts[part]
            each = (batch, kv_blocks[part], prompt_tokens[part], columns[part], seconds[part])
            here.ran.extend(zip(*(values.tolist() for values in each), strict=True))
            self._close()
            first = last

    def joules(self) -> float:
        """What everything so far would have taken, the slice under way as the last one. It never falls."""
        self._shown_j = max(self._shown_j, self._closed_j + self._slice.joules * self._ratio)
        return self._shown_j

    def _column(self, clock_mhz: int | None) -> int:
        """Of the clock, or the one profiled below it; None: the top."""
        clocks = self.table.clocks_mhz
        if clock_mhz is None:
            return len(clocks) - 1
        return max(0, int(np.searchsorted(clocks, clock_mhz, side="right")) - 1)

    def _close(self) -> None:
        if self._slice.seconds >= _SLICE_S:
            there_j = self._there(self._slice)
            self._closed_j += there_j
            self._ratio = there_j / self._slice.joules if self._slice.joules > 0 else 1.0
            self._slice = _Slice()

    def _there(self, here: _Slice) -> float:
        busy_s = sum(here.busy_s.values())
        if self.spec is None or busy_s <= 0 or all(column == other for column, other in here.busy_s):
            return here.joules
        watts = self._settled(here, self.spec)
        used = sum(watts[column] * seconds for (column, _), seconds in here.busy_s.items())
        there = sum(watts[other] * seconds for (_, other), seconds in here.busy_s.items())
        if math.isfinite(used) and math.isfinite(there):
            return here.joules * there / used
        if math.isfinite(there):
            return here.seconds * there / busy_s * here.joules / self._modelled_j(here, self.spec)
        return self._same_steps(here, busy_s, self.spec)

    def _modelled_j(self, here: _Slice, spec: EngineSpec) -> float:
        """What the table says that the slice took, as it ran."""
        batch, kv, prompt, columns = (
            np.array(values, dtype=np.int64) for values in list(zip(*here.ran, strict=True))[:4]
        )
        seconds = np.array([entry[4] for entry in here.ran])
        busy_j = float((self.table.watts[self.table.cells(batch, kv, prompt), columns] * seconds).sum())
        return busy_j + max(0.0, here.seconds - float(seconds.sum())) * spec.idle_w

    def _settled(self, here: _Slice, spec: EngineSpec) -> list[float]:
        """Mean watts at each clock if the slice's load went on; inf where the clock does not sustain it."""
        prompts, answer = max(1, here.prompts), here.tokens / max(1, here.prompts)
        load = Load(
            requests_per_s=prompts / here.seconds,
            prompt_tokens=here.prompt_tokens / prompts,
            output_tokens=answer,
            long_output_tokens=answer,
            burst=1.0,
            e2e_s=None,
        )
        rate = here.tokens / here.sequence_steps if here.tokens else 1.0
        watts: list[float] = steady(load, self.table.at_rate(rate), spec, reserve=0.0).watts.tolist()
        return watts

    def _same_steps(self, here: _Slice, busy_s: float, spec: EngineSpec) -> float:
        """The engine is full at a clock, or nearly: the same iterations, and idle for the rest of the time."""
        each = (here.tokens + here.prompts, here.kv_blocks, here.prompt_tokens)
        cell = self.table.cells(*(np.array([total // here.steps]) for total in each))[0]
        seconds, watts = self.table.seconds[cell], self.table.watts[cell]
        joules = idle_s = 0.0
        for (column, other), spent_s in here.busy_s.items():
            longer = float(seconds[other] / seconds[column])
            joules += here.joules * spent_s / busy_s * longer * float(watts[other] / watts[column])
            idle_s += spent_s * max(0.0, 1.0 - longer)
        return joules + idle_s * spec.idle_w


@dataclass(frozen=True, slots=True, kw_only=True)
class DearerLoads:
    """Loads, in requests per second of so many tokens each, at which the lowest clock that meets the SLOs
    (`throttllem`) draws more mean power than the maximum clock; by the fraction `most` at most.
    """

    low_rps: float
    high_rps: float
    most: float
    prompt_tokens: int = _PROMPT_TOKENS
    output_tokens: int = _OUTPUT_TOKENS


def dearer_loads(table: PerformanceTable, spec: EngineSpec, slo: Slo, *, reserve: float) -> DearerLoads | None:
    """Where the lowest clock costs more than the maximum, by the table, of the loads that the latter holds; None:
    nowhere by more than 1 %. Light loads: static watts are drawn for longer, and the engine is idle less.
    """
    limits_s = (slo.e2e_s, None if slo.tbt_s is None else slo.tbt_s * _OUTPUT_TOKENS)
    e2e_s = min((limit_s for limit_s in limits_s if limit_s is not None), default=None)
    found: list[tuple[float, float]] = []
    for rate_rps in _RATES_RPS:
        load = Load(
            requests_per_s=rate_rps,
            prompt_tokens=_PROMPT_TOKENS,
            output_tokens=_OUTPUT_TOKENS,
            long_output_tokens=_OUTPUT_TOKENS,
            burst=1.0,
            e2e_s=e2e_s,
        )
        watts = steady(load, table, spec, reserve=reserve).watts
        if not math.isfinite(watts[-1]):
            break
        excess = float(watts[int(np.isfinite(watts).argmax())] / watts[-1]) - 1.0
        if excess > _NOTEWORTHY:
            found.append((rate_rps, excess))
    if not found:
        return None
    return DearerLoads(low_rps=found[0][0], high_rps=found[-1][0], most=max(excess for _, excess in found))


def _running_sums(before: float, values: Floats) -> Floats:
    """The sums after each value, added in their order."""
    sums: Floats = np.cumsum(np.concatenate(([before], values)))[1:]
    return sums
