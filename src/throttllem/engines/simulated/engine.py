"""A simulated engine: the batcher, with seconds and watts from the physical model and seeded noise on both.

Has no time itself: a driver runs one iteration after the other, in virtual time, or sleeping through them. A new clock
applies from the next iteration on.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from throttllem.config import Noise
from throttllem.core.energy import EnergyLedger
from throttllem.core.types import EngineSpec
from throttllem.engines.simulated.batcher import Batcher, Iteration, Outcome
from throttllem.physics.engine import EnginePhysics
from throttllem.physics.iterations import NEVER, Floats, Records, decode

_DRAWN_AT_ONCE = 2048


class Physics(Protocol):
    """Seconds and watts of an iteration: `physics.engine.EnginePhysics`, or a measured engine's table."""

    def iteration(
        self, clock_mhz: float, decode_batch: int, kv_tokens: int, prefill_tokens: int, prefill_pairs: float
    ) -> tuple[float, float]:
        """Seconds of one iteration, and watts of all GPUs of the engine during it."""

    def idle_w(self) -> float:
        """Watts of all GPUs of the engine while nothing runs."""


class SimulatedEngine:
    """One running engine. `step` begins an iteration, `finish` ends it. `physics` may be changed between the two."""

    def __init__(
        self, spec: EngineSpec, physics: Physics, *, clock_mhz: int, seed: tuple[int, ...], noise: Noise
    ) -> None:
        self.spec = spec
        self.clock_mhz = clock_mhz
        self.batcher = Batcher(spec)
        self.ledger = EnergyLedger()
        self.physics = physics
        self._noise = noise
        self._rng = np.random.default_rng(seed)
        self._scatter: Floats = np.zeros((0, 2))
        self._drawn = 0

    def step(self) -> tuple[Iteration, float, float] | None:
        """Begin the next iteration: the iteration, its seconds, its watts (all GPUs). None: nothing to run."""
        iteration = self.batcher.begin()
        if iteration is None:
            return None
        seconds, watts = self.physics.iteration(
            self.clock_mhz,
            iteration.decode_sequences,
            iteration.kv_tokens,
            iteration.prefill_tokens,
            iteration.prefill_pairs,
        )
        slower, hotter = self._draw()[0].tolist()
        self._drawn += 1
        seconds, watts = seconds * slower, watts * hotter
        for request_id in iteration.preempted:
            self.ledger.pause(request_id)
        self.ledger.iteration(seconds * watts, iteration.decode_sequences, iteration.prefills)
        return iteration, seconds, watts

    def decode(
        self, begin_s: float, *, limit_s: float, before: float, steps: Records, filled: int
    ) -> tuple[int, float]:
        """Run iterations from `begin_s` on while they only decode: none starts, finishes or preempts a request, all end
        before `limit_s`, and the one after the last is earlier than iteration `before`. They are written to `steps`
        (`physics.iterations.STEP`) from entry `filled` on. How many ran, and when the last one ended.
        """
        physics = self.physics
        if not isinstance(physics, EnginePhysics):
            return 0, begin_s
        row, last = physics.row(self.clock_mhz), NEVER if before == math.inf else int(before)
        scatter = self._draw()
        ran, end_s = decode(self.batcher.state, physics.law(), row, scatter, begin_s, limit_s, last, steps, filled)
        if ran:
            self._drawn += ran
            joules = steps["joules"][filled : filled + ran].tolist()
            self.ledger.iterations(joules, int(steps["sequences"][filled]))
        return ran, end_s

    def finish(self) -> tuple[Outcome, dict[int, float]]:
        """End the running iteration: its outcome, and the joules of the requests that finished."""
        outcome = self.batcher.end()
        for request_id in outcome.started:
            self.ledger.join(request_id)
        return outcome, {request_id: self.ledger.leave(request_id) for request_id in outcome.finished}

    def idle(self, seconds: float) -> None:
        """Account for time in which nothing ran."""
        self.ledger.idle(seconds * self.physics.idle_w())

    def _draw(self) -> Floats:
        """Factors on the seconds and watts of coming iterations, at least one."""
        if self._drawn == len(self._scatter):
            self._scatter, self._drawn = draw(self._rng, self._noise), 0
        return self._scatter[self._drawn :]


def draw(rng: np.random.Generator, noise: Noise) -> Floats:
    """Factors on the seconds and watts of an engine's next iterations, shape (iterations, 2)."""
    scatter = rng.standard_normal((_DRAWN_AT_ONCE, 2)) * (noise.time, noise.power)
    return np.exp(scatter)[::-1].copy()
