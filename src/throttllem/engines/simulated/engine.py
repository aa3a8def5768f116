"""A simulated engine: the batcher, with seconds and watts from the physical model and seeded noise on both.

Has no time itself: a driver runs one iteration after the other, in virtual time, or sleeping through them. A new clock
applies from the next iteration on.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np

from throttllem.config import Noise
from throttllem.core.energy import EnergyLedger
from throttllem.core.types import EngineSpec
from throttllem.engines.simulated.batcher import Batcher, Iteration, Outcome
from throttllem.physics.engine import EnginePhysics
from throttllem.physics.iterations import NEVER, Floats, Records, advance

_DRAWN_AT_ONCE = 2048


class Physics(Protocol):
    """Seconds and watts of an iteration: `physics.engine.EnginePhysics`, or a measured engine's table."""

    def iteration(
        self, clock_mhz: float, decode_batch: int, kv_tokens: int, prefill_tokens: int, prefill_pairs: float
    ) -> tuple[float, float]:
        """Seconds of one iteration, and watts of all GPUs of the engine during it."""

    def idle_w(self) -> float:
        """Watts of all GPUs of the engine while nothing runs."""


class Advance(NamedTuple):
    """`ran` iterations that only decoded, and the one that began then: when, its seconds, its prompts (request id,
    tokens), and the requests preempted in it.
    """

    ran: int
    begin_s: float
    seconds: float
    prefills: tuple[tuple[int, int], ...]
    preempted: tuple[int, ...]


class SimulatedEngine:
    """One running engine. `step` begins an iteration (`advance` runs some before), `finish` ends it. `physics` may be
    changed between the two.
    """

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
        self._draw()
        slower, hotter = self._scatter[self._drawn].tolist()
        self._drawn += 1
        seconds, watts = seconds * slower, watts * hotter
        self._share(seconds * watts, iteration.decode_sequences, iteration.prefills, iteration.preempted)
        return iteration, seconds, watts

    def advance(self, begin_s: float, *, limit_s: float, before: float, steps: Records, filled: int) -> Advance | None:
        """Run iterations from `begin_s` on while they only decode: none starts, finishes or preempts a request, all end
        before `limit_s`, and the one after the last is earlier than iteration `before`. Then begin one more, as `step`
        does. All are written to `steps` (`physics.iterations.STEP`) from entry `filled` on. None: nothing to run.
        """
        physics, batcher = self.physics, self.batcher
        if type(physics) is not EnginePhysics:  # one that overrides the law is asked for every iteration
            return self._advance_by_one(begin_s, steps, filled)
        if not len(batcher):
            return None
        self._draw()
        row, last = physics.row(self.clock_mhz), NEVER if before == math.inf else int(before)
        ran, begin_s, seconds, joules, sequences, prompts, preempted = advance(
            batcher.state, physics.law(), row, self._scatter, self._drawn, begin_s, limit_s, last, steps, filled
        )
        self._drawn += ran + 1
        if ran:
            earlier_j = steps["joules"][filled : filled + ran].tolist()
            self.ledger.iterations(earlier_j, int(steps["sequences"][filled]))
        begun = Advance(ran, begin_s, seconds, batcher.prefills(prompts), batcher.preempted(preempted))
        self._share(joules, sequences, begun.prefills, begun.preempted)
        return begun

    def _advance_by_one(self, begin_s: float, steps: Records, filled: int) -> Advance | None:
        """The same where the physics is not compiled."""
        step = self.step()
        if step is None:
            return None
        now, seconds, watts = step
        of = now.decode_sequences, len(now.prefills), now.prefill_tokens, now.kv_blocks
        steps[filled] = (begin_s, seconds, seconds * watts, self.clock_mhz, *of)
        return Advance(0, begin_s, seconds, now.prefills, now.preempted)

    def _share(
        self, joules: float, sequences: int, prefills: tuple[tuple[int, int], ...], preempted: tuple[int, ...]
    ) -> None:
        for request_id in preempted:
            self.ledger.pause(request_id)
        self.ledger.iteration(joules, sequences, prefills)

    def finish(self) -> tuple[Outcome, dict[int, float]]:
        """End the running iteration: its outcome, and the joules of the requests that finished."""
        outcome = self.batcher.end()
        for request_id in outcome.started:
            self.ledger.join(request_id)
        return outcome, {request_id: self.ledger.leave(request_id) for request_id in outcome.finished}

    def idle(self, seconds: float) -> None:
        """Account for time in which nothing ran."""
        self.ledger.idle(seconds * self.physics.idle_w())

    def _draw(self) -> None:
        """See that the next iteration has its factors."""
        if self._drawn == len(self._scatter):
            self._scatter, self._drawn = draw(self._rng, self._noise), 0


def draw(rng: np.random.Generator, noise: Noise) -> Floats:
    """Factors on the seconds and watts of an engine's next iterations, shape (iterations, 2)."""
    scatter = rng.standard_normal((_DRAWN_AT_ONCE, 2)) * (noise.time, noise.power)
    return np.exp(scatter)[::-1].copy()
