"""The client: aiperf replays the load on its fixed schedule. What became of each request, by its own export alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.evaluation.known_clients import run_aiperf
from tools.evaluation.trace import Sent, write_mooncake

EXPORT, SUMMARY = "profile_export.jsonl", "profile_export_aiperf.json"
ENERGY = "nvidia_total_gpu_energy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One request that was answered: when it was sent (seconds since 1970), tokens, seconds to the first and the last.

    `itl_s`: mean between tokens; None for an answer of one token.
    """

    sent_s: float
    prompt_tokens: int
    tokens: int
    ttft_s: float
    e2e_s: float
    itl_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """One replay: its answered requests, and the joules that aiperf itself read from the GPU (None: it told none)."""

    answered: tuple[Answered, ...]
    energy_j: float | None


def replay(clients: Path, url: str, sent: Sequence[Sent], tokenizer: Path, folder: Path) -> Replayed:
    """Send the load. Raises ClientError."""
    folder.mkdir(parents=True, exist_ok=True)
    trace = write_mooncake(sent, folder / "trace.jsonl")
    telemetry = ("--gpu-telemetry", "pynvml")
    run_aiperf(clients, url, trace, tokenizer, requests=len(sent), folder=folder, telemetry=telemetry)
    summary = json.loads((folder / SUMMARY).read_text())
    with (folder / EXPORT).open() as lines:
        answered = tuple(_answered(line) for line in map(json.loads, lines) if not line.get("error"))
    return Replayed(answered=answered, energy_j=summary.get(ENERGY, {}).get("avg"))


def _answered(line: dict[str, Any]) -> Answered:
    metrics = line["metrics"]
    itl = metrics.get("inter_token_latency")
    return Answered(
        sent_s=line["metadata"]["request_start_ns"] / 1e9,
        prompt_tokens=metrics["usage_prompt_tokens"]["value"],
        tokens=metrics["usage_completion_tokens"]["value"],
        ttft_s=metrics["time_to_first_token"]["value"] / 1e3,
        e2e_s=metrics["request_latency"]["value"] / 1e3,
        itl_s=None if itl is None else itl["value"] / 1e3,
    )


def kept(answered: Iterable[Answered], e2e_s: float, tbt_s: float) -> int:
    """How many kept both promises."""
    return sum(one.e2e_s <= e2e_s and (one.itl_s is None or one.itl_s <= tbt_s) for one in answered)
