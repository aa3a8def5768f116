"""What a dry run would save before any profile: from the catalogue's law of the GPU, with an interval. Advice only.

Watts and joules that the GPU's counter measured are scaled; nothing is set by it, and admission does not know of it.
"""

# Each slice of 30 s gives a load (requests/s, tokens). The model of an engine in a steady state (`steady_load`) gives
# its mean watts at every clock that holds the load and the SLOs, by a table of the law: the cheapest of them over the
# maximum clock's is what would be left. The interval comes from tables of laws whose constants were moved at random: by
# about 20 % where the law was calibrated for this GPU, model and size, by about 40 % where it is only modelled. The
# tables are coarse, and made for the mean prompt of the load: both sides of the ratio have the same cells.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from throttllem.core.clocks.steady_load import Load, steady
from throttllem.core.forecast.performance_table import Hull, PerformanceTable
from throttllem.core.types import EngineSpec, Slo
from throttllem.physics.catalogue import Gpu
from throttllem.physics.engine import EnginePhysics
from throttllem.physics.estimate import reach

_SLICE_S = 30.0
_DRAWS = 6
_CLOCKS, _BATCHES, _FILLS = 7, 10, 4
_OTHER_PROMPT = 0.2
"""Tables are made again where the logarithm of the mean prompt has moved by more."""
_SPREAD = {"measured": 0.2, "calibrated": 0.2, "modelled": 0.4}
"""Of the logarithm of a constant, by what the law rests on."""
_POWER = ("static_w", "memory_w", "core_w", "compute_w", "voltage_rise", "voltage_exponent", "knee_mhz")
_LONG = 4.0
"""A long output over the mean one: the p99 of an exponential distribution is 4.6 times its mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorSaving:
    """The fraction of the energy so far that other clocks would have saved, its range, and what it rests on."""

    saving: float
    low: float
    high: float
    basis: str


@dataclass(slots=True, kw_only=True)
class PriorEstimate:
    """The estimate of one engine without a performance table. `physics` returns its law (None: not known yet); `slo` is
    that of requests which send none.
    """

    physics: Callable[[], EnginePhysics | None]
    slo: Slo
    spec: EngineSpec | None = None
    _laws: list[EnginePhysics] = field(default_factory=list)
    _tables: list[PerformanceTable] = field(default_factory=list)
    _prompt: float = 0.0
    _basis: str = ""
    _taken_j: float = 0.0
    _left_j: list[float] = field(default_factory=lambda: [0.0] * (_DRAWS + 1))
    _seconds: float = 0.0
    _joules: float = 0.0
    _tokens: int = 0
    _sequence_steps: float = 0.0
    _prompts: int = 0
    _prompt_tokens: int = 0

    def idle(self, seconds: float, joules: float) -> None:
        """Time in which nothing ran."""
        self._seconds += seconds
        self._joules += joules
        self._close()

    def worked(
        self,
        *,
        seconds: float,
        joules: float,
        output_tokens: int,
        prompts: int,
        prompt_tokens: int,
        tokens_per_step: float = 1.0,
    ) -> None:
        """Iterations at the maximum clock; a step of the engine gives a sequence `tokens_per_step`."""
        self._seconds += seconds
        self._joules += joules
        self._tokens += output_tokens
        self._sequence_steps += output_tokens / tokens_per_step
        self._prompts += prompts
        self._prompt_tokens += prompt_tokens
        self._close()

    def saving(self) -> PriorSaving | None:
        """Over all slices that have ended; None: none has, or the law is not known."""
        if self._taken_j <= 0:
            return None
        saved = [1.0 - left_j / self._taken_j for left_j in self._left_j]
        return PriorSaving(saving=saved[0], low=min(saved), high=max(saved), basis=self._basis)

    def _close(self) -> None:
        if self._seconds < _SLICE_S:
            return
        if self._known() and self._prompts:
            self._tabulate(max(1.0, self._prompt_tokens / self._prompts))
            for place, table in enumerate(self._tables):
                self._left_j[place] += self._joules * self._share(table)
            self._taken_j += self._joules
        elif self._laws:
            self._left_j = [left_j + self._joules for left_j in self._left_j]
            self._taken_j += self._joules
        self._seconds = self._joules = self._sequence_steps = 0.0
        self._tokens = self._prompts = self._prompt_tokens = 0

    def _known(self) -> bool:
        """Whether there are laws: once the physics of the engine is known."""
        if not self._laws and self.spec is not None and (physics := self.physics()) is not None:
            found = reach(physics, self.spec.max_context_tokens // 4)["watts"]
            kind = str(found["kind"])
            why = f" ({found['why']})" if found["why"] else ""
            self._basis = (
                f"the law of {physics.gpu.name} in the catalogue, watts {kind}{why}; no profile of this engine. "
                f"The range: its constants moved by about {_SPREAD[kind]:.0%}"
            )
            dice = np.random.default_rng(0)
            self._laws = [physics, *(_moved(physics, dice, _SPREAD[kind]) for _ in range(_DRAWS))]
        return bool(self._laws)

    def _tabulate(self, prompt_tokens: float) -> None:
        if self.spec is not None and (not self._prompt or abs(math.log(prompt_tokens / self._prompt)) > _OTHER_PROMPT):
            self._tables = [_table(law, self.spec, round(prompt_tokens)) for law in self._laws]
            self._prompt = prompt_tokens

    def _share(self, table: PerformanceTable) -> float:
        """The cheapest clock's mean watts over the maximum's; 1 where not even that holds the load."""
        assert self.spec is not None
        answer = max(1.0, self._tokens / self._prompts)
        limits = (self.slo.e2e_s, None if self.slo.tbt_s is None else _LONG * answer * self.slo.tbt_s)
        load = Load(
            requests_per_s=self._prompts / self._seconds,
            prompt_tokens=self._prompt_tokens / self._prompts,
            output_tokens=answer,
            long_output_tokens=_LONG * answer,
            burst=1.2,
            e2e_s=min((limit for limit in limits if limit is not None), default=None),
        )
        rate = self._tokens / self._sequence_steps if self._tokens else 1.0
        watts = steady(load, table.at_rate(rate), self.spec, reserve=0.05).watts
        return float(watts.min() / watts[-1]) if math.isfinite(watts[-1]) else 1.0


def _moved(physics: EnginePhysics, dice: np.random.Generator, spread: float) -> EnginePhysics:
    """The law with constants of its power and of its clock moved at random."""

    def near(value: float, most: float = math.inf) -> float:
        return float(min(value * math.exp(spread * dice.standard_normal()), most))

    gpu: Gpu = physics.gpu
    most = {"knee_mhz": 0.95 * gpu.clock_max_mhz, "static_w": 0.9 * (gpu.power.limit_w - gpu.power.idle_w)}
    power = {name: near(getattr(gpu.power, name), most.get(name, math.inf)) for name in _POWER}
    time = {
        "memory_knee_mhz": near(gpu.time.memory_knee_mhz, 2.0 * gpu.clock_max_mhz),
        "latency_clock_share": near(gpu.time.latency_clock_share, 1.0),
    }
    parts = {"power": gpu.power.model_copy(update=power), "time": gpu.time.model_copy(update=time)}
    return EnginePhysics(gpu.model_copy(update=parts), physics.model, physics.tp)


def _table(physics: EnginePhysics, spec: EngineSpec, prompt_tokens: int) -> PerformanceTable:
    """A coarse table of the law: a few clocks, batches and fills of the KV cache, without and with one prompt."""
    clocks = physics.gpu.clocks_mhz
    places = sorted({round(place) for place in np.linspace(0, len(clocks) - 1, _CLOCKS)})
    chosen = tuple(clocks[place] for place in places)
    batches, fills = _ends(spec.max_batch, _BATCHES), _ends(spec.kv_blocks, _FILLS)
    law = np.array(
        [
            [physics.iteration(mhz, batch, max(batch, kv * spec.block_tokens), prompt, prompt**2 / 2) for mhz in chosen]
            for prompt in (0, prompt_tokens)
            for batch in _middles(batches)
            for kv in _middles(fills)
        ]
    )
    return PerformanceTable(
        clocks_mhz=chosen,
        batch_bin=_bins(batches, spec.max_batch),
        kv_bin=_bins(fills, spec.kv_blocks),
        prefill_bin=np.minimum(np.arange(spec.prefill_budget_tokens + 1), 1).astype(np.int32),
        seconds=law[:, :, 0].astype(np.float32),
        watts=law[:, :, 1].astype(np.float32),
        hull=Hull(
            max_batch=spec.max_batch,
            max_kv_blocks=spec.kv_blocks,
            max_prefill_tokens=spec.prefill_budget_tokens,
        ),
        clocks_measured=False,
    )


def _ends(last: int, count: int) -> tuple[int, ...]:
    """The last values of `count` bins from 1 to `last`, each as many times the one before."""
    return tuple(sorted({round(value) for value in np.geomspace(1, last, count)} | {last}))


def _middles(ends: tuple[int, ...]) -> list[int]:
    """The middle of each bin."""
    return [(low + 1 + end) // 2 for low, end in zip((0, *ends), ends, strict=False)]


def _bins(ends: tuple[int, ...], last: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.searchsorted(np.array(ends), np.arange(last + 1)).astype(np.int32)
