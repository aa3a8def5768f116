"""Shifts in a simulated run, at given times: a slower engine, GPUs whose clock is limited, external load, and requests
that come faster or get longer.

Knows nothing of policies, nor of how a run ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from throttllem.core.types import Request
from throttllem.engines.simulated.engine import Physics

REPORT_S = 0.5
"""How often an engine reports its load while it has, or just had, other clients."""
_REPORTS_AFTERWARDS = 4
"""Reports after another client has left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """From `at_s` on every iteration takes `factor` times as long: a driver, a hot room, another engine version."""

    at_s: float
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockLimit:
    """From `at_s` on the GPUs do not exceed `mhz` (None: no limit): a power cap, heat."""

    at_s: float
    mhz: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherClient:
    """From `at_s` on the engine decodes `sequences` of another client beside ours, each with `context_tokens`."""

    at_s: float
    sequences: int
    context_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """The engine reports its running and waiting requests and its KV blocks, those of the other client too."""

    at_s: float


Shift = Pace | ClockLimit | OtherClient | LoadReport


@dataclass(slots=True, kw_only=True)
class ShiftedPhysics(Physics):
    """An engine that takes `pace` times as long as `plain` says, and decodes `sequences` of another client beside ours,
    with `kv_tokens` together; these take no place from ours.
    """

    plain: Physics
    pace: float = 1.0
    sequences: int = 0
    kv_tokens: int = 0

    def iteration(
        self, clock_mhz: float, decode_batch: int, kv_tokens: int, prefill_tokens: int, prefill_pairs: float
    ) -> tuple[float, float]:
        """Seconds and watts of one iteration, with what the other client adds to it."""
        batch, kv = decode_batch + self.sequences, kv_tokens + self.kv_tokens
        seconds, watts = self.plain.iteration(clock_mhz, batch, kv, prefill_tokens, prefill_pairs)
        return seconds * self.pace, watts

    def idle_w(self) -> float:
        """Watts while nothing of ours runs."""
        return self.plain.idle_w()

    @property
    def as_plain(self) -> bool:
        """Whether nothing is shifted now."""
        return self.pace == 1.0 and not self.sequences


def held_down(at_s: float, until_s: float, mhz: int) -> tuple[Shift, ...]:
    """A clock limit of the GPUs between two times."""
    return ClockLimit(at_s=at_s, mhz=mhz), ClockLimit(at_s=until_s, mhz=None)


def other_client(at_s: float, until_s: float, sequences: int, context_tokens: int) -> tuple[Shift, ...]:
    """Another client between two times, with the engine's reports that show it."""
    reports = int((until_s - at_s) / REPORT_S) + _REPORTS_AFTERWARDS
    return (
        OtherClient(at_s=at_s, sequences=sequences, context_tokens=context_tokens),
        OtherClient(at_s=until_s, sequences=0, context_tokens=0),
        *(LoadReport(at_s=at_s + REPORT_S * (number + 1)) for number in range(reports)),
    )


def faster(requests: Iterable[Request], at_s: float, factor: float) -> Iterator[Request]:
    """The same requests, from `at_s` on at `factor` times the rate."""
    for request in requests:
        late_s = request.arrival_s - at_s
        yield replace(request, arrival_s=at_s + late_s / factor) if late_s > 0 else request


def longer(requests: Iterable[Request], at_s: float, factor: float) -> Iterator[Request]:
    """The same requests, those that arrive from `at_s` on with outputs `factor` times as long, within their limit."""
    for request in requests:
        if request.arrival_s < at_s or request.output_tokens is None:
            yield request
            continue
        tokens = min(max(1, round(request.output_tokens * factor)), request.max_tokens)
        yield replace(request, output_tokens=tokens)
