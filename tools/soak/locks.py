"""How each GPU was locked from when on, and how it may be while nobody has a lease on it. Pure, from the evidence."""

from __future__ import annotations

import math

from tools.nvml.machine import Op, Write
from tools.soak.evidence import Evidence, Obstacle
from tools.soak.schedule import Lock


def fits(evidence: Evidence, gpu: int, lock: Lock | None, at_s: float = math.inf) -> bool:
    """Whether this GPU may be locked so at that time (or at last), while nobody has a lease on it."""
    plan = evidence.schedule.gpus[gpu]
    if lock in _accepted(evidence, gpu, at_s):
        return True
    # Nobody can know what is in no copy of the journal: what a forgotten lease had set may stay, and what others made
    # of it meanwhile; nothing else.
    inside = plan.allowed is not None and lock is not None and plan.allowed[0] <= lock[0] <= lock[1] <= plan.allowed[1]
    by_others = any(other.gpu == gpu and other.lock == lock for other in evidence.others)
    return evidence.forgot and (inside or by_others or lock is None)


def _accepted(evidence: Evidence, gpu: int, at_s: float) -> set[Lock | None]:
    """Its baseline. Without a lease since, also what it was at first, and what others have made of it. A driver that
    was reloaded may have unlocked it at any time.
    """
    plan = evidence.schedule.gpus[gpu]
    leases_s = [one.at_s for one in _effective(evidence, gpu, at_s) if locked(one) not in (None, plan.baseline)]
    found = {plan.baseline}
    if not leases_s:
        found.add(plan.before)
    for other in evidence.others:
        if other.gpu == gpu and other.lock is None:
            found.add(None)
        elif other.gpu == gpu and not any(each_s > other.at_s for each_s in leases_s):
            found |= set() if _leased(evidence, gpu, other.at_s) else {other.lock}
    return found


def _effective(evidence: Evidence, gpu: int, until_s: float) -> list[Write]:
    """The keeper's writes to it until then that had an effect."""
    return [write for write in evidence.writes if write.gpu == gpu and write.result == 0 and write.at_s <= until_s]


def _leased(evidence: Evidence, gpu: int, at_s: float) -> bool:
    """Whether the last write of a keeper was to lock it for a client."""
    last = _effective(evidence, gpu, at_s)
    return bool(last) and locked(last[-1]) not in (None, evidence.schedule.gpus[gpu].baseline)


def locked(write: Write) -> Lock | None:
    """What a write that took effect made of it."""
    return (write.low, write.high) if write.op is Op.LOCK else None


def moments(evidence: Evidence, gpu: int) -> list[tuple[float, Lock | None]]:
    """How it was locked from when on; the first is how it was before everything."""
    writes = [(write.at_s, locked(write)) for write in evidence.writes if write.gpu == gpu and write.result == 0]
    others = [(other.at_s, other.lock) for other in evidence.others if other.gpu == gpu]
    return [(0.0, evidence.schedule.gpus[gpu].before), *sorted(writes + others, key=lambda moment: moment[0])]


def logged(evidence: Evidence, gpu: int) -> bool:
    """Whether every write is in the log: who is killed between the write and its entry leaves none."""
    entries = sum(write.gpu == gpu and write.result == 0 for write in evidence.writes)
    return entries == evidence.effective[gpu]


def downs(evidence: Evidence) -> list[Obstacle]:
    """When there was no keeper."""
    gone = zip(evidence.deaths, evidence.starts_s[1:], strict=False)
    return [Obstacle(began_s=death.at_s, ended_s=start_s, what="no keeper") for death, start_s in gone]
