"""The load of the overload test: Poisson arrivals, lengths of Azure's chat trace, and what became of each request.

Judged by the client's own clock; requests of the warm-up and of the end are sent but not judged.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from tools.testbed.processes import completed
from tools.testbed.report import DATA, MissingError

AZURE = DATA / "traces/azure_llm_2023_conv_first_half.csv"
MAX_TOKENS = 512
VOCABULARY = (16, 8000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How the trace is made to fit the engine: prompts and answers are divided, then cut."""

    prompt_divisor: float = 4.0
    prompt_cap: int = 1000
    answer_divisor: float = 2.0
    answer_cap: int = 400

    def words(self) -> str:
        """In words."""
        return (
            f"prompts / {self.prompt_divisor:g} up to {self.prompt_cap:,} tokens, "
            f"answers / {self.answer_divisor:g} up to {self.answer_cap:,}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Slos:
    """Seconds: arrival to last token, and mean time between tokens."""

    e2e_s: float
    tbt_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run of one system. Percentiles are over served requests, goodput and shares over judged ones.

    `goodput_rps`: requests/s that met both SLOs; `met_tokens_per_s`: tokens of their answers; `attainment`: of those
    served to their end, the share that met both.
    """

    judged: int
    served: int
    goodput_rps: float
    met_tokens_per_s: float
    attainment: float
    e2e_met: float
    tbt_met: float
    accepted: float
    failed: int
    e2e_p50_s: float
    e2e_p99_s: float
    tbt_p50_s: float
    tbt_p99_s: float
    output_tokens: float
    refused_after_p50_s: float
    late_p99_s: float


@cache
def azure(lengths: Lengths) -> tuple[tuple[int, int], ...]:
    """(prompt, answer) tokens of every request of the trace. Raises MissingError if it is not here."""
    if not AZURE.is_file():
        raise MissingError("the traces (../shared/data/traces beside the checkout) are not here")
    with AZURE.open(newline="") as file:
        rows = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    return tuple(
        (
            max(2, min(lengths.prompt_cap, round(prompt / lengths.prompt_divisor))),
            max(2, min(lengths.answer_cap, round(answer / lengths.answer_divisor))),
        )
        for prompt, answer in rows
    )


def jobs(lengths: Lengths, *, rate: float, seconds: float, seed: int) -> list[dict[str, object]]:
    """A Poisson stream of requests whose lengths are drawn from the trace; prompts are random, so none is cached."""
    draw = np.random.default_rng(seed)
    count = int(rate * seconds) + 1
    times = np.cumsum(draw.exponential(1 / rate, count))
    rows = azure(lengths)
    picked = [rows[index] for index in draw.integers(0, len(rows), count)]
    return [
        {
            "at_s": float(at_s),
            "prompt": draw.integers(*VOCABULARY, prompt).tolist(),
            "output_tokens": answer,
            "max_tokens": MAX_TOKENS,
        }
        for at_s, (prompt, answer) in zip(times, picked, strict=True)
    ]


def send(url: str, load: Sequence[dict[str, object]], folder: Path, slo: Slos | None = None) -> list[dict[str, object]]:
    """Run the client over a load; one result per request, in the same order."""
    sent, found = folder / "jobs.jsonl", folder / "results.jsonl"
    sent.write_text("".join(json.dumps(job) + "\n" for job in load))
    limits = (0.0, 0.0) if slo is None else (slo.e2e_s, slo.tbt_s)
    completed([sys.executable, "-m", "tools.evaluation.overload_client", url, sent, found, *map(str, limits)])
    return [json.loads(line) for line in found.read_text().splitlines()]


def judge(results: Sequence[dict[str, object]], slo: Slos, *, from_s: float, to_s: float) -> Outcome:
    """What became of the requests that were sent between the two times."""
    window = [each for each in results if from_s <= _number(each, "at_s") < to_s]
    served = [each for each in window if each.get("done") and "last_s" in each]
    refused = [each for each in window if each["status"] in (429, 503)]
    e2e = np.array([_number(each, "last_s") for each in served])
    gaps = np.array([max(1.0, _number(each, "tokens") - 1) for each in served])
    tbt = np.array([_number(each, "last_s") - _number(each, "first_s") for each in served]) / gaps
    tokens = np.array([_number(each, "tokens") for each in served])
    in_time, in_step = e2e <= slo.e2e_s, tbt <= slo.tbt_s
    met = in_time & in_step
    return Outcome(
        judged=len(window),
        served=len(served),
        goodput_rps=float(met.sum()) / (to_s - from_s),
        met_tokens_per_s=float(tokens[met].sum()) / (to_s - from_s),
        attainment=_mean(met),
        e2e_met=_mean(in_time),
        tbt_met=_mean(in_step),
        accepted=len(served) / max(1, len(window)),
        failed=len(window) - len(served) - len(refused),
        e2e_p50_s=_percentile(e2e, 50),
        e2e_p99_s=_percentile(e2e, 99),
        tbt_p50_s=_percentile(tbt, 50),
        tbt_p99_s=_percentile(tbt, 99),
        output_tokens=_mean(tokens),
        refused_after_p50_s=_percentile(np.array([_number(each, "ended_s") for each in refused]), 50),
        late_p99_s=_percentile(np.array([_number(each, "late_s") for each in results]), 99),
    )


def _number(found: dict[str, object], name: str) -> float:
    value = found[name]
    assert isinstance(value, int | float)
    return float(value)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else 0.0


def _percentile(values: np.ndarray, part: float) -> float:
    return float(np.percentile(values, part)) if values.size else 0.0
