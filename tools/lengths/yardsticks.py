"""What `OnlineLengthPredictor` is measured against: no knowledge, a mean, hindsight, or a published bucket.

Each has a guess and a bound for a request, and is told the answers as they end. Knows nothing of figures.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from throttllem.core.lengths.online import OnlineLengthOptions, OnlineLengthPredictor, bin_of
from tools.lengths.sets import EDGES, Asked

INFLATION = 1.3
"""The paper's error of its predictor at p95, as a running mean could be inflated by."""


class Yardstick(Protocol):
    """Guesses and bounds answers in the order of their arrival; None: it cannot say."""

    def guess(self, asked: Asked) -> float | None:
        """Tokens of the answer."""

    def bound(self, asked: Asked) -> float | None:
        """Tokens that the answer should not exceed."""

    def learn(self, asked: Asked) -> None:
        """That request has ended, with its answer."""


class Learner:
    """`OnlineLengthPredictor`; with `still`, its levels stay where they start."""

    def __init__(self, exceed: float, *, still: bool = False) -> None:
        options = OnlineLengthOptions(exceed=exceed)
        self.online = OnlineLengthPredictor(replace(options, rate=0.0, start=1.0) if still else options)

    def guess(self, asked: Asked) -> float | None:
        """Its prediction."""
        found = self.online.predict(asked.request)
        return None if found is None else found.expected_tokens

    def bound(self, asked: Asked) -> float | None:
        """Its bound."""
        found = self.online.predict(asked.request)
        return None if found is None else found.bound_tokens

    def learn(self, asked: Asked) -> None:
        """It learns."""
        self.online.learn(asked.request, asked.output_tokens)


class Limit:
    """max_tokens: what is sure."""

    def guess(self, asked: Asked) -> float | None:
        """max_tokens."""
        return float(asked.request.max_tokens)

    def bound(self, asked: Asked) -> float | None:
        """max_tokens."""
        return float(asked.request.max_tokens)

    def learn(self, asked: Asked) -> None:
        """Nothing."""


class RunningMean:
    """The mean of all answers so far; the bound is `INFLATION` times as much."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0

    def guess(self, asked: Asked) -> float | None:
        """The mean."""
        return self._sum / self._count if self._count else None

    def bound(self, asked: Asked) -> float | None:
        """The mean, inflated."""
        return None if (mean := self.guess(asked)) is None else INFLATION * mean

    def learn(self, asked: Asked) -> None:
        """One more."""
        self._sum += asked.output_tokens
        self._count += 1


class Hindsight:
    """The median and the quantile of all answers of a kind, those to come among them: what no predictor can know."""

    def __init__(self, asked: Sequence[Asked], kind: Callable[[Asked], Hashable], exceed: float) -> None:
        self._kind = kind
        kinds: dict[Hashable, list[int]] = {}
        for one in asked:
            kinds.setdefault(kind(one), []).append(one.output_tokens)
        parts = (0.5, 1 - exceed)
        self._known = {
            key: [float(token) for token in np.quantile(tokens, parts, method="inverted_cdf")]
            for key, tokens in kinds.items()
        }

    def guess(self, asked: Asked) -> float | None:
        """The kind's median."""
        return self._known[self._kind(asked)][0]

    def bound(self, asked: Asked) -> float | None:
        """The kind's quantile."""
        return self._known[self._kind(asked)][1]

    def learn(self, asked: Asked) -> None:
        """Nothing: it knows all."""


class Bucket:
    """The published bucket as it is: its midpoint, and its upper edge."""

    def guess(self, asked: Asked) -> float | None:
        """The midpoint."""
        at = asked.bucket or 0
        return (EDGES[at] + (EDGES[at - 1] + 1 if at else 1)) / 2

    def bound(self, asked: Asked) -> float | None:
        """The longest answer that belongs to it."""
        return float(EDGES[asked.bucket or 0])

    def learn(self, asked: Asked) -> None:
        """Nothing."""


def all_of(asked: Asked) -> Hashable:
    """One kind for all."""
    return None


def by_prompt(asked: Asked) -> Hashable:
    """As fine as `OnlineLengthPredictor` tells prompts apart."""
    return bin_of(asked.request.prompt_tokens) // 2


def by_bucket(asked: Asked) -> Hashable:
    """By published bucket."""
    return asked.bucket
