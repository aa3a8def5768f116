"""Policies of a simulation by their names: those of the core, with `+gather` too, and classes of the public interface
as `package.module:Class`.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from throttllem.core.clocks.own_policy import OwnPolicy, OwnPolicyError
from throttllem.core.clocks.policy import ClockPolicy, Policy, PolicyError, parse_policy

GATHER = "+gather"
_CLASS = re.compile(r"(?!fixed:)([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")


def named_policy(name: str, clocks_mhz: tuple[int, ...], sizes: tuple[int, ...]) -> Policy:
    """The policy of that name on a GPU with these clocks and engines of these sizes. Raises PolicyError.

    A class is looked for in the working folder too. Its policy admits requests first come, first served.
    """
    if name.endswith(GATHER):
        base = parse_policy(name.removesuffix(GATHER), clocks_mhz, sizes)
        if base.clock is not ClockPolicy.LEAST_ENERGY:
            raise PolicyError(f"policy {name!r}: {base.clock} holds no request; {GATHER} goes with least-energy")
        return replace(base, name=name, gathers=True)
    match = _CLASS.fullmatch(name)
    if match is None:
        return parse_policy(name, clocks_mhz, sizes)
    own = _load(name, *match.groups())
    return Policy(name=name, clock=ClockPolicy.TOP, fixed_mhz=None, autoscale=False, own=own)


def check_name(name: str) -> None:
    """Raise PolicyError for a name that is no policy of some GPU."""
    if not name.startswith("fixed:"):
        named_policy(name, (0, 1), (1, 2))


def made(policy: Policy) -> OwnPolicy | None:
    """A new instance of a policy's own class; None for a policy of the core. Raises OwnPolicyError."""
    if policy.own is None:
        return None
    try:
        return policy.own()
    except (Exception, SystemExit) as error:
        raise OwnPolicyError(
            f"policy {policy.name}: the class cannot be made without arguments: {error!r}; give every parameter of "
            "__init__ a default"
        ) from error


def _load(name: str, module: str, attribute: str) -> Callable[[], OwnPolicy]:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise PolicyError(
            f"policy {name!r}: there is no module {error.name}; it is looked for in {folder} and among the packages "
            "that are installed"
        ) from error
    except (Exception, SystemExit) as error:  # sys.exit() would end the command as if it were done
        raise PolicyError(f"policy {name!r}: importing {module} failed: {error!r}") from error
    if not isinstance(found, type) or not callable(getattr(found, "clock_mhz", None)):
        raise PolicyError(f"policy {name!r}: {module} has no class {attribute} with a method clock_mhz(self, view)")
    return found
