"""What engines tell, booked on their scoreboards: iterations, corrections, and what else an engine holds.

Knows nothing of the queue or of clocks: it says whether anything changed that calls for a new plan.
"""

from __future__ import annotations

from throttllem.core.clocks.steady_load import LoadEstimator
from throttllem.core.engine_state import EngineState
from throttllem.core.lengths.expectation import LengthPrediction
from throttllem.core.snapshot import Counts
from throttllem.core.types import Observed, Progressed, Stepped


class StateUpdate:
    """The books of one controller. Bare iterations and observations that tell nothing new are O(1)."""

    def __init__(self, load: LoadEstimator, foresight: LengthPrediction) -> None:
        self._counts: dict[str, int] = {}
        self._load = load
        self._foresight = foresight

    def count(self, **more: int) -> None:
        """Add to the counts, by the names of `Counts`."""
        for name, by in more.items():
            self._counts[name] = self._counts.get(name, 0) + by

    @property
    def counts(self) -> Counts:
        """The counts so far."""
        return Counts(**self._counts)

    def stepped(self, engine: EngineState, event: Stepped, now_s: float) -> bool:
        """An iteration; False if nothing changed but its number."""
        engine.iteration, engine.began_s = event.iteration + 1, now_s
        board = engine.board
        for request_id in event.preempted:
            if request_id in board.running:
                board.preempt(request_id, event.iteration)
        for request_id in event.started:
            if request_id in board.pending:
                board.begin(request_id, event.iteration, now_s)
        for request_id in event.finished:
            if request_id in board:
                self._finish(engine, request_id, event.iteration)
        outgrown = board.outgrown(engine.iteration, self._foresight.renew)
        if not (event.started or event.finished or event.preempted or outgrown or engine.stale):
            engine.in_progress = len(board) > 0
            return False
        engine.in_progress = engine.stale = False
        return True

    def progressed(self, engine: EngineState, event: Progressed, now_s: float) -> bool:
        """A correction of one row; if it only moved, the next iteration is soon enough to plan."""
        board = engine.board
        if event.request_id not in board:
            return False
        begins = event.request_id in board.pending
        row = board.pending.get(event.request_id) or board.running[event.request_id]
        tokens = max(1, min(event.tokens, row.request.max_tokens))  # more than it may give is an error of counting
        board.correct(event.request_id, tokens, engine.told, now_s)
        engine.drift.corrections += 1
        engine.stale = engine.stale or not begins
        return begins

    def observed(self, engine: EngineState, event: Observed) -> bool:
        """What the engine says of itself; True if what it holds of others has changed enough since the last plan."""
        assert engine.spec is not None
        board = engine.board
        board.others = engine.drift.compare(event, board.own(engine.told))
        if not board.others.moved(engine.others, engine.spec.kv_blocks):
            return False
        engine.drift.corrections += 1
        return True

    def _finish(self, engine: EngineState, request_id: int, iteration: int) -> None:
        row = engine.board.remove(request_id)
        self.count(finished=1, lost=row.lost)
        tokens = row.generated_tokens(iteration)
        self._load.finished(row.predicted_tokens, tokens)
        self._foresight.finished(row, tokens)
