"""Which engine size next? (the paper's autoscaler, part 6 of its system)

About every 10 s the measured request rate picks the smallest size whose characterised maximum load covers it. Upsizing
is allowed at once; downsizing only when the grace period after a change is over, and to a size that would have carried
the busiest moment of it. Knows nothing of engines: it returns a size, the controller does the shadow instancing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from throttllem.core.types import check


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscaleOptions:
    """When an engine of another size takes over (policies with `+autoscale`), where the paper leaves it open.

    `least-energy+autoscale` weighs energy and risk, by `slo.attainment` and `day_s`. Other policies take the paper's
    rule, by `capacity_rps`, `window_s`, `grace_s` and `headroom`; so does this one where a size has no performance
    table.
    """

    capacity_rps: Mapping[int, float] = field(default_factory=dict)
    """Maximum load of each size, by tensor parallel degree; `throttllem characterize` finds it."""
    interval_s: float = 10.0
    """Time between two measurements of the request rate."""
    window_s: float = 30.0
    """Length of the sliding window over which the rate is measured."""
    grace_s: float = 300.0
    """Time after the start and after every change before a smaller size is taken; that size must cover every rate
    measured in it."""
    headroom: float = 0.9
    """Fraction of its maximum load that a size covers (1: the paper)."""
    day_s: float = 86400.0
    """Time after which the request rate is taken to repeat itself; its course over this time is learned."""

    def __post_init__(self) -> None:
        check("autoscale", interval_s=(self.interval_s, 0.01, 3600), window_s=(self.window_s, 0.01, 86400))
        check("autoscale", grace_s=(self.grace_s, 0, 86400), headroom=(self.headroom, 0.01, 10))
        check("autoscale", day_s=(self.day_s, 600, 31622400))


@dataclass(slots=True, kw_only=True)
class Autoscaler:
    """Measures the request rate, and picks the size that it calls for.

    `arrivals` of the window: when, and how many sequences; `counted` is their sum. `rates` of the grace period: when
    measured, requests per second. `first_s` is the first arrival, `changed_s` the last change of size.
    """

    options: AutoscaleOptions
    arrivals: deque[tuple[float, int]] = field(default_factory=deque)
    counted: int = 0
    rates: deque[tuple[float, float]] = field(default_factory=deque)
    first_s: float | None = None
    changed_s: float | None = None

    def arrived(self, now_s: float, sequences: int = 1) -> None:
        """Count one request by the `sequences` that it runs, as one if it was rejected. O(1) amortised."""
        if self.first_s is None:
            self.first_s = self.changed_s = now_s
        self.arrivals.append((now_s, sequences))
        self.counted += sequences
        self._forget(now_s)

    def rate_rps(self, now_s: float) -> float:
        """Requests per second over the window (over the time seen, while that is shorter)."""
        self._forget(now_s)
        seen_s = 0.0 if self.first_s is None else now_s - self.first_s
        return self.counted / max(min(self.options.window_s, seen_s), self.options.interval_s)

    def changed(self, now_s: float) -> None:
        """A change of size was completed: the grace period begins."""
        self.changed_s = now_s

    def wanted(self, now_s: float, current_tp: int) -> int:
        """The size to run from now on; `current_tp` while nothing is to be done. To be called every interval."""
        rate = self.rate_rps(now_s)
        self.rates.append((now_s, rate))
        while self.rates[0][0] <= now_s - self.options.grace_s:
            self.rates.popleft()
        target = self._covering(rate)
        if target >= current_tp:
            return target
        if self.changed_s is None or now_s - self.changed_s < self.options.grace_s:
            return current_tp
        return min(current_tp, self._covering(max(past for _, past in self.rates)))

    def wanted_engines(self, now_s: float, current: Mapping[int, int], gpus: int) -> dict[int, int]:
        """The same for a pool of `gpus`: as many of the largest size as the rate fills, and the smallest size that
        covers the rest. To be called every interval.
        """
        capacity = self.options.capacity_rps

        def holds_rps(engines: Mapping[int, int]) -> float:
            return sum(capacity[tp] * count for tp, count in engines.items())

        rate = self.rate_rps(now_s)
        self.rates.append((now_s, rate))
        while self.rates[0][0] <= now_s - self.options.grace_s:
            self.rates.popleft()
        present, target = holds_rps(current), self._engines_covering(rate, gpus)
        if holds_rps(target) >= present:
            return target
        if self.changed_s is None or now_s - self.changed_s < self.options.grace_s:
            return dict(current)
        busiest = self._engines_covering(max(past for _, past in self.rates), gpus)
        return busiest if holds_rps(busiest) < present else dict(current)

    def _engines_covering(self, rate: float, gpus: int) -> dict[int, int]:
        """The fewest of the largest size, and one for the rest, that cover a rate, as far as they fit."""
        covers = {tp: rps * self.options.headroom for tp, rps in self.options.capacity_rps.items() if tp <= gpus}
        largest = max(covers)
        most = gpus // largest
        whole = min(most, int(rate // covers[largest])) if covers[largest] else most
        engines = {largest: whole} if whole else {}
        rest, free = rate - whole * covers[largest], gpus - whole * largest
        fitting = [tp for tp in sorted(covers) if tp <= free]
        if fitting and (rest > 0.0 or not whole):
            tp = next((tp for tp in fitting if rest <= covers[tp]), fitting[-1])
            engines[tp] = engines.get(tp, 0) + 1
        return engines

    def _covering(self, rate: float) -> int:
        """The smallest size that covers a rate, the largest if none does."""
        capacity = self.options.capacity_rps
        sizes = sorted(capacity)
        return next((tp for tp in sizes if rate <= capacity[tp] * self.options.headroom), sizes[-1])

    def _forget(self, now_s: float) -> None:
        while self.arrivals and self.arrivals[0][0] <= now_s - self.options.window_s:
            self.counted -= self.arrivals.popleft()[1]
