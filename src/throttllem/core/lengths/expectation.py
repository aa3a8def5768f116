"""What is expected of each request before it runs, and how well that came out: the controller's use of a predictor."""

from __future__ import annotations

from throttllem.core.lengths.prediction import (
    LengthPredictor,
    LengthScore,
    expected_tokens,
    is_bounding,
    predicted_tokens,
)
from throttllem.core.sequence_state import SequenceState
from throttllem.core.types import Request


class LengthPrediction:
    """Asks the predictor, tells it what came out, keeps the score. The predictor belongs to it alone."""

    def __init__(self, predictor: LengthPredictor, inflation: float) -> None:
        self.score = LengthScore()
        self._predictor = predictor
        self._inflation = inflation

    def row(self, request: Request) -> SequenceState:
        """The row of a request that has just come in."""
        tokens = predicted_tokens(self._predictor, request, self._inflation)
        sure = expected_tokens(self._predictor, request, tokens, self._inflation)
        return SequenceState(request=request, predicted_tokens=tokens, output_tokens=tokens, expected_tokens=sure)

    def renew(self, request: Request, generated_tokens: int) -> float | None:
        """The prediction for an answer that has outgrown the one before; None: max_tokens."""
        return self._predictor.renew(request, generated_tokens)

    def finished(self, row: SequenceState, tokens: int) -> None:
        """An answer ended with so many tokens; one of which nothing is known (none were told) teaches nothing."""
        if tokens < 1:
            self.dropped(row)
            return
        sure = row.predicted_tokens if row.expected_tokens is None else row.expected_tokens
        score = self.score
        self.score = LengthScore(
            seen=score.seen + 1,
            exceeded=score.exceeded + (tokens > row.predicted_tokens),
            error_tokens=score.error_tokens + abs(tokens - sure),
        )
        self._predictor.learn(row.request, tokens)

    def dropped(self, row: SequenceState) -> None:
        """A request ended before its answer did."""
        if is_bounding(self._predictor):
            self._predictor.forget(row.request)
