"""What a run wrote down: the client's export, the meter's lines, the engine's steps, the gateway's metrics.

Knows nothing of what follows from them. Times are seconds since 1970.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from throttllem.engines.capacity import samples, total
from tools.testbed.engines.vllm_pace import Step
from tools.testbed.known_clients import run_aiperf
from tools.testbed.trace import Sent, write_mooncake

Floats = NDArray[np.float64]
EXPORT, SUMMARY = "profile_export.jsonl", "profile_export_aiperf.json"
ENERGY = "nvidia_total_gpu_energy"
TIMEOUT_S = 10.0


# ---- the client ----------------------------------------------------------------------------------------------


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
    """One replay: its answered requests, and the joules that aiperf itself read from the GPU (None: none were read)."""

    answered: tuple[Answered, ...]
    energy_j: float | None


def replay(
    clients: Path, url: str, sent: Sequence[Sent], tokenizer: Path, folder: Path, machine: Mapping[str, str]
) -> Replayed:
    """Send the load. Raises ProcessError."""
    folder.mkdir(parents=True, exist_ok=True)
    trace = write_mooncake(sent, folder / "trace.jsonl")
    telemetry = ("--gpu-telemetry", "pynvml")
    run_aiperf(
        clients, url, trace, tokenizer, requests=len(sent), folder=folder, telemetry=telemetry, environment=machine
    )
    summary = json.loads((folder / SUMMARY).read_text())
    with (folder / EXPORT).open() as lines:
        answered = tuple(parsed(line) for line in map(json.loads, lines) if not line.get("error"))
    return Replayed(answered=answered, energy_j=summary.get(ENERGY, {}).get("avg"))


def parsed(line: dict[str, Any]) -> Answered:
    """One request of the export."""
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


# ---- meter and steps -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """A GPU over time: joules of its counter, MHz, processor seconds of gateway and keeper."""

    at_s: Floats
    energy_j: Floats
    clock_mhz: Floats
    gateway_s: Floats
    keeper_s: Floats

    @classmethod
    def read(cls, file: Path) -> Meter:
        """What `meter` wrote; a last line that was cut off is left out."""
        lines = [line.split(",") for line in file.read_text().split("\n")[:-1]]
        at_s, energy_j, _, clock_mhz, gateway_s, keeper_s = np.array(lines, dtype=np.float64).T
        return cls(at_s=at_s, energy_j=energy_j, clock_mhz=clock_mhz, gateway_s=gateway_s, keeper_s=keeper_s)

    def joules(self, from_s: float, to_s: float) -> float:
        """Between two times."""
        return _between(self.at_s, self.energy_j, from_s, to_s)

    def share(self, used_s: Floats, from_s: float, to_s: float) -> float:
        """Of one core, by one of the processes."""
        return _between(self.at_s, used_s, from_s, to_s) / (to_s - from_s)

    def clocks(self, from_s: float, to_s: float) -> set[int]:
        """All that were seen."""
        return set(self.clock_mhz[(self.at_s >= from_s) & (self.at_s <= to_s)].astype(int).tolist())

    def watts(self, edges_s: Floats, spread_s: float) -> Floats:
        """In the middle between each two of these times, mean over `spread_s` around it."""
        middle_s = (edges_s[1:] + edges_s[:-1]) / 2
        ends_j = [np.interp(middle_s + side * spread_s / 2, self.at_s, self.energy_j) for side in (-1, 1)]
        ends_s = [np.clip(middle_s + side * spread_s / 2, self.at_s[0], self.at_s[-1]) for side in (-1, 1)]
        return (ends_j[1] - ends_j[0]) / (ends_s[1] - ends_s[0])


def _between(at_s: Floats, counter: Floats, from_s: float, to_s: float) -> float:
    first, last = np.interp((from_s, to_s), at_s, counter)
    return float(last - first)


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The engine's steps in order, one entry each (`hook.Step`); `began_s` and `ended_s` since 1970."""

    began_s: Floats
    ended_s: Floats
    waited_s: Floats
    real_s: Floats
    over: Floats
    clock_mhz: Floats
    rows: Floats
    prefill_tokens: Floats
    joules: Floats

    @classmethod
    def read(cls, file: Path, epoch_s: float) -> Steps:
        """What the hook wrote, whose clock stood at 0 at `epoch_s`."""
        lines = [line.split(",") for line in file.read_text().split("\n")[:-1]]
        columns = dict(zip(Step._fields, np.array(lines, dtype=np.float64).T, strict=True))
        ended_s = columns["ended_s"] + epoch_s
        return cls(
            began_s=ended_s - columns["seconds"],
            ended_s=ended_s,
            waited_s=columns["waited_s"],
            real_s=columns["real_s"],
            over=columns["over"],
            clock_mhz=columns["clock_mhz"],
            rows=columns["decode_sequences"],
            prefill_tokens=columns["prefill_tokens"],
            joules=columns["joules"],
        )

    def between(self, from_s: float, to_s: float) -> Steps:
        """Those that ended in that time."""
        inside = (self.ended_s >= from_s) & (self.ended_s <= to_s)
        return Steps(**{name: getattr(self, name)[inside] for name in self.__slots__})

    @property
    def seconds(self) -> Floats:
        """How long each lasted."""
        return self.ended_s - self.began_s

    def mean_clock_mhz(self) -> float:
        """Over the time that steps took."""
        return float(np.average(self.clock_mhz, weights=self.seconds)) if self.clock_mhz.size else float("nan")

    def series(self, values: Floats, edges_s: Floats) -> Floats:
        """Mean of a value over the time that steps took, between each two of these times; NaN where none ran."""
        place = np.searchsorted(edges_s, self.ended_s) - 1
        inside = (place >= 0) & (place < edges_s.size - 1)
        weights = np.bincount(place[inside], self.seconds[inside], edges_s.size - 1)
        sums = np.bincount(place[inside], (self.seconds * values)[inside], edges_s.size - 1)
        means: Floats = np.divide(sums, weights, out=np.full(sums.size, np.nan), where=weights > 0)
        return means


def percentile(values: Sequence[float], part: float) -> float:
    """NaN where there is nothing."""
    return float(np.percentile(values, part)) if len(values) else float("nan")


# ---- the gateway's metrics -----------------------------------------------------------------------------------


def page(url: str) -> bytes:
    """The gateway's metrics as they are now."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=TIMEOUT_S) as answer:
        found: bytes = answer.read()
    return found


def gauge(page_of: bytes, name: str) -> float | None:
    """None: it has no sample."""
    return total(page_of, name)


def count(before: bytes, after: bytes, name: str) -> int:
    """What a histogram observed between the two."""
    return round((total(after, f"{name}_count") or 0.0) - (total(before, f"{name}_count") or 0.0))


def quantile(before: bytes, after: bytes, name: str, share: float) -> float | None:
    """Of what a histogram observed between the two, straight within a bucket; None: nothing.

    In the last bucket, which has no end, its beginning.
    """
    old, buckets = dict(_buckets(before, name)), _buckets(after, name)
    grown = [(edge, seen - old.get(edge, 0.0)) for edge, seen in buckets]
    if not grown or grown[-1][1] <= 0:
        return None
    wanted, low, below = share * grown[-1][1], 0.0, 0.0
    for edge, seen in grown:
        if seen >= wanted:
            return low if edge == float("inf") else low + (edge - low) * (wanted - below) / (seen - below)
        low, below = edge, seen
    raise ValueError(f"{name}: its buckets do not add up")


def _buckets(page_of: bytes, name: str) -> list[tuple[float, float]]:
    """(upper edge, observations up to it) over all label sets, ascending."""
    found: dict[float, float] = {}
    for sample in samples(page_of, f"{name}_bucket"):
        edge = float(sample.labels["le"])
        found[edge] = found.get(edge, 0.0) + sample.value
    return sorted(found.items())
