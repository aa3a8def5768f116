"""SLO attainment: counts over all requests that ended, and over the last few minutes. Knows no clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, fields, replace

from throttllem.core.types import Slo

RECENT_S = 300.0
_SLICE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """What a request saw, seconds. None: it had none (no first token, one token only, not streamed)."""

    queue_s: float | None = None
    ttft_s: float | None = None
    tbt_s: float | None = None
    e2e_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SloCounts:
    """SLOs of requests that ended: how many requests had one, how many met all of theirs, and violations by SLO."""

    with_slo: int = 0
    met: int = 0
    e2e_violated: int = 0
    tbt_violated: int = 0
    ttft_violated: int = 0

    @property
    def attainment(self) -> float | None:
        """The fraction that met every SLO; None while no request had one."""
        return self.met / self.with_slo if self.with_slo else None


def judged(slo: Slo, seen: Latencies, *, served: bool) -> SloCounts:
    """One request's SLOs; all zero if it had none. One that was not served met none. Of one that was served, what could
    not be seen (the tokens of an output in one piece) was neither met nor violated.
    """
    pairs = (("e2e", slo.e2e_s, seen.e2e_s), ("tbt", slo.tbt_s, seen.tbt_s), ("ttft", slo.ttft_s, seen.ttft_s))
    violated: dict[str, int] = {}
    for name, due_s, had_s in pairs:
        if due_s is not None and (not served or had_s is not None):
            violated[name] = int(not served or (had_s is not None and had_s > due_s))
    if not violated:
        return SloCounts()
    return SloCounts(
        with_slo=1,
        met=int(not any(violated.values())),
        e2e_violated=violated.get("e2e", 0),
        tbt_violated=violated.get("tbt", 0),
        ttft_violated=violated.get("ttft", 0),
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

    def ended(self, counts: SloCounts, now_s: float) -> None:
        """A request ended."""
        if not counts.with_slo:
            return
        self.ever = added(self.ever, counts)
        if self._slices and now_s - self._slices[-1][0] < _SLICE_S:
            began_s, sofar = self._slices.pop()
            self._slices.append((began_s, added(sofar, counts)))
        else:
            self._slices.append((now_s, counts))
        self._forget(now_s)

    def recent(self, now_s: float) -> SloCounts:
        """The last minutes."""
        self._forget(now_s)
        total = SloCounts()
        for _, counts in self._slices:
            total = added(total, counts)
        return total

    def _forget(self, now_s: float) -> None:
        while self._slices and now_s - self._slices[0][0] > RECENT_S:
            self._slices.popleft()
