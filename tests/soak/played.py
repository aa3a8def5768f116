"""Plays schedules in a process of its own, as `python -m tools.soak` does: tests have threads, and cannot be forked.

`python -m tests.soak.played LIBRARY SABOTAGE:SCHEDULE...`, all side by side; one line of figures for each.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"

from throttllem.gpu.clock_range import ClockRange
from throttllem.gpu.locks import LockableGpu
from throttllem.keeper import journal, leases, server
from tools.soak.draw import drawn
from tools.soak.schedule import Fault, GpuPlan, Stop
from tools.soak.stage import stage
from tools.soak.stranger_process import NOBODY

OPTED = GpuPlan(allowed=(510, 1200), held=True, before=None, declared=False)
UNDECLARED = replace(OPTED, before=(855, 855))
DECLARED = replace(OPTED, before=(645, 1365), declared=True)
STRANGER = GpuPlan(allowed=None, held=False, before=(960, 960), declared=False)

CALM = replace(
    drawn(0),
    gpus=(OPTED, STRANGER, UNDECLARED, DECLARED),
    early=False,
    ttl_s=4.0,
    life_s=0.4,
    stop=Stop.KILL,
    lift_s=-0.05,
    ask_at_s=(0.05, 0.2),
    faults=(),
)
SCHEDULES = {
    "calm": CALM,
    "killed": replace(CALM, faults=(Fault(kind="keeper: SIGKILL", at_s=0.2),)),
    "stranger": replace(CALM, faults=(Fault(kind="socket: another user", at_s=0.1),)),
}


def no_journal():
    """Nothing is written down before a GPU is locked."""
    journal.Journal.write = lambda self, baselines: None


def no_end():
    """Who hangs up keeps the lease."""
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
    """Everybody may ask."""
    real = server.Server.__init__
    server.Server.__init__ = lambda self, leases, uids, *more: real(self, leases, frozenset({*uids, NOBODY}), *more)


def sound():
    """The keeper as it is."""


def play(library, what):
    sabotage, _, schedule = what.partition(":")
    globals()[sabotage]()
    with stage(1, library) as lanes:
        (one,) = lanes.play([SCHEDULES[schedule]])
    print(what, one.complete, one.told, one.cut, len(one.restorings_s), *one.violations, sep="|", flush=True)


def main():
    library, *whats = sys.argv[1:]
    for what in whats:
        if os.fork() == 0:
            play(Path(library), what)
            return
    while whats:
        os.wait()
        whats.pop()


if __name__ == "__main__":
    main()
