"""Joules of one engine's GPUs, shared among the requests that caused them, and what the top clock would have taken.

The counter is the GPU's own: whatever it rose by since the last step belongs to that step, so the shares of all
requests and the idle part always add up to it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

from throttllem.core.energy import EnergyLedger
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.types import EngineSpec
from throttllem.gateway.energy.savings_estimate import SavingsEstimate
from throttllem.gateway.telemetry.status import Energy
from throttllem.gpu.device import Gpu, Reading, Work

log = logging.getLogger("throttllem.gateway")

_NOTHING = Reading(clock_mhz=None, watts=0.0, energy_j=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One iteration: what ran, and who pays: `rows` that decode in the ledger and (request id, prompt tokens) of
    `prefills`. `kv_blocks` are held.
    """

    work: Work
    rows: int
    kv_blocks: int
    prefills: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True, kw_only=True)
class EnergyMeter:
    """The energy of one engine. One writer: its booking.

    `top` None: there is no model to say what the top clock would have taken, nor `advised` the clocks that were advised
    and not set. With a model whose clock axis was not measured neither is estimated.
    """

    gpu: Gpu
    top: SavingsEstimate | None = None
    advised: SavingsEstimate | None = None
    ledger: EnergyLedger = field(default_factory=EnergyLedger)
    _counted_j: float = 0.0
    _open: set[int] = field(default_factory=set)
    _last: Reading = _NOTHING
    _fails: bool = False
    _advises: bool = False

    @property
    def table(self) -> PerformanceTable | None:
        """The model of the engine's speed and power, if there is one."""
        return self.top.table if self.top else None

    def reading(self) -> Reading:
        """The GPU's reading; while it cannot be read the last one, with an unknown clock. It is said once."""
        try:
            self._last = self.gpu.read()
        except OSError as error:
            if not self._fails:
                log.error("the GPU cannot be read: %s", error)
            self._fails = True
            return replace(self._last, clock_mhz=None, dry_run_mhz=None, stands_for_mhz=None)
        self._fails = False
        return self._last

    def begin(self, spec: EngineSpec) -> None:
        """From here on the counter's rise is ours."""
        for other in self._others():
            other.spec = spec
        self._counted_j = self.reading().energy_j

    def step(self, step: Step) -> None:
        """Book an iteration."""
        reading = self.reading()
        self._advises = self._advises or reading.dry_run_mhz is not None
        self.gpu.worked(step.work)
        joules = self._since_last()
        self.ledger.iteration(joules, step.rows, step.prefills)
        self._open.update(request_id for request_id, _ in step.prefills)
        wanted_mhz = (None, reading.planned_on_mhz)
        for other, other_mhz in zip(self._others(), wanted_mhz, strict=False):
            other.step(
                step.work,
                kv_blocks=step.kv_blocks,
                prompts=len(step.prefills),
                clock_mhz=reading.clock_mhz,
                joules=joules,
                other_mhz=other_mhz,
            )

    def idle(self, seconds: float) -> None:
        """Book time in which nothing ran."""
        if seconds > 0:
            self.gpu.idled(seconds)
            joules = self._since_last()
            self.ledger.idle(joules)
            for other in self._others():
                other.idle(seconds, joules)

    def joined(self, request_id: int, rows: int) -> None:
        """A request decodes `rows` rows from the next iteration on."""
        self._open.add(request_id)
        self.ledger.join(request_id, rows)

    def paused(self, request_id: int) -> None:
        """A request was thrown out of the KV cache and waits again."""
        self.ledger.pause(request_id)

    def left(self, request_id: int) -> float | None:
        """A request ended: its joules, None if it never ran."""
        if request_id not in self._open:
            return None
        self._open.discard(request_id)
        return self.ledger.leave(request_id)

    def energy(self) -> Energy:
        """The totals so far."""
        return Energy(
            total_j=self.ledger.total_j,
            idle_j=self.ledger.idle_j,
            top_j=self.top.joules() if self.top and self.top.table.clocks_measured else None,
            advised_j=self.advised.joules() if self.advised and self._advises else None,
            watts=self.reading().watts,
        )

    def _others(self) -> tuple[SavingsEstimate, ...]:
        return tuple(other for other in (self.top, self.advised) if other is not None)

    def _since_last(self) -> float:
        counter_j = self.reading().energy_j
        before_j, self._counted_j = self._counted_j, counter_j
        return counter_j - before_j
