"""Which of the engines that serve a request is offered to: those with the fewest sequences for what they carry.

Knows nothing of admission, nor of why an engine serves.
"""

# Engines that serve share the load in proportion to their weights, the load that their size carries. The next request
# goes where the sequences that the scoreboard knows of, it included, are fewest for the weight; of equals to the engine
# with the lowest number. Among engines of one size that is the least loaded one. Round robin, the least loaded and the
# better of two came out equal in energy, and filling one engine after the other dearer (docs/decisions.md).
#
# An engine that has part of the prompt in its prefix cache need not compute it. It comes first if it has at most one
# sequence more for its weight than the least loaded one: so prefixes break ties, and never crowd an engine.
#
# The order is kept in a heap. An engine whose load fell gets a new entry at once; one whose load rose is corrected when
# it comes to the top. So the order is a function of the scoreboards alone, and costs O(log engines) an event.

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping

from throttllem.core.engine_state import EngineState
from throttllem.core.types import EngineSpec, Request

MOST_TRIED = 3
"""Engines that one request is offered to at a time: where these have no room for it, few others have."""
_SLACK = 64


class Router:
    """The engines that serve, by id, and their order. `weights` by engine size; a size without one counts by its GPUs.

    `weight` is the sum over the engines that serve.
    """

    def __init__(self, weights: Mapping[int, float]) -> None:
        self.serving: dict[int, EngineState] = {}
        self.weight = 0.0
        self._weights = weights
        self._heap: list[tuple[float, int, int]] = []
        self._entries: dict[int, int] = {}
        self._count = 0

    def weight_of(self, engine: EngineState) -> float:
        """What its size carries in proportion to others."""
        return self._weights.get(engine.tp) or float(engine.tp)

    def add(self, engine: EngineState) -> None:
        """It takes requests from now on."""
        self.serving[engine.engine] = engine
        self.weight = sum(map(self.weight_of, self.serving.values()))
        self.changed(engine)

    def remove(self, engine: EngineState) -> None:
        """It takes no more requests."""
        del self.serving[engine.engine], self._entries[engine.engine]
        self.weight = sum(map(self.weight_of, self.serving.values()))

    def changed(self, engine: EngineState) -> None:
        """The engine has fewer sequences than before. Nothing happens to one that does not serve."""
        if engine.engine not in self.serving:
            return
        self._enter(engine, self._load(engine))
        if len(self._heap) > 4 * len(self.serving) + _SLACK:
            self._heap = [entry for entry in self._heap if self._entries.get(entry[1]) == entry[2]]
            heapq.heapify(self._heap)

    def candidates(self, can_hold: Callable[[EngineSpec], bool] | None = None) -> list[EngineState]:
        """The engines to offer the next request to, best first, `MOST_TRIED` at most. `can_hold`: those of which specs
        come into question (None: all); O(engines) where few do.
        """
        found: list[tuple[float, int, int]] = []
        passed: list[tuple[float, int, int]] = []
        while self._heap and len(found) < MOST_TRIED:
            load, key, entry = heapq.heappop(self._heap)
            if self._entries.get(key) != entry:
                continue
            engine = self.serving[key]
            present = self._load(engine)
            if present != load:
                self._enter(engine, present)
            elif can_hold is not None and engine.spec is not None and not can_hold(engine.spec):
                passed.append((load, key, entry))
            else:
                found.append((load, key, entry))
        for top in (*found, *passed):
            heapq.heappush(self._heap, top)
        return [self.serving[key] for _, key, _ in found]

    def with_prefix(self, request: Request, found: list[EngineState]) -> list[EngineState]:
        """The engines `found` for a request, after the one that has most of its prompt cached, if that has the same
        spec as one of them and, the request not counted, no more load than the first with it. O(`request.prefixes`).
        """
        if not request.prefixes or not found:
            return found
        least, specs = self._load(found[0]), [engine.spec for engine in found]
        tied: list[tuple[int, float, int]] = []
        for prefix in request.prefixes:
            engine = self.serving.get(prefix.engine)
            if engine is None or not prefix.cached_prompt_tokens or engine.spec not in specs:
                continue
            if self._sequences(engine) / self.weight_of(engine) <= least:
                tied.append((-prefix.cached_prompt_tokens, self._load(engine), engine.engine))
        if not tied:
            return found
        best = self.serving[min(tied)[2]]
        return [best, *(engine for engine in found if engine is not best)][:MOST_TRIED]

    def _enter(self, engine: EngineState, load: float) -> None:
        self._count += 1
        self._entries[engine.engine] = self._count
        heapq.heappush(self._heap, (load, engine.engine, self._count))

    def _load(self, engine: EngineState) -> float:
        return (self._sequences(engine) + 1) / self.weight_of(engine)

    def _sequences(self, engine: EngineState) -> int:
        board = engine.board
        return board.running_sequences + board.pending_sequences + max(0, board.external.batch)
