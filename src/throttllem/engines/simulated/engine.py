"""A simulated engine: the batcher, with seconds and watts from the physical model and seeded noise on both.

Has no time itself: a driver runs one iteration after the other, in virtual time, or sleeping through them. A new clock
applies from the next iteration on.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from throttllem.config import Noise
from throttllem.core.energy import EnergyLedger
from throttllem.core.types import EngineSpec
from throttllem.engines.simulated.batcher import Batcher, Iteration, Outcome


class Physics(Protocol):
    """Seconds and watts of an iteration: `physics.engine.EnginePhysics`, or a measured engine's table."""

    def iteration(
        self, clock_mhz: float, decode_batch: int, kv_tokens: int, prefill_tokens: int, prefill_pairs: float
    ) -> tuple[float, float]:
        """Seconds of one iteration, and watts of all GPUs of the engine during it."""

    def idle_w(self) -> float:
        """Watts of all GPUs of the engine while nothing runs."""


class SimulatedEngine:
    """One running engine. `step` begins an iteration, `finish` ends it."""

    def __init__(
        self, spec: EngineSpec, physics: Physics, *, clock_mhz: int, seed: tuple[int, ...], noise: Noise
    ) -> None:
        self.spec = spec
        self.clock_mhz = clock_mhz
        self.batcher = Batcher(spec)
        self.ledger = EnergyLedger()
        self._physics = physics
        self._noise = noise
        self._rng = np.random.default_rng(seed)
        self._draws: list[tuple[float, ...]] = []

    def step(self) -> tuple[Iteration, float, float] | None:
        """Begin the next iteration: the iteration, its seconds, its watts (all GPUs). None: nothing to run."""
        iteration = self.batcher.begin()
        if iteration is None:
            return None
        seconds, watts = self._physics.iteration(
            self.clock_mhz,
            iteration.decode_sequences,
            iteration.kv_tokens,
            iteration.prefill_tokens,
            iteration.prefill_pairs,
        )
        if not self._draws:
            scatter = self._rng.standard_normal((2048, 2)) * (self._noise.time, self._noise.power)
            self._draws = list(map(tuple, np.exp(scatter).tolist()))
        slower, hotter = self._draws.pop()
        seconds, watts = seconds * slower, watts * hotter
        for request_id in iteration.preempted:
            self.ledger.pause(request_id)
        self.ledger.iteration(seconds * watts, iteration.decode_sequences, iteration.prefills)
        return iteration, seconds, watts

    def finish(self) -> tuple[Outcome, dict[int, float]]:
        """End the running iteration: its outcome, and the joules of the requests that finished."""
        outcome = self.batcher.end()
        for request_id in outcome.started:
            self.ledger.join(request_id)
        return outcome, {request_id: self.ledger.leave(request_id) for request_id in outcome.finished}

    def idle(self, seconds: float) -> None:
        """Account for time in which nothing ran."""
        self.ledger.idle(seconds * self._physics.idle_w())
