"""Roles of the soak with a keeper that is broken in one way: the name in `SABOTAGE` (`fork_server` imports this)."""

import os

from throttllem.gpu.clock_range import ClockRange
from throttllem.gpu.locks import LockableGpu
from throttllem.keeper import journal, leases, server
from tools.soak import roles
from tools.soak.other_user import NOBODY


def no_journal():
    """Nothing is written down before a GPU is locked."""
    journal.Journal.write = lambda self, baselines: None


def no_end():
    """A client that disconnects keeps its lease."""
    real = leases.Leases.end
    leases.Leases.end = lambda self, lease, why: None if "disconnected" in why else real(self, lease, why)


def no_undo():
    """A group of which one GPU fails stays as far as it came."""
    real = leases.Leases.end
    leases.Leases.end = lambda self, lease, why: None if "was not set" in why else real(self, lease, why)


def infers():
    """A lock that was there before, and that no option states, is restored."""
    real = LockableGpu.restore
    LockableGpu.restore = lambda self, baseline: real(self, baseline or ClockRange(855, 855))


def all_users():
    """Every user is served."""
    real = server.Server.__init__
    server.Server.__init__ = lambda self, leases, uids, *more: real(self, leases, frozenset({*uids, NOBODY}), *more)


def sound():
    """The keeper as it is."""


globals()[os.environ["SABOTAGE"]]()
ROLES = roles.ROLES
