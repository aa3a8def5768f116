"""One engine under a given schedule of clocks, first come, first served, without a controller: compiled as a whole.

For searches that try thousands of schedules on one trace. It agrees with a `Simulation` of the same clocks to the bit,
and a run can stop at any time and be continued in several ways. Knows nothing of policies and SLOs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from throttllem.config import Noise
from throttllem.core.types import EngineSpec
from throttllem.engines.simulated.batcher import new_batch
from throttllem.engines.simulated.engine import draw
from throttllem.physics.engine import EnginePhysics
from throttllem.physics.iterations import PROGRESS, REQUEST, SERVED, Batch, Floats, Ints, Records, serve

Clocks = Sequence[tuple[float, int]]
"""(seconds, MHz), ascending: the clock of iterations that begin then or later; the first one also of those before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """What arrives, shape (requests,) each, ascending in `arrival_s`."""

    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    max_tokens: Ints


@dataclass(frozen=True, slots=True)
class Held:
    """Where a run is. `ScheduledEngine.run` moves it on; a copy can be moved on in another way."""

    batch: Batch
    progress: Records
    served: Records

    def copy(self) -> Held:
        """The same, sharing nothing that changes. O(requests)."""
        batch = Batch(self.batch.rules, *(part.copy() for part in self.batch[1:]))
        return Held(batch, self.progress.copy(), self.served.copy())

    @property
    def now_s(self) -> float:
        """When the last iteration ended."""
        return float(self.progress["now_s"][0])

    @property
    def energy_j(self) -> float:
        """Joules of all GPUs until then."""
        return float(self.progress["energy_j"][0])

    @property
    def idle_j(self) -> float:
        """The part of them with nothing to run."""
        return float(self.progress["idle_j"][0])

    @property
    def iterations(self) -> int:
        """How many ran."""
        return int(self.progress["ran"][0])

    @property
    def first_token_s(self) -> Floats:
        """When each request gave its first token, shape (requests,); nan: not yet, or it fits the engine never."""
        return np.array(self.served["first_token_s"])

    @property
    def ended_s(self) -> Floats:
        """When each request gave its last token, in the same way."""
        return np.array(self.served["ended_s"])


class ScheduledEngine:
    """One engine and the requests that it gets. Its noise is that of a `Simulation` of the same seed."""

    def __init__(
        self, spec: EngineSpec, physics: EnginePhysics, requests: Requests, *, seed: int, noise: Noise
    ) -> None:
        self._spec, self._physics = spec, physics
        self._rng, self._noise = np.random.default_rng((seed, 0)), noise
        self._scatter: Floats = np.zeros((0, 2))
        tokens = requests.prompt_tokens + requests.max_tokens
        blocks = -(-tokens // spec.block_tokens)
        self._requests = np.zeros(tokens.size, REQUEST)
        self._requests["slot"] = np.arange(tokens.size)
        self._requests["release_s"] = requests.arrival_s
        self._requests["prompt_tokens"], self._requests["output_tokens"] = (
            requests.prompt_tokens,
            requests.output_tokens,
        )
        self._requests["reserved_blocks"] = blocks
        self._fits = (tokens <= spec.max_context_tokens) & (blocks <= spec.kv_blocks)
        self._on_arrival = self._requests[self._fits]

    @property
    def idle_w(self) -> float:
        """Watts of all GPUs with nothing to run."""
        return self._physics.idle_w()

    def begin(self) -> Held:
        """Time 0, and nothing has arrived."""
        served = np.full(self._requests.size, np.nan, SERVED)
        return Held(new_batch(self._spec, self._requests.size), np.zeros(1, PROGRESS), served)

    def run(self, held: Held, clocks: Clocks, *, until_s: float = math.inf, release_s: Floats | None = None) -> Held:
        """Move a run on: all iterations that begin before `until_s`. It returns `held`.

        A request reaches the engine at its `release_s`, shape (requests,), no earlier than it arrives (None: on
        arrival). A run that is continued must have had the same releases until then.
        """
        requests = self._on_arrival if release_s is None else self._released(release_s)
        from_s = np.array([at_s for at_s, _ in clocks], dtype=np.float64)
        rows = np.array([self._physics.row(mhz) for _, mhz in clocks], dtype=np.int64)
        law = self._physics.law()
        while not serve(
            held.batch, law, self._scatter, requests, held.served, held.progress, from_s, rows, self.idle_w, until_s
        ):
            self._scatter = np.concatenate([self._scatter, draw(self._rng, self._noise)])
        return held

    def _released(self, release_s: Floats) -> Records:
        """The requests in order of their release."""
        requests = self._requests.copy()
        requests["release_s"] = np.maximum(requests["release_s"], release_s)
        requests = requests[self._fits]
        order = np.argsort(requests["release_s"], kind="stable")
        return np.ascontiguousarray(requests[order])
