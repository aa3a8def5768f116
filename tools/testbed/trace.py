"""A slice of a real trace, made small and slow enough for a tiny model on two cores, in the formats of the clients."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import count, islice
from pathlib import Path

from tools.testbed.report import DATA, MissingError

AZURE = DATA / "traces/azure_llm_2023_conv_first_half.csv"
CHUNK_TOKENS = 16
"""Tokens behind one hash of `vllm bench serve`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How the trace is made to fit: requests per second on average, divisors and caps of the lengths."""

    rate: float = 4.0
    prompt_divisor: float = 4.0
    prompt_cap: int = 1500
    answer_divisor: float = 2.0
    answer_cap: int = 200

    def words(self) -> str:
        """In words."""
        return (
            f"{self.rate:g} requests/s on average, prompts / {self.prompt_divisor:g} up to {self.prompt_cap:,} tokens, "
            f"answers / {self.answer_divisor:g} up to {self.answer_cap:,}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One request of the slice."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


def azure_slice(length: int, scale: Scale, *, skip: int = 0) -> list[Sent]:
    """`length` requests of Azure's chat trace. Raises MissingError if it is not here."""
    if not AZURE.is_file():
        raise MissingError("the traces (../shared/data/traces beside the checkout) are not here")
    with AZURE.open(newline="") as file:
        rows = list(islice(csv.DictReader(file), skip, skip + length))
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
    stretch = (length / scale.rate) / (times[-1] - times[0])
    return [
        Sent(
            at_s=(at - times[0]) * stretch,
            prompt_tokens=_scaled(row["ContextTokens"], scale.prompt_divisor, scale.prompt_cap),
            output_tokens=_scaled(row["GeneratedTokens"], scale.answer_divisor, scale.answer_cap),
        )
        for at, row in zip(times, rows, strict=True)
    ]


def write_timed_trace(sent: Sequence[Sent], file: Path) -> Path:
    """For `vllm bench serve --dataset-name timed_trace`: every chunk of every prompt is another, so none is cached."""
    hashes = count()
    lines = [
        _mooncake(each) | {"hash_ids": list(islice(hashes, math.ceil(each.prompt_tokens / CHUNK_TOKENS)))}
        for each in sent
    ]
    return _write_lines(lines, file)


def write_mooncake(sent: Sequence[Sent], file: Path) -> Path:
    """For `aiperf`, which makes up prompts of these lengths."""
    return _write_lines([_mooncake(each) for each in sent], file)


def write_jobs(jobs: Sequence[Mapping[str, object]], file: Path) -> Path:
    """For `openai_client.py`."""
    return _write_lines(jobs, file)


def _mooncake(sent: Sent) -> dict[str, object]:
    return {
        "timestamp": round(sent.at_s * 1000),
        "input_length": sent.prompt_tokens,
        "output_length": sent.output_tokens,
    }


def _write_lines(lines: Sequence[Mapping[str, object]], file: Path) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def _scaled(tokens: str, divisor: float, cap: int) -> int:
    return max(2, min(cap, round(int(tokens) / divisor)))
