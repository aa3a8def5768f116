"""How much of every time budget is kept free, learned from the requests that violated their SLO: at least the asked
fraction of them shall meet it, and what is kept beyond that costs energy.

Knows nothing of clocks, tables and engines: outcomes in, margins out.
"""

# Asked is that a fraction q of a class's requests meet their SLO: of those that the maximum clock would serve in time,
# since no clock is responsible for the others. So 1 - q of them, a, may violate it. What is violated beyond that is
# *owed*: up by 1 - a with a violation, down by a with every request that meets its SLO, never below none. What the
# maximum clock would have brought late too, by a replay of the requests (`hindsight`), is forgiven afterwards.
#
# While no more than TOLERATED are owed nothing is done: by chance alone there are as many. Beyond that a margin of GAIN
# for each is kept free of every time budget, up to MOST, where clocks are about at their maximum.
#
# How sure that is. Owed violations only rise where a share of more than a violates. Say a margin m would be enough that
# only a share a does, whatever the reason: a wrong model, longer outputs, another client. Then no more than
#
#     TOLERATED + m / GAIN + 1
#
# are ever owed, besides those of requests that were planned already: with m at MOST, 38. Over n requests that is a
# share of 38 / n beyond what was asked, however errors are distributed, drift or come in bursts. Where less margin is
# enough again, the debt is paid off at a for each request, and the margin shrinks with it. (A margin that rises and
# falls by a step, as in adaptive conformal inference (Gibbs and Candes, NeurIPS 2021), has the same kind of bound. It
# came back several times slower after a burst of violations: docs/decisions.md.) At MOST more debt would teach nothing
# more, so no more is counted: what a long disturbance violated is not saved up for the time after it.
#
# Causes. A margin that is only raised and lowered as a whole would keep what one bad hour taught from every budget. So
# violations are owed by cause:
# - `model`: iterations or their order were not as projected. Its margin is in force always.
# - `length`: the output was longer than predicted. Taken from E2E deadlines only: TBT and TTFT do not suffer.
# - `load`: other clients used the engine, or something held its GPUs down. In force only while that is so; the requests
#   that ran meanwhile are counted for this part only.
# - `admission`: the clock was at its maximum throughout, so only the requests beside it were too many. In force at
#   admission, where requests may be rejected.
# The first two are one debt, `load` and `admission` stand alone; the bound above holds for each of the three.
#
# The clocks learn only from requests during which a lower clock than the maximum was in force. The maximum violates
# some SLOs too, which no margin would have met; and that others met theirs there shows nothing about a lower one.

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

GAIN = 0.01
"""Fraction of every time budget that is kept free for each violation that is owed beyond those tolerated."""
MOST = 0.35
"""The largest margin that is learned, on top of the one that was begun with."""
TOLERATED = 2.0
"""Violations that are owed without consequence."""
_MOST_OWED = TOLERATED + MOST / GAIN + 1.0
_RECENT_REQUESTS = 500.0
"""Requests over which the recent attainment fades."""


class Cause(StrEnum):
    """What made a request violate its SLO; the name of its part in `ClassMargins`."""

    MODEL = "model"
    LENGTH = "length"
    LOAD = "load"
    ADMISSION = "admission"


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedRequest:
    """How a served request ended. `outgrown`: its output was longer than predicted. `disturbed`: others used its engine
    or held it down meanwhile. `slowed`: a lower clock than the maximum was in force meanwhile. `in_time`: when it was
    admitted, its SLO could be met.
    """

    met: bool
    outgrown: bool = False
    disturbed: bool = False
    slowed: bool = True
    in_time: bool = True

    @property
    def cause(self) -> Cause | None:
        """The part that this request teaches, None: it teaches nothing."""
        if not self.slowed:
            return Cause.ADMISSION if self.in_time and not self.met else None
        if self.disturbed:
            return Cause.LOAD
        return Cause.LENGTH if self.outgrown and not self.met else Cause.MODEL


@dataclass(slots=True, kw_only=True)
class ClassMargins:
    """One SLO class: the attainment `asked`; the violations owed, by cause and (whatever the cause, and at whatever
    clock) in total; and the requests that ended and met their SLO, ever and (fading) of late.
    """

    asked: float
    model: float = 0.0
    length: float = 0.0
    load: float = 0.0
    admission: float = 0.0
    owed: float = 0.0
    ended: int = 0
    met: int = 0
    recent_ended: float = 0.0
    recent_met: float = 0.0

    @property
    def allowed(self) -> float:
        """The share of requests that may violate their SLO."""
        return 1.0 - self.asked

    def count(self, met: bool) -> None:
        """One more request ended."""
        keep = 1.0 - 1.0 / _RECENT_REQUESTS
        self.ended += 1
        self.met += met
        self.owed = max(0.0, self.owed + (not met) - self.allowed)
        self.recent_ended = keep * self.recent_ended + 1.0
        self.recent_met = keep * self.recent_met + met

    def learn(self, request: EndedRequest, *, clocks: bool, admission: bool) -> None:
        """Count what is owed by the causes that this request is evidence for, of those that may learn."""
        cause = request.cause
        if admission and request.in_time:
            self.admission = _owed(self.admission, cause is Cause.ADMISSION, 1.0 - self.asked)
        if not clocks or cause is None or cause is Cause.ADMISSION:
            return
        if cause is Cause.LOAD:
            self.load = _owed(self.load, not request.met, self.allowed)
            return
        if request.met:
            self._pay(self.allowed)
            return
        total = self.model + self.length
        change = _owed(total, True, self.allowed) - total
        self.length += change if cause is Cause.LENGTH else 0.0
        self.model += change if cause is Cause.MODEL else 0.0

    def forgive(self, violations: float) -> None:
        """So many of its requests the maximum clock would have brought late too."""
        self.owed = max(0.0, self.owed - violations)
        self._pay(violations)

    def _pay(self, owed: float) -> None:
        """Off both debts of the clocks in proportion, as neither is known to be the one that is too high."""
        total = self.model + self.length
        if total > 0.0:
            kept = max(0.0, total - owed) / total
            self.model, self.length = self.model * kept, self.length * kept

    def margin(self, cause: Cause) -> float:
        """The margin for a cause."""
        match cause:
            case Cause.LOAD:
                return _margin(self.load)
            case Cause.ADMISSION:
                return _margin(self.admission)
        total = self.model + self.length
        owed = self.length if cause is Cause.LENGTH else self.model
        return _margin(total) * owed / total if total > 0.0 else 0.0


def _owed(owed: float, violated: bool, allowed: float) -> float:
    """What is owed after one more request."""
    return min(max(0.0, owed + violated - allowed), _MOST_OWED)


def _margin(owed: float) -> float:
    return min(GAIN * max(0.0, owed - TOLERATED), MOST)


@dataclass(frozen=True, slots=True, kw_only=True)
class InForce:
    """What an engine's clock must keep free: `margin` of every remaining time budget; `reserve` of each request's E2E
    SLO before its deadline. Where the reserve is used up, `spent` of the remaining time instead of `margin`. `learned`:
    what of it was learned, all causes.
    """

    margin: float
    reserve: float
    spent: float
    learned: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassAttainment:
    """One SLO class for telemetry: attainment asked and had (of late: over some 500 requests; None: no request ended),
    of the requests that were served, the violations owed beyond what is allowed, and what was learned by cause, as
    fractions of the time budget.
    """

    name: str
    asked: float
    had: float | None
    had_recently: float | None
    owed: float
    ended: int
    learned: tuple[tuple[Cause, float], ...]


@dataclass(slots=True, kw_only=True)
class Margins:
    """The margins of one controller. `clocks` and `admission`: whether those of the clocks and of admission learn."""

    clocks: bool = True
    admission: bool = False
    by_class: dict[str, ClassMargins] = field(default_factory=dict)

    def ended(self, slo_class: str, asked: float, request: EndedRequest, *, learns: bool) -> None:
        """A request of a class was served to its end. `learns` False: it is counted only (a dry run shows nothing)."""
        found = self.by_class.get(slo_class)
        if found is None:
            found = self.by_class[slo_class] = ClassMargins(asked=asked)
        found.asked = asked
        found.count(request.met)
        if learns:
            found.learn(request, clocks=self.clocks, admission=self.admission)

    def forgive(self, violations: Mapping[str, int]) -> None:
        """Requests by class that the maximum clock would have brought late."""
        for name, count in violations.items():
            if count and name in self.by_class:
                self.by_class[name].forgive(count)

    def of_clocks(self, classes: Iterable[str], *, margin: float, reserve: float, disturbed: bool) -> InForce:
        """What an engine with requests of these classes keeps free, having begun with `margin` and `reserve`: as much
        as the class that needs most of it.
        """
        pace = whole = 0.0
        for name in classes:
            held = self.by_class.get(name)
            if held is not None:
                here = held.margin(Cause.MODEL) + (held.margin(Cause.LOAD) if disturbed else 0.0)
                pace, whole = max(pace, here), max(whole, here + held.margin(Cause.LENGTH))
        return InForce(
            margin=_bounded(margin + pace),
            reserve=_bounded(reserve + whole),
            spent=_bounded(margin + whole),
            learned=whole,
        )

    def of_admission(self, classes: Iterable[str], margin: float) -> float:
        """What admission keeps free of the remaining time of requests of these classes."""
        learned = [held.margin(Cause.ADMISSION) for name in classes if (held := self.by_class.get(name)) is not None]
        return _bounded(margin + max(learned, default=0.0))

    def view(self) -> tuple[ClassAttainment, ...]:
        """All classes, for telemetry."""
        return tuple(
            ClassAttainment(
                name=name,
                asked=held.asked,
                had=held.met / held.ended if held.ended else None,
                had_recently=held.recent_met / held.recent_ended if held.recent_ended else None,
                owed=held.owed,
                ended=held.ended,
                learned=tuple((cause, held.margin(cause)) for cause in Cause),
            )
            for name, held in sorted(self.by_class.items())
        )


def _bounded(margin: float) -> float:
    return min(margin, 0.9)
