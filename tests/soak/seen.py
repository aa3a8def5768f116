"""Evidence as a play without a fault leaves it, to be spoiled by tests."""

from dataclasses import replace

from tools.nvml.machine import Op, Write
from tools.soak.draw import drawn
from tools.soak.evidence import Ask, Evidence, Loss
from tools.soak.schedule import GpuPlan, Stop

KEEPER = 4711
BEGAN_S = 100.0
OPTED = GpuPlan(allowed=(510, 1200), held=True, before=None, declared=False)
LOCKED = replace(OPTED, before=(855, 855), declared=True)
UNLISTED = GpuPlan(allowed=None, held=False, before=(960, 960), declared=False)
SCHEDULE = replace(
    drawn(0), gpus=(OPTED, LOCKED, UNLISTED), ttl_s=0.5, faults=(), lift_s=-0.05, stop=Stop.KILL, early=False
)


def write(at_s, gpu, mhz=None, *, low=None, result=0, op=None):
    """`mhz` None: it was unlocked."""
    op = op or (Op.UNLOCK if mhz is None else Op.LOCK)
    low, high = (0, 0) if mhz is None else (low or mhz, mhz)
    return Write(at_s=BEGAN_S + at_s, pid=KEEPER, gpu=gpu, op=op, low=low, high=high, result=result)


GOOD = (
    write(0.1, 0, 900),
    write(0.1, 1, 900),
    write(0.5, 0, 1110),
    write(0.5, 1, 1110),
    write(1.01, 0),
    write(1.02, 1, 855),
)


def evidence(writes=GOOD, schedule=SCHEDULE, **more):
    """The gateway was killed at 1 s; everything was restored 20 ms later."""
    left = (None, (855, 855), (960, 960))
    found = {
        "began_s": BEGAN_S,
        "stopped_s": BEGAN_S + 1.0,
        "writes": writes,
        "write_count": len(writes),
        "attempted": tuple(sum(one.gpu == gpu for one in writes) for gpu in range(3)),
        "effective": tuple(sum(one.gpu == gpu and one.result == 0 for one in writes) for gpu in range(3)),
        "left": left,
        "last": left,
        "base_s": BEGAN_S + 1.0,
        "restored_s": BEGAN_S + 1.03,
        "starts_s": [BEGAN_S - 0.5],
        "asks": {0: Ask(gateway=1, asked_s=BEGAN_S + 0.2, how="complete", ended_s=BEGAN_S + 0.3)},
        "losses": [loss(1.0)],
    }
    return Evidence(schedule=schedule, **(found | more))


def loss(at_s, *, from_s=None, why="the gateway died", gpus=(0, 1)):
    return Loss(at_s=BEGAN_S + at_s, from_s=BEGAN_S + (at_s if from_s is None else from_s), why=why, gpus=gpus)


def after(*faults, **more):
    """The schedule with faults of these kinds."""
    return replace(SCHEDULE, faults=faults, **more)
