"""All GPUs of a lease follow, or none does: looked for in the log of writes, wherever it is quiet for long enough."""

from __future__ import annotations

from collections.abc import Iterator

from tools.soak.evidence import Evidence
from tools.soak.locks import downs, fits, logged, moments
from tools.soak.schedule import Lock

QUIET_S = 0.4
"""After this time without a write to the group, commands under way are over."""


def torn_groups(evidence: Evidence) -> Iterator[str]:
    """Times at which some of the gateway's GPUs were locked by it, and the others otherwise."""
    held = [index for index, gpu in enumerate(evidence.schedule.gpus) if gpu.held]
    blind = evidence.others or evidence.forgot or any("memory" in kind for kind in evidence.schedule.kinds)
    if blind or not evidence.effective or not all(logged(evidence, gpu) for gpu in held):
        return
    writes = sorted((at_s, gpu, lock) for gpu in held for at_s, lock in moments(evidence, gpu)[1:])
    now: dict[int, Lock | None] = {gpu: evidence.schedule.gpus[gpu].before for gpu in held}
    if not writes:
        return
    ends = [at_s for at_s, _, _ in writes[1:]] + [evidence.restored_s or evidence.base_s]
    for (at_s, gpu, lock), end_s in zip(writes, ends, strict=True):
        now[gpu] = lock
        locked = {gpu for gpu, lock in now.items() if not fits(evidence, gpu, lock)}
        torn = locked and (locked != set(held) or len({now[gpu] for gpu in held}) > 1)
        if torn and end_s - at_s > QUIET_S and not _hindered(evidence, at_s):
            yield f"from {at_s - evidence.began_s:.3f} s on for {end_s - at_s:.3f} s one group is locked {now}"


def _hindered(evidence: Evidence, at_s: float) -> bool:
    """An obstacle held the keeper up, or the machine did."""
    away = [(one.began_s, one.ended_s) for one in (*evidence.obstacles, *downs(evidence))]
    away += [(gap.at_s, gap.at_s + gap.lasted_s) for gap in evidence.gaps]
    return any(began_s < at_s + QUIET_S and ended_s > at_s - QUIET_S for began_s, ended_s in away)
