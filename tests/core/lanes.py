"""Requests of several sequences on a batcher that knows single ones: a lane for each sequence."""

from __future__ import annotations

from throttllem.core.types import Request
from throttllem.engines.simulated.batcher import Batcher, Outcome

MOST = 8


class Lanes:
    """A request starts with the first token of its last lane and ends with the last; a single lane may be preempted."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher
        self.wide: set[int] = set()
        self.silent: dict[int, set[int]] = {}
        self.open: dict[int, set[int]] = {}

    def add(self, request: Request) -> None:
        lanes = range(request.id * MOST, request.id * MOST + request.sequences)
        self.open[request.id], self.silent[request.id] = set(lanes), set(lanes)
        if request.sequences > 1:
            self.wide.add(request.id)
        for lane in lanes:
            self.batcher.add(
                lane,
                prompt_tokens=request.prompt_tokens,
                output_tokens=request.output_tokens,
                max_tokens=request.max_tokens,
            )

    def cancel(self, request_id: int) -> None:
        for lane in self.open.pop(request_id):
            self.batcher.cancel(lane)

    def end(self):
        """The batcher's iteration, by request: its outcome, started, finished, preempted."""
        outcome: Outcome = self.batcher.end()
        started, finished = [], []
        for lane in outcome.started:
            key = lane // MOST
            waited = self.silent[key]
            if waited or key not in self.wide:
                waited.discard(lane)
                started += [] if waited else [key]
        for lane in outcome.finished:
            key = lane // MOST
            self.open[key].discard(lane)
            if not self.open[key]:
                del self.open[key]
                finished.append(key)
        preempted = [lane // MOST for lane in outcome.preempted if lane // MOST not in self.wide]
        return outcome.index, tuple(started), tuple(finished), tuple(preempted)
