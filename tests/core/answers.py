"""Requests with answers of known lengths, for the length predictor."""

import math
import random

from throttllem.core.lengths.online import OnlineLengthPredictor
from throttllem.core.types import Request, Slo

PROMISE = Slo()


def request(
    number: int, *, prompt: int = 500, limit: int = 4096, caller: str = "", model: str = "m", truth: int | None = None
) -> Request:
    return Request(
        id=number, arrival_s=0.0, prompt_tokens=prompt, max_tokens=limit, slo=PROMISE, caller=caller, model=model,
        output_tokens=truth,
    )  # fmt: skip


def serve(predictor: OnlineLengthPredictor, requests: list[Request], lag: int = 0) -> list[bool]:
    """Bounds each request on arrival, learns it `lag` arrivals later; whether each answer exceeded its bound."""
    missed = []
    for place, arrived in enumerate(requests):
        assert arrived.output_tokens is not None
        bound = predictor.bound(arrived)
        missed.append(arrived.output_tokens > (arrived.max_tokens if bound is None else bound))
        if place >= lag:
            done = requests[place - lag]
            predictor.learn(done, done.output_tokens or 0)
    return missed


def answers(count: int, median: float, seed: int, **rest: object) -> list[Request]:
    """Requests whose answers are lognormal, cut at max_tokens."""
    draw, made = random.Random(seed), []
    for number in range(count):
        plain = request(number + 1_000_000 * seed, **rest)  # type: ignore[arg-type]
        length = max(1, min(plain.max_tokens, round(median * math.exp(0.6 * draw.gauss(0, 1)))))
        made.append(request(plain.id, **rest, truth=length))  # type: ignore[arg-type]
    return made


def worst(missed: list[bool], window: int) -> float:
    return max(sum(missed[at : at + window]) for at in range(len(missed) - window + 1)) / window
