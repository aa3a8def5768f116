"""A schedule from a seed: the same seed, the same schedule; and the smallest part of one that still fails.

Knows the kinds of faults, and which of them cannot go together.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from tools.soak.faults import KINDS
from tools.soak.faults.kind import Journal, Kind
from tools.soak.schedule import Fault, GpuPlan, Lock, Schedule, Stop

BETWEEN_MHZ = (645, 735, 855, 960, 1080, 1155, 1260, 1365)
"""Locks of before: strictly between the lowest and the highest clock, and none that the gateway asks for."""
LOW_MHZ, HIGH_MHZ = (210, 510, 705, 900), (1110, 1200, 1305, 1410)
COMMON_MHZ = 1005
"""Every keeper allows it."""
MOST_FAULTS = 4
SPAN_S = (0.5, 0.9)
EARLY = 0.25
PATIENT, LONG_TTL_S = 0.25, 4.0
"""Some leases last so long that their expiry comes too late: a closed connection must end them at once."""


def drawn(seed: int) -> Schedule:
    """The schedule of a seed. Its first kind goes round, so that as many seeds have every kind."""
    draw = random.Random(f"soak {seed}")
    kinds = _kinds(draw, seed)
    span_s = draw.uniform(*SPAN_S)
    gpus = _gpus(draw, kinds)
    copy = 1 if any(kind.name == "disk: filled" for kind in kinds) else draw.randrange(2)
    patient = draw.random() < PATIENT and not any(kind.runs_out for kind in kinds)
    faults = sorted((_fault(draw, kind, gpus, span_s, copy) for kind in kinds), key=lambda fault: fault.at_s)
    return Schedule(
        seed=seed,
        gpus=gpus,
        early=draw.random() < EARLY,
        ttl_s=LONG_TTL_S if patient else round(draw.uniform(0.3, 0.6), 3),
        life_s=round(span_s + draw.uniform(0.02, 0.15), 3),
        stop=draw.choice((Stop.TERM, Stop.KILL) if patient else tuple(Stop)),
        lift_s=round(draw.choice((-0.05, -0.05, 0.05, 0.2, 0.5)), 3),
        ask_at_s=tuple(sorted(round(draw.uniform(0.0, span_s), 3) for _ in range(draw.randint(3, 6)))),
        clock_every_s=(0.02, 0.08),
        faults=tuple(faults),
    )


def _kinds(draw: random.Random, seed: int) -> list[Kind]:
    everything = list(KINDS.values())
    kinds = [everything[seed % len(everything)]]
    while len(kinds) < MOST_FAULTS and draw.random() < 0.6:
        kind = draw.choice(everything)
        if kind not in kinds and _together(kind, kinds):
            kinds.append(kind)
    return kinds


def _together(kind: Kind, others: Sequence[Kind]) -> bool:
    """A journal that lost both copies shows nothing of the other faults; nothing else is demanded then."""
    hits = [one.journal for one in (kind, *others) if one.journal is not Journal.NOTHING]
    return Journal.BOTH not in hits or len(hits) == 1


def _gpus(draw: random.Random, kinds: Sequence[Kind]) -> tuple[GpuPlan, ...]:
    held = draw.choice((1, 2, 4))  # as many as the model can be spread over
    spare = 1 if any(kind.spare for kind in kinds) or draw.random() < 0.2 else 0
    uses = ["held"] * held + ["spare"] * spare + ["unlisted"] * draw.randint(1, 6 - held - spare)
    draw.shuffle(uses)
    return tuple(_gpu(draw, use) for use in uses)


def _gpu(draw: random.Random, use: str) -> GpuPlan:
    allowed = (draw.choice(LOW_MHZ), draw.choice(HIGH_MHZ))
    before: Lock | None = None
    declared = False
    match draw.choice(("unlocked", "undeclared", "declared")):
        case "undeclared":
            before = (mhz := draw.choice(BETWEEN_MHZ), mhz)
        case "declared":
            low, high = sorted(draw.sample(BETWEEN_MHZ, 2))
            before, declared = (low, high), use != "unlisted"
    return GpuPlan(allowed=None if use == "unlisted" else allowed, held=use == "held", before=before, declared=declared)


def _fault(draw: random.Random, kind: Kind, gpus: Sequence[GpuPlan], span_s: float, copy: int) -> Fault:
    held = [index for index, gpu in enumerate(gpus) if gpu.held]
    spare = [index for index, gpu in enumerate(gpus) if gpu.allowed and not gpu.held]
    return Fault(
        kind=kind.name,
        at_s=round(draw.uniform(0.0, span_s), 3),
        for_s=round(draw.uniform(*kind.lasts_s), 3) if kind.lasts_s else 0.0,
        gpu=draw.choice(spare if kind.spare and spare else held),
        copy=copy,
        which=draw.choice(kind.which),
        count=draw.randint(*kind.counts),
    )


async def smallest(schedule: Schedule, fails: Callable[[Schedule], Awaitable[bool]]) -> Schedule:
    """With the fewest faults that still fail: one after the other is left out, and stays out if it fails anyway.

    `fails` plays a schedule, more than once where chance has a part. The schedule itself is known to fail.
    """
    smaller = True
    while smaller:
        smaller = False
        for fault in schedule.faults:
            without = replace(schedule, faults=tuple(other for other in schedule.faults if other is not fault))
            if await fails(without):
                schedule, smaller = without, True
                break
    return schedule
