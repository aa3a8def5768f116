"""How long will the answer be? (the paper's length predictor, part 1 of its system)

A predictor sees a request and answers with tokens, or None where it cannot say; `predicted_tokens` then falls back to
max_tokens. The shape of the error and the inflation are open in the paper: both are parameters here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol, TypeGuard

from throttllem.core.types import Request

_NORMAL = NormalDist()
_MASK = (1 << 64) - 1


class LengthPredictor(Protocol):
    """Anything that guesses an answer's length."""

    def predict(self, request: Request) -> float | None:
        """Tokens of the answer, not yet inflated or clipped; None where it cannot say."""

    def learn(self, request: Request, output_tokens: int) -> None:
        """An answer ended with so many tokens (each of them, where there are several side by side)."""

    def renew(self, request: Request, generated_tokens: int) -> float | None:
        """Tokens of an answer that already has more than `generated_tokens`, inflated; None: max_tokens (the paper)."""


class Bounding(LengthPredictor, Protocol):
    """A predictor that knows its own uncertainty: its bound stands in the place of the inflated prediction."""

    def bound(self, request: Request) -> float | None:
        """Tokens that the answer will hardly exceed; None: max_tokens."""

    def forget(self, request: Request) -> None:
        """The request ended without an answer."""


def is_bounding(predictor: LengthPredictor) -> TypeGuard[Bounding]:
    """Does it bound answers itself? Asked at every arrival: `isinstance` on a protocol would cost 10 us."""
    return hasattr(predictor, "bound")


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthScore:
    """How predictions came out: answers seen, those longer than their inflated prediction, and the absolute errors of
    the predictions before inflation, summed.
    """

    seen: int = 0
    exceeded: int = 0
    error_tokens: int = 0


class Unlearning:
    """What a predictor does that never learns."""

    __slots__ = ()

    def learn(self, request: Request, output_tokens: int) -> None:
        """Nothing."""

    def renew(self, request: Request, generated_tokens: int) -> float | None:
        """None: what outgrew its prediction is taken to go on to max_tokens."""
        return None


@dataclass(frozen=True, slots=True)
class Oracle(Unlearning):
    """Knows the answer (simulation only): the paper's upper bound."""

    def predict(self, request: Request) -> float | None:
        """The true length, where the request carries it."""
        return request.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Noisy(Unlearning):
    """The oracle with a relative error, normal, `p95_error` at the 95th percentile of its absolute value.

    The paper gives 30 % at p95 and leaves the shape open. The draw depends on seed and request id alone, so a replay
    sees the same errors whatever the order of calls.
    """

    p95_error: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.p95_error < 1:
            raise ValueError(f"length error = {self.p95_error}: must be at least 0 and below 1 (0.3 is the paper's)")

    def predict(self, request: Request) -> float | None:
        """The true length times 1 + error."""
        if request.output_tokens is None:
            return None
        sigma = self.p95_error / _NORMAL.inv_cdf(0.975)
        return request.output_tokens * (1.0 + sigma * _NORMAL.inv_cdf(_uniform(self.seed, request.id)))


@dataclass(frozen=True, slots=True)
class MaxTokens(Unlearning):
    """Knows nothing: every answer is as long as it may be."""

    def predict(self, request: Request) -> float | None:
        """The request's own limit."""
        return request.max_tokens


def predicted_tokens(predictor: LengthPredictor, request: Request, inflation: float) -> int:
    """The prediction, inflated and clipped to 1 .. max_tokens; max_tokens where there is no usable prediction.

    A predictor that bounds the answer itself is not inflated.
    """
    if is_bounding(predictor):
        return _clipped(predictor.bound(request), request.max_tokens)
    guess = predictor.predict(request)
    return _clipped(None if guess is None else guess * inflation, request.max_tokens)


def expected_tokens(predictor: LengthPredictor, request: Request, tokens: int, inflation: float) -> int:
    """The prediction before it was inflated to `tokens`, clipped likewise and never above it."""
    if is_bounding(predictor):
        return min(tokens, _clipped(predictor.predict(request), tokens))
    return math.ceil(tokens / max(1.0, inflation))


def _clipped(guess: float | None, most: int) -> int:
    if guess is None or not math.isfinite(guess):
        return most
    return max(1, min(most, math.ceil(guess)))


def _uniform(seed: int, key: int) -> float:
    """A number in (0, 1) that depends on seed and key alone (SplitMix64, Steele et al., OOPSLA 2014)."""
    z = (seed * 0x9E3779B97F4A7C15 + key * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & _MASK
    return ((z ^ (z >> 31)) + 0.5) / 2.0**64
