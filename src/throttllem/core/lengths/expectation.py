"""What is expected of each request before it runs, and how well that came out: the controller's use of a predictor."""

from __future__ import annotations

from throttllem.core.lengths.prediction import LengthPredictor, LengthScore, is_bounding, predicted_tokens, sure_tokens
from throttllem.core.sequence_state import Row
from throttllem.core.types import Request


class Foresight:
    """Asks the predictor, tells it what came out, keeps the score. The predictor belongs to it alone."""

    def __init__(self, predictor: LengthPredictor, inflation: float) -> None:
        self.score = LengthScore()
        self._predictor = predictor
        self._inflation = inflation

    def row(self, request: Request) -> Row:
        """The row of a request that has just come in."""
        tokens = predicted_tokens(self._predictor, request, self._inflation)
        sure = sure_tokens(self._predictor, request, tokens, self._inflation)
        return Row(request=request, predicted_tokens=tokens, answer_tokens=tokens, sure_tokens=sure)

    def renew(self, request: Request, generated_tokens: int) -> float | None:
        """The prediction for an answer that has outgrown the one before; None: max_tokens."""
        return self._predictor.renew(request, generated_tokens)

    def finished(self, row: Row, tokens: int) -> None:
        """An answer ended with so many tokens; one of which nothing is known (none were told) teaches nothing."""
        if tokens < 1:
            self.dropped(row)
            return
        sure = row.predicted_tokens if row.sure_tokens is None else row.sure_tokens
        score = self.score
        self.score = LengthScore(
            seen=score.seen + 1,
            exceeded=score.exceeded + (tokens > row.predicted_tokens),
            error_tokens=score.error_tokens + abs(tokens - sure),
        )
        self._predictor.learn(row.request, tokens)

    def dropped(self, row: Row) -> None:
        """A request ended before its answer did."""
        if is_bounding(self._predictor):
            self._predictor.forget(row.request)
