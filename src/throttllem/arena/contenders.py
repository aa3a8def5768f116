"""Who takes part: policies by name, and rivals with the values that hindsight may choose from.

Knows nothing of cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from throttllem.arena.rivals.agft import Agft
from throttllem.arena.rivals.biscale import BiScale
from throttllem.arena.rivals.dynamo_llm import DynamoLlm
from throttllem.arena.rivals.eco_freq import EcoFreq
from throttllem.arena.rivals.green_llm import GreenLlm
from throttllem.arena.rivals.power_cap import PowerCap
from throttllem.core.clocks.own_policy import OwnPolicy
from throttllem.core.clocks.policy import ClockPolicy, Policy
from throttllem.did_you_mean import did_you_mean
from throttllem.sim.own_policy import GATHER

BASELINE = "triton"
OURS = "least-energy"
GATHERING = OURS + GATHER
"""The same where every request may be held."""
STATIC = "static"
YESTERDAY = "static-yesterday"
BEFOREHAND = "-beforehand"
SCHED = "sched"
"""The clairvoyant's schedule of clocks."""
SCHED_HOLD = "sched+hold"
"""The same, when it may also hold requests back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """A policy of a paper with one parameter: `values` are tried in every cell, `beforehand` is the best of them on the
    tuning grid (`throttllem arena --grid tuning` prints it). There every value loses more than half a point of
    attainment on the mean, most of it with code, so it is the value that comes closest.
    """

    name: str
    make: Callable[..., OwnPolicy]
    parameter: str
    values: tuple[float, ...]
    beforehand: float

    def policy(self, value: float) -> Policy:
        """The policy with that value."""
        own = partial(self.make, **{self.parameter: value})
        name = f"{self.name}({self.parameter}={value:g})"
        return Policy(name=name, clock=ClockPolicy.TOP, fixed_mhz=None, autoscale=False, own=own)


RIVALS = (
    Rival(name="power-cap", make=PowerCap, parameter="share", values=(0.42, 0.55, 0.7), beforehand=0.7),
    Rival(name="eco-freq", make=EcoFreq, parameter="share", values=(0.1, 0.14, 0.2), beforehand=0.1),
    Rival(name="green-llm", make=GreenLlm, parameter="share", values=(0.15, 0.22, 0.3), beforehand=0.15),
    Rival(name="dynamo-llm", make=DynamoLlm, parameter="headroom", values=(1.4, 2.2, 3.2), beforehand=3.2),
    Rival(name="agft", make=Agft, parameter="delay_weight", values=(0.2, 0.4, 0.8), beforehand=0.2),
    Rival(name="biscale", make=BiScale, parameter="share", values=(0.16, 0.22, 0.3), beforehand=0.16),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """The contenders of one arena, in the order of the tables. The baseline always runs."""

    names: tuple[str, ...]

    @property
    def rivals(self) -> tuple[Rival, ...]:
        """Rivals of which a row is wanted."""
        return tuple(rival for rival in RIVALS if {rival.name, rival.name + BEFOREHAND} & set(self.names))

    @property
    def static(self) -> bool:
        """Whether static clocks are searched."""
        return bool({STATIC, YESTERDAY} & set(self.names))

    @property
    def clairvoyant(self) -> bool:
        """Whether the clairvoyant search runs."""
        return bool({SCHED, SCHED_HOLD} & set(self.names))

    @property
    def plain(self) -> tuple[str, ...]:
        """Policies that run once, by the names that `simulate --policy` knows."""
        own = {STATIC, YESTERDAY, BASELINE, SCHED, SCHED_HOLD}
        own |= {rival.name for rival in RIVALS} | {rival.name + BEFOREHAND for rival in RIVALS}
        return tuple(name for name in self.names if name not in own)


KNOWN = (
    *(OURS, GATHERING, "throttllem", STATIC, YESTERDAY),
    *(rival.name for rival in RIVALS),
    *(rival.name + BEFOREHAND for rival in RIVALS),
    *(SCHED, SCHED_HOLD),
)
"""The rows of an arena without `--policies`."""


def field_of(names: str | None, check: Callable[[str], object]) -> Field:
    """The contenders of `--policies A,B`; all known ones without. `check` raises for a name that `simulate` does not
    know. Raises ValueError.
    """
    if names is None:
        return Field(names=(BASELINE, *KNOWN))
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise ValueError(f"--policies {names}: name one or more, as in least-energy,static,eco-freq")
    for name in wanted:
        if name not in KNOWN and name != BASELINE:
            try:
                check(name)
            except ValueError as error:
                hint = did_you_mean(name, KNOWN)
                raise ValueError(f"--policies {name}: {hint} ({error})") from error
    return Field(names=tuple(dict.fromkeys((BASELINE, *wanted))))
