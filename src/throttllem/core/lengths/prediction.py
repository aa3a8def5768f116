"""How long will the output be? (the paper's length predictor, part 1 of its system)

A predictor returns tokens for one request, or None where it does not know; then max_tokens stands in. The shape
of the error and the inflation are open in the paper: both are parameters here. Knows nothing of engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple, Protocol

from throttllem.core.types import Request

_NORMAL = NormalDist()
_MASK = (1 << 64) - 1


class Prediction(NamedTuple):
    """Output tokens of one request, not yet clipped to max_tokens.

    `bound_tokens`: what the output will hardly exceed, by a predictor that knows its own uncertainty; None: it does
    not, and the controller inflates `expected_tokens`.
    """

    expected_tokens: float
    bound_tokens: float | None = None


class LengthPredictor(Protocol):
    """Predicts output lengths, and may learn from those that came out. By default it never learns."""

    def predict(self, request: Request) -> Prediction | None:
        """What to expect; None where it does not know. The last prediction for a request counts."""

    def renew(self, request: Request, generated_tokens: int) -> float | None:
        """A new bound for an output that is longer than `generated_tokens` already; None: max_tokens (the paper)."""
        return None

    def learn(self, request: Request, output_tokens: int) -> None:
        """The output ended with `output_tokens` (of each of its sequences)."""
        return None

    def forget(self, request: Request) -> None:
        """The request ended before its output did: there is nothing to learn from."""
        return None


@dataclass(frozen=True, slots=True)
class Oracle(LengthPredictor):
    """Knows the output (simulation only): the paper's upper bound."""

    def predict(self, request: Request) -> Prediction | None:
        """The true length, where the request carries it."""
        return None if request.output_tokens is None else Prediction(request.output_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Noisy(LengthPredictor):
    """The oracle with a relative error, normal, `p95_error` at the 95th percentile of its absolute value.

    The paper gives 30 % at p95 and leaves the shape open. The draw depends on seed and request id alone, so a replay
    sees the same errors whatever the order of calls.
    """

    p95_error: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.p95_error < 1:
            raise ValueError(f"length error = {self.p95_error}: must be at least 0 and below 1 (0.3 is the paper's)")

    def predict(self, request: Request) -> Prediction | None:
        """The true length times 1 + error."""
        if request.output_tokens is None:
            return None
        sigma = self.p95_error / _NORMAL.inv_cdf(0.975)
        return Prediction(request.output_tokens * (1.0 + sigma * _NORMAL.inv_cdf(_uniform(self.seed, request.id))))


@dataclass(frozen=True, slots=True)
class MaxTokens(LengthPredictor):
    """Knows nothing: every output is as long as it may be."""

    def predict(self, request: Request) -> Prediction | None:
        """The request's own limit."""
        return Prediction(request.max_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthScore:
    """How predictions came out: outputs seen, those longer than their inflated prediction, and the absolute errors of
    the predictions before inflation, summed.
    """

    seen: int = 0
    exceeded: int = 0
    error_tokens: int = 0

    def with_output(self, tokens: int, *, predicted_tokens: int, expected_tokens: int) -> LengthScore:
        """The score with one more output, of `tokens`."""
        return LengthScore(
            seen=self.seen + 1,
            exceeded=self.exceeded + (tokens > predicted_tokens),
            error_tokens=self.error_tokens + abs(tokens - expected_tokens),
        )


def _uniform(seed: int, key: int) -> float:
    """A number in (0, 1) that depends on seed and key alone (SplitMix64, Steele et al., OOPSLA 2014)."""
    z = (seed * 0x9E3779B97F4A7C15 + key * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & _MASK
    return ((z ^ (z >> 31)) + 0.5) / 2.0**64
