"""What must hold of a schedule that was played, whatever went wrong in it. Pure: evidence in, words out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tools.nvml.layout import WRITES
from tools.nvml.machine import Op, Write
from tools.soak.evidence import Ask, Evidence, Loss
from tools.soak.faults import KINDS
from tools.soak.faults.kind import Hurts
from tools.soak.group import torn_groups
from tools.soak.locks import downs, fits, logged, moments
from tools.soak.schedule import Stop

ACCEPTED_S = 0.5
"""A gateway that runs has accepted a request by then."""
WITHIN_S = 2.0
"""So soon everything is restored: after the lease is lost, the keeper is back, the obstacle is gone."""


def violations(evidence: Evidence) -> list[str]:
    """All of them."""
    rules: tuple[Callable[[Evidence], Iterator[str]], ...] = (
        _restored,
        _writes,
        torn_groups,
        _keepers,
        _gateways,
        _requests,
        lambda it: (text for text, _ in _losses(it) if text),
    )
    return [*evidence.troubles, *(text for rule in rules for text in rule(evidence))]


def restorings_s(evidence: Evidence) -> list[float]:
    """How long each restoring took, counted from when it was due: the slowest GPU of every lease that was lost."""
    return [seconds for _, seconds in _losses(evidence) if seconds is not None]


# ---- locks ---------------------------------------------------------------------------------------------------


def _restored(evidence: Evidence) -> Iterator[str]:
    if evidence.restored_s is not None or not evidence.left:
        return
    for gpu, plan in enumerate(evidence.schedule.gpus):
        if plan.allowed and not fits(evidence, gpu, evidence.left[gpu]):
            left = evidence.left[gpu]
            yield f"GPU {gpu} is locked {left} {WITHIN_S:g} s after it was due; its baseline: {plan.baseline}"


# ---- losses --------------------------------------------------------------------------------------------------


def due_s(evidence: Evidence) -> float:
    """When everything has to begin to be restored, as far as is known now."""
    lifted = [obstacle.ended_s for obstacle in evidence.obstacles]
    return max([evidence.stopped_s, *(loss.at_s for loss in evidence.losses), *lifted, *evidence.starts_s])


def _losses(evidence: Evidence) -> Iterator[tuple[str, float | None]]:
    """Of every lost lease with GPUs that had to be restored: what was too slow ("" if nothing), and its seconds."""
    for loss in evidence.losses:
        slowest = max((_seconds(evidence, loss, gpu) for gpu in loss.gpus), default=None, key=lambda it: it or -1.0)
        if slowest is not None:
            late = f"{loss.why} at {loss.at_s - evidence.began_s:.3f} s, and a GPU was restored {slowest:.3f} s late"
            yield late if slowest > WITHIN_S else "", slowest


def _seconds(evidence: Evidence, loss: Loss, gpu: int) -> float | None:
    """How long one GPU took; None: there was nothing to be done, or the log does not show it."""
    if not logged(evidence, gpu):
        return None
    found = moments(evidence, gpu)
    before = [lock for at_s, lock in found if at_s <= loss.from_s]
    if fits(evidence, gpu, before[-1], loss.from_s):
        return None
    after = [at_s for at_s, lock in found if at_s > loss.from_s and fits(evidence, gpu, lock, at_s)]
    return max(0.0, after[0] - _possible_s(evidence, loss.at_s)) if after else None


def _possible_s(evidence: Evidence, at_s: float) -> float:
    """From when on it could be restored: no obstacle, and a keeper that runs."""
    for obstacle in sorted([*evidence.obstacles, *downs(evidence)], key=lambda it: it.began_s):
        if obstacle.began_s <= at_s + WITHIN_S:
            at_s = max(at_s, obstacle.ended_s)
    return at_s


# ---- writes --------------------------------------------------------------------------------------------------


def _writes(evidence: Evidence) -> Iterator[str]:
    if evidence.write_count > WRITES:
        yield f"{evidence.write_count} writes: the log holds {WRITES}, and the others are unknown"
    for write in evidence.writes:
        if evidence.schedule.gpus[write.gpu].allowed is None:
            yield f"GPU {write.gpu} is not opted in, and was written to: {write}"
        elif not _permitted(evidence, write):
            yield f"GPU {write.gpu}: a write that is not allowed: {write}"
    for gpu, plan in enumerate(evidence.schedule.gpus):
        if plan.allowed is None and evidence.attempted and evidence.attempted[gpu]:
            yield f"GPU {gpu} is not opted in, and {evidence.attempted[gpu]} writes to it were tried"


def _permitted(evidence: Evidence, write: Write) -> bool:
    """To unlock, to lock within the range, and to restore the baseline."""
    plan = evidence.schedule.gpus[write.gpu]
    if write.op is Op.UNLOCK or plan.allowed is None:
        return write.op is Op.UNLOCK
    others = {other.lock for other in evidence.others if other.gpu == write.gpu}
    inside = plan.allowed[0] <= write.low <= write.high <= plan.allowed[1]
    return write.op is Op.LOCK and (inside or (write.low, write.high) in others | {plan.baseline})


# ---- processes -----------------------------------------------------------------------------------------------


def _keepers(evidence: Evidence) -> Iterator[str]:
    kinds = [KINDS[kind] for kind in evidence.schedule.kinds]
    changed = {other.gpu for other in evidence.others}
    for death in evidence.deaths:
        if not death.by_us and not any(kind.ends_keeper for kind in kinds):
            yield f"the keeper ended by itself at {death.at_s - evidence.began_s:.3f} s"
        for gpu in set(death.unnoted) - changed:
            yield f"GPU {gpu} was locked when the keeper died at {death.at_s - evidence.began_s:.3f} s, and not noted"
    for text in evidence.must_log:
        if text not in evidence.logs and not any("deleted" in kind for kind in evidence.schedule.kinds):
            yield f"the keeper never logged: {text}"


def _gateways(evidence: Evidence) -> Iterator[str]:
    kinds = [KINDS[kind] for kind in evidence.schedule.kinds]
    for death in evidence.gateways:
        if not death.by_us and not any(kind.ends_gateway for kind in kinds):
            yield f"the gateway ended by itself at {death.at_s - evidence.began_s:.3f} s"


def _requests(evidence: Evidence) -> Iterator[str]:
    hurt = {KINDS[kind].hurts for kind in evidence.schedule.kinds}
    memory = any(kind.startswith("gateway") and "memory" in kind for kind in evidence.schedule.kinds)
    for number, ask in sorted(evidence.asks.items()):
        at_end = _at_the_end(evidence, ask)
        if ask.how is None and not (at_end and evidence.schedule.stop is Stop.FREEZE):
            yield f"request {number} never ended"
        elif ask.how == "cut" and not memory and not at_end and Hurts.GATEWAY not in hurt:
            yield f"request {number} was cut off by the end of a gateway that nothing had happened to"
        elif ask.how == "cut" and at_end and _accepted(evidence, ask) and Hurts.GATEWAY not in hurt:
            yield f"request {number} was cut off by a gateway that was asked to end"
        elif ask.how == "error" and not at_end and not hurt & {Hurts.GATEWAY, Hurts.ENGINE}:
            yield f"request {number} was refused, though nothing touched gateway or engine: {ask.why}"
        elif ask.how == "broken" and not memory:
            yield f"request {number} broke: {ask.why}"


def _at_the_end(evidence: Evidence, ask: Ask) -> bool:
    """It was open when the gateway was ended, and may well have been."""
    waited_for = evidence.schedule.lift_s < 0 and not ask.at_the_end
    return not waited_for and (ask.ended_s is None or ask.ended_s >= evidence.stopped_s)


def _accepted(evidence: Evidence, ask: Ask) -> bool:
    """The gateway was asked to end and had the request: one that only just connects is refused or reset."""
    early = ask.asked_s < evidence.stopped_s - ACCEPTED_S
    return evidence.schedule.stop is Stop.TERM and (ask.begun or early)
