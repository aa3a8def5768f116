"""Policy names, as `simulate` and `serve` take them: what they mean for the core. Knows nothing of engines."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from throttllem.core.clocks.policy import ClockPolicy

_NAMES = ("triton", "throttllem", "least-energy", "fixed:<MHz>")
_AUTOSCALE = "+autoscale"


class PolicyError(ValueError):
    """No policy of that name; the message lists those that there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One policy: how clocks are chosen, whether promises are watched, whether engines are sized to the load."""

    name: str
    clock: ClockPolicy
    fixed_mhz: int | None
    autoscale: bool

    @property
    def slo_aware(self) -> bool:
        """Does admission control run? The baselines are first come first served."""
        return self.clock in (ClockPolicy.THROTTLLEM, ClockPolicy.LEAST_ENERGY)


def parse_policy(name: str, clocks_mhz: tuple[int, ...], sizes: tuple[int, ...]) -> Policy:
    """The policy of that name on a GPU with these clocks and engines of these sizes. Raises PolicyError."""
    base = name.strip().removesuffix(_AUTOSCALE)
    autoscale = base != name.strip()
    if autoscale and len(sizes) < 2:
        raise PolicyError(f"policy {name!r}: +autoscale chooses among sizes; give two or more with --sizes 1,2,4")
    if base.startswith("fixed:"):
        return Policy(name=name, clock=ClockPolicy.FIXED, fixed_mhz=_clock(name, base, clocks_mhz), autoscale=autoscale)
    known = [policy for policy in ClockPolicy if policy is not ClockPolicy.FIXED]
    if base not in known:
        near = difflib.get_close_matches(base, _NAMES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise PolicyError(f"unknown policy {name!r}: {hint}known are {', '.join(_NAMES)}, each also with {_AUTOSCALE}")
    return Policy(name=name, clock=ClockPolicy(base), fixed_mhz=None, autoscale=autoscale)


def _clock(name: str, base: str, clocks_mhz: tuple[int, ...]) -> int:
    text = base.removeprefix("fixed:")
    if not text.isdecimal() or int(text) not in clocks_mhz:
        low, high, step = clocks_mhz[0], clocks_mhz[-1], clocks_mhz[1] - clocks_mhz[0]
        raise PolicyError(f"policy {name!r}: {text!r} is no clock of this GPU: {low} to {high} MHz in steps of {step}")
    return int(text)
