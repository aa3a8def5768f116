"""Requests with outputs of known lengths, for the length predictor."""

import math
import random

from throttllem.core.lengths.online import OnlineLengthPredictor
from throttllem.core.types import Request, Slo

NO_SLO = Slo()


def request(
    number: int, *, prompt: int = 500, limit: int = 4096, caller: str = "", model: str = "m", truth: int | None = None
) -> Request:
    return Request(
        id=number, arrival_s=0.0, prompt_tokens=prompt, max_tokens=limit, slo=NO_SLO, caller=caller, model=model,
        output_tokens=truth,
    )  # fmt: skip


def median(predictor: OnlineLengthPredictor, arrived: Request) -> float | None:
    """The expected tokens, None where it does not know."""
    found = predictor.predict(arrived)
    return None if found is None else found.expected_tokens


def bound(predictor: OnlineLengthPredictor, arrived: Request) -> float | None:
    """The bound, None where it is max_tokens."""
    found = predictor.predict(arrived)
    if found is None or found.bound_tokens is None or found.bound_tokens >= arrived.max_tokens:
        return None
    return found.bound_tokens


def serve(predictor: OnlineLengthPredictor, requests: list[Request], lag: int = 0) -> list[bool]:
    """Predict each request on arrival, learn it `lag` arrivals later; whether each output exceeded its bound."""
    exceeded = []
    for place, arrived in enumerate(requests):
        assert arrived.output_tokens is not None
        exceeded.append(arrived.output_tokens > (bound(predictor, arrived) or arrived.max_tokens))
        if place >= lag:
            done = requests[place - lag]
            predictor.learn(done, done.output_tokens or 0)
    return exceeded


def outputs(count: int, median: float, seed: int, **rest: object) -> list[Request]:
    """Requests whose outputs are lognormal, cut at max_tokens."""
    draw, made = random.Random(seed), []
    for number in range(count):
        plain = request(number + 1_000_000 * seed, **rest)  # type: ignore[arg-type]
        length = max(1, min(plain.max_tokens, round(median * math.exp(0.6 * draw.gauss(0, 1)))))
        made.append(request(plain.id, **rest, truth=length))  # type: ignore[arg-type]
    return made


def worst(exceeded: list[bool], window: int) -> float:
    return max(sum(exceeded[at : at + window]) for at in range(len(exceeded) - window + 1)) / window
