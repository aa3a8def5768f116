"""What the predictor costs: microseconds a call, and bytes, with few groups and with all that it may have."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from throttllem.core.lengths.online import OnlineLengthOptions, OnlineLengthPredictor
from throttllem.core.types import Request
from tools.lengths.sets import Asked

_CALLS = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Median seconds of single calls; bytes of the predictor in memory (as pickled) and of its state as JSON."""

    what: str
    groups: int
    predict_s: float
    renew_s: float
    learn_s: float
    memory_bytes: int
    state_bytes: int


def costs(asked: Sequence[Asked]) -> list[Cost]:
    """One caller; and as many callers as it keeps, each with its own groups."""
    most = OnlineLengthOptions().most_groups
    one, many = OnlineLengthPredictor(), OnlineLengthPredictor()
    for at, each in enumerate(asked):
        one.learn(each.request, each.output_tokens)
        # Blocks of 20 answers: each caller opens all its groups, and the oldest of them have to go.
        for copy in range(4):
            many.learn(replace(each.request, caller=f"caller {at // 20}.{copy}"), each.output_tokens)
    requests = [each.request for each in asked[-_CALLS:]]
    return [_cost("one caller", one, requests), _cost(f"callers enough for all {most:,} groups", many, requests)]


def _cost(what: str, predictor: OnlineLengthPredictor, requests: Sequence[Request]) -> Cost:
    state = predictor.state()
    return Cost(
        what=what,
        groups=len(state["groups"]),
        memory_bytes=len(pickle.dumps(predictor)),
        state_bytes=len(json.dumps(state)),
        predict_s=_median_s(predictor.predict, requests),
        renew_s=_median_s(lambda request: predictor.renew(request, 300), requests),
        learn_s=_median_s(lambda request: predictor.learn(request, 200), requests),
    )


def _median_s(call: Callable[[Request], object], requests: Sequence[Request]) -> float:
    taken = []
    for request in requests:
        start = time.perf_counter()
        call(request)
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]
