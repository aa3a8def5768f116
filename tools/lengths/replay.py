"""One predictor over one set in the order of arrival: each answer is guessed before it, or any later one, is known.

An answer is told when it would have ended, `TOKEN_S` a token after its arrival. Knows nothing of tables.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.lengths.sets import Asked
from tools.lengths.yardsticks import Learner, Yardstick

TOKEN_S = 0.02
WINDOW = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How one predictor did on one set.

    `unknown`: requests for which it had no guess; `error_tokens`: mean absolute error of the others; `exceeded`:
    fraction of answers longer than their bound (max_tokens where it has none); `worst`, `best`: the same over any
    `WINDOW` requests on end; `inflated`: mean bound over mean answer; `again`: of the answers that exceeded their
    bound, the fraction that exceeded the renewed one too (None: it renews none). `callers`: exceeded, least and most
    by caller; `rolling`: by window.
    """

    count: int
    unknown: int
    error_tokens: float
    exceeded: float
    worst: float
    best: float
    inflated: float
    again: float | None
    callers: tuple[float, float]
    rolling: NDArray[np.float64]


def replay(asked: Sequence[Asked], predictor: Yardstick) -> Score:
    """Guess, bound and tell, in the order of time."""
    ending: list[tuple[float, int]] = []
    errors: list[float] = []
    bounds = np.zeros(len(asked))
    again: list[bool] = []
    for at, one in enumerate(asked):
        while ending and ending[0][0] <= one.request.arrival_s:
            predictor.learn(asked[heapq.heappop(ending)[1]])
        if (guess := predictor.guess(one)) is not None:
            errors.append(abs(guess - one.output_tokens))
        bounds[at] = _or_limit(predictor.bound(one), one)
        if one.output_tokens > bounds[at] and isinstance(predictor, Learner):
            renewed = predictor.online.renew(one.request, int(bounds[at]))
            again.append(one.output_tokens > _or_limit(renewed, one))
        heapq.heappush(ending, (one.request.arrival_s + TOKEN_S * one.output_tokens, at))
    truths = np.array([one.output_tokens for one in asked])
    exceeded = (truths > bounds).astype(float)
    rolling = np.convolve(exceeded, np.ones(WINDOW) / WINDOW, "valid")
    return Score(
        count=len(asked),
        unknown=len(asked) - len(errors),
        error_tokens=float(np.mean(errors)),
        exceeded=float(exceeded.mean()),
        worst=float(rolling.max()),
        best=float(rolling.min()),
        inflated=float(bounds.mean() / truths.mean()),
        again=float(np.mean(again)) if again else None,
        callers=_by_caller(asked, exceeded),
        rolling=rolling,
    )


def _by_caller(asked: Sequence[Asked], exceeded: NDArray[np.float64]) -> tuple[float, float]:
    callers = np.array([one.request.caller for one in asked])
    fractions = [float(exceeded[callers == caller].mean()) for caller in np.unique(callers)]
    return min(fractions), max(fractions)


def _or_limit(tokens: float | None, asked: Asked) -> float:
    return float(asked.request.max_tokens) if tokens is None else tokens
