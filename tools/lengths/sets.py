"""Recorded answers as requests in an order: two traces and two collections. Knows nothing of predictors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from throttllem.core.types import Request, Slo

EDGES = (41, 140, 293, 502, 511)
"""The longest answer of each published bucket (multi_cls_thresholds of the published predictor's preparation)."""
_EVERY_S = 0.2
_SLO = Slo()


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request, and a published predictor's bucket for its answer (None: there is no such predictor)."""

    request: Request
    bucket: int | None = None

    @property
    def output_tokens(self) -> int:
        """What it was answered with, cut at max_tokens."""
        return min(self.request.output_tokens or 1, self.request.max_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Set:
    """Requests in the order of their arrival; `in_time` False: the order and the arrivals are made up."""

    title: str
    asked: tuple[Asked, ...]
    in_time: bool


def sets(data: Path) -> list[Set]:
    """All that are compared, each with the max_tokens that its clients are taken to ask for."""
    made = []
    for title, read, limits in (
        ("Azure chat", _azure("azure_llm_2023_conv_first_half"), (1024, 4096)),
        ("Azure code", _azure("azure_llm_2023_code"), (1024, 4096)),
        ("ShareGPT", _sharegpt, (1024, 4096)),
        ("LMSYS, bucket unknown", _buckets, (512,)),
    ):
        for limit in limits:
            asked = tuple(read(data, limit))
            made.append(Set(title=f"{title}, max_tokens {limit:,}", asked=asked, in_time=title.startswith("Azure")))
    told = tuple(replace(one, request=replace(one.request, caller=str(one.bucket))) for one in made[-1].asked)
    return [*made, Set(title="LMSYS, bucket as caller, max_tokens 512", asked=told, in_time=False)]


def _azure(name: str) -> Callable[[Path, int], list[Asked]]:
    def read(data: Path, limit: int) -> list[Asked]:
        table = pl.read_csv(data / "traces" / f"{name}.csv", try_parse_dates=True)
        times = table["TIMESTAMP"]
        seconds = ((times - times[0]).dt.total_microseconds() / 1e6).to_list()
        rows = zip(seconds, table["ContextTokens"], table["GeneratedTokens"], strict=True)
        return [_asked(at, when, prompt, answer, limit) for at, (when, prompt, answer) in enumerate(rows)]

    return read


def _sharegpt(data: Path, limit: int) -> list[Asked]:
    rows = pl.read_csv(data / "lengths" / "sharegpt_v3_lengths.csv").iter_rows()
    return [_asked(at, at * _EVERY_S, prompt, answer, limit) for at, (prompt, answer) in enumerate(rows)]


def _buckets(data: Path, limit: int) -> list[Asked]:
    rows = pl.read_csv(data / "lengths" / "five_bucket_predictions.csv").iter_rows()
    return [
        replace(_asked(at, at * _EVERY_S, 0, answer, limit), bucket=bucket) for at, (answer, bucket) in enumerate(rows)
    ]


def _asked(number: int, arrival_s: float, prompt: int, answer: int, limit: int) -> Asked:
    request = Request(
        id=number, arrival_s=arrival_s, prompt_tokens=prompt, max_tokens=limit, slo=_SLO, output_tokens=answer
    )
    return Asked(request=request)
