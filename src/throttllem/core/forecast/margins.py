"""How much of every time budget is kept free, learned from the requests that violated their SLO: at least the asked
fraction of them shall meet it, and what is kept beyond that costs energy.

Knows nothing of clocks, tables and engines: outcomes in, margins out.
"""

# The theory is adaptive conformal inference (Gibbs and Candes, NeurIPS 2021), as for the bounds of output lengths.
#
# Asked is that a fraction q of a class's requests meet their SLO; a = 1 - q may violate it. With every request that
# ends the margin moves: up by (1 - a) of a STEP after a violation, down by a of a STEP otherwise. On the mean it stands
# still where the fraction a violates, whatever the errors are: they may drift, come in bursts, or be an adversary's.
#
# How sure that is. In any n requests in a row with E violations while the margin was more than a step below the MOST,
# it rose by at least (1 - a) STEP E - a STEP (n - E), and it cannot rise by more than MOST - LEAST. So
#
#     E / n  <=  a + (MOST - LEAST) / (STEP n),
#
# here a + 10 / n: over a thousand requests one point more than asked. While the margin is above LEAST the same holds
# from below: what is allowed is used. At the MOST the clock is about the maximum, and there is nothing left to give; at
# LEAST even less margin would do, and there is no more to save.
#
# Debt. Where a shift needs a higher margin, the violations that taught it would never be made up for: the share comes
# to a from above. So violations beyond what is allowed are *owed* (up by 1 - a or down by a with every request, never
# below none), and while more than _TOLERATED are, the margin moves as if a / 2 were allowed. In n requests during which
# that is so, E is at most a n / 2 + 10, so it ends after 20 / a requests at the latest, 2,000 of them for q = 0.99.
#
# Causes. A margin that is only raised and lowered as a whole keeps for ever what one bad hour taught. So each cause has
# a part of its own, which a violation by that cause raises:
# - `model`: iterations or their order were not as projected. It is in force always.
# - `length`: the output was longer than predicted. Taken from E2E deadlines only: TBT and TTFT do not suffer.
# - `load`: other clients used the engine, or something held its GPUs down. In force only while that is so; the requests
#   that ran meanwhile are counted for this part only.
# - `admission`: the clock was at its maximum throughout, so only the requests beside it were too many. In force at
#   admission, where requests may be rejected.
# The first two are one sum, `load` and `admission` stand alone; the bound above holds for each of the three.
#
# The clocks learn only from requests during which a lower clock than the maximum was in force. The maximum violates
# some SLOs too, which no margin would have met; and that others met theirs there shows nothing about a lower one.

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

STEP = 0.05
"""How far one violation moves a margin, as a fraction of the time budget."""
LEAST, MOST = -0.15, 0.35
"""Bounds of what is learned, on top of the margin that was begun with. Below none: most outputs end before the bound
that is planned with, so a plan that ends a little late is in time.
"""
_TOLERATED = 2.0
"""Violations beyond what is allowed that are owed without consequence: by chance alone there are as many."""
_RECENT_REQUESTS = 500.0
"""Requests over which the recent attainment fades."""


class Cause(StrEnum):
    """What made a request violate its SLO; the name of its part in `ClassMargins`."""

    MODEL = "model"
    LENGTH = "length"
    LOAD = "load"
    ADMISSION = "admission"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
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
    """One SLO class: the attainment `asked`, what was learned by cause, the violations `owed`, and the requests that
    ended and met their SLO, ever and (fading) of late.
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

    def count(self, met: bool) -> None:
        """One more request ended."""
        keep = 1.0 - 1.0 / _RECENT_REQUESTS
        self.ended += 1
        self.met += met
        self.owed = max(0.0, self.owed + (not met) - (1.0 - self.asked))
        self.recent_ended = keep * self.recent_ended + 1.0
        self.recent_met = keep * self.recent_met + met

    def learn(self, outcome: Outcome, *, clocks: bool, admission: bool) -> None:
        """Move the parts that this outcome is evidence for, of those of the clocks and of admission that may learn."""
        violating = (1.0 - self.asked) / (2.0 if self.owed > _TOLERATED else 1.0)
        up, down = STEP * (1.0 - violating), STEP * violating
        cause = outcome.cause
        if admission and outcome.in_time:
            self.admission = _moved(self.admission, up if cause is Cause.ADMISSION else -down)
        if not clocks or cause is None or cause is Cause.ADMISSION:
            return
        if cause is Cause.LOAD:
            self.load = _moved(self.load, -down if outcome.met else up)
            return
        total = self.model + self.length
        moved = _moved(total, -down if outcome.met else up) - total
        if not outcome.met:
            self.length += moved if cause is Cause.LENGTH else 0.0
            self.model += moved if cause is Cause.MODEL else 0.0
            return
        # What was learned shrinks in proportion, as neither part is known to be the one that is not needed.
        length = min(self.length, -moved * self.length / total) if self.length > 0 and total > 0 else 0.0
        self.length -= length
        self.model += moved + length


def _moved(margin: float, by: float) -> float:
    return min(max(margin + by, LEAST), MOST)


@dataclass(frozen=True, slots=True, kw_only=True)
class InForce:
    """What an engine's clock must keep free: `margin` of every remaining time budget; `reserve` of each request's E2E
    SLO before its deadline. Where the reserve is used up, `spent` of the remaining time instead of `margin`.
    """

    margin: float
    reserve: float
    spent: float


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

    def ended(self, slo_class: str, asked: float, outcome: Outcome, *, learns: bool) -> None:
        """A request of a class was served to its end. `learns` False: it is counted only (a dry run shows nothing)."""
        found = self.by_class.get(slo_class)
        if found is None:
            found = self.by_class[slo_class] = ClassMargins(asked=asked)
        found.asked = asked
        found.count(outcome.met)
        if learns:
            found.learn(outcome, clocks=self.clocks, admission=self.admission)

    def of_clocks(self, classes: Iterable[str], *, margin: float, reserve: float, disturbed: bool) -> InForce:
        """What an engine with requests of these classes keeps free, having begun with `margin` and `reserve`: as much
        as the class that needs most of it.
        """
        known = [held for name in classes if (held := self.by_class.get(name)) is not None]
        pace = whole = LEAST if known else 0.0
        for held in known:
            here = held.model + (held.load if disturbed else 0.0)
            pace, whole = max(pace, here), max(whole, here + held.length)
        return InForce(
            margin=_bounded(margin + pace), reserve=_bounded(reserve + whole), spent=_bounded(margin + whole)
        )

    def of_admission(self, classes: Iterable[str], margin: float) -> float:
        """What admission keeps free of the remaining time of requests of these classes."""
        learned = [held.admission for name in classes if (held := self.by_class.get(name)) is not None]
        return max(0.0, _bounded(margin + max(learned, default=0.0)))

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
                learned=tuple((cause, getattr(held, cause.value)) for cause in Cause),
            )
            for name, held in sorted(self.by_class.items())
        )


def _bounded(margin: float) -> float:
    return min(max(margin, LEAST), 0.9)
