"""Were the promises kept? Counts over all requests that ended, and over the last few minutes. Knows no clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, fields, replace

from throttllem.core.types import Slo
from throttllem.gateway.telemetry.status import SloCounts

RECENT_S = 300.0
_SLICE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """What a request saw, seconds. None: it had none (no first token, one token only, not streamed)."""

    queue_s: float | None = None
    ttft_s: float | None = None
    tbt_s: float | None = None
    e2e_s: float | None = None


def judged(slo: Slo, seen: Latencies, *, served: bool) -> SloCounts:
    """One request's promises; all zero if it had none. One that was not served kept nothing; of one that was, what
    could not be seen (the tokens of an answer in one piece) was neither kept nor missed.
    """
    pairs = (("e2e", slo.e2e_s, seen.e2e_s), ("tbt", slo.tbt_s, seen.tbt_s), ("ttft", slo.ttft_s, seen.ttft_s))
    missed: dict[str, int] = {}
    for name, due_s, had_s in pairs:
        if due_s is not None and (not served or had_s is not None):
            missed[name] = int(not served or (had_s is not None and had_s > due_s))
    if not missed:
        return SloCounts()
    return SloCounts(
        promised=1,
        kept=int(not any(missed.values())),
        e2e_missed=missed.get("e2e", 0),
        tbt_missed=missed.get("tbt", 0),
        ttft_missed=missed.get("ttft", 0),
    )


def added(one: SloCounts, other: SloCounts) -> SloCounts:
    """The sum of two counts."""
    return replace(
        one, **{item.name: getattr(one, item.name) + getattr(other, item.name) for item in fields(SloCounts)}
    )


@dataclass(slots=True)
class SloAttainment:
    """Counts since the start, and in slices of a few seconds over the last minutes."""

    ever: SloCounts = field(default_factory=SloCounts)
    _slices: deque[tuple[float, SloCounts]] = field(default_factory=deque)

    def ended(self, kept: SloCounts, now_s: float) -> None:
        """A request ended."""
        if not kept.promised:
            return
        self.ever = added(self.ever, kept)
        if self._slices and now_s - self._slices[-1][0] < _SLICE_S:
            began_s, sofar = self._slices.pop()
            self._slices.append((began_s, added(sofar, kept)))
        else:
            self._slices.append((now_s, kept))
        self._forget(now_s)

    def recent(self, now_s: float) -> SloCounts:
        """The last minutes."""
        self._forget(now_s)
        total = SloCounts()
        for _, kept in self._slices:
            total = added(total, kept)
        return total

    def _forget(self, now_s: float) -> None:
        while self._slices and now_s - self._slices[0][0] > RECENT_S:
            self._slices.popleft()
