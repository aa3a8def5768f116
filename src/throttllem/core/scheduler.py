"""The admission queue: which waiting requests may join the engine that serves, first come first served.

A request never overtakes another, with one exception: where requests that cannot meet their SLO are rejected, none
waits behind one that may never be admitted. The queue decides and keeps the engine's scoreboard; it knows nothing of
how clocks are chosen, how engines are started, or who is notified.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice

from throttllem.core.admission import ADMIT, admit, batch_full, expiry_s, never_fits
from throttllem.core.engine_state import EngineState
from throttllem.core.options import ControllerOptions
from throttllem.core.scoreboard import SequenceState
from throttllem.core.types import EngineSpec, Reason, Request, Verdict, VerdictKind

_MOST_WAIT_VERDICTS = 8
"""Verdicts to wait in one pass at most: each costs a projection."""
_MOST_EXAMINED = 64
"""Waiting requests that one pass looks at, however long the queue is."""
_SLACK = 64


def refused_by_all(request: Request, specs: Iterable[EngineSpec]) -> Reason | None:
    """Why none of these engines could hold the request even alone; None if one could, or if there are none."""
    why = None
    for spec in specs:
        why = never_fits(request, spec)
        if why is None:
            return None
    return why


class AdmissionQueue:
    """The queue of one controller, its only writer.

    `waiting` holds the requests by id, in order of arrival; `head` is why the first of them waits (None: nothing
    does); `next_expiry_s` is when the next of them has waited too long (inf: none will).
    """

    def __init__(self, options: ControllerOptions) -> None:
        self.waiting: OrderedDict[int, SequenceState] = OrderedDict()
        self.head: Verdict | None = None
        self.next_expiry_s = math.inf
        self._options = options
        self._rejects = options.slo_aware and options.admission.rejects
        self._expiries: list[tuple[float, int]] = []

    def push(self, sequence: SequenceState) -> None:
        """A request joins at the end. Where requests are rejected it expires: when it can no longer meet its own SLO
        even alone, or when its patience ends.
        """
        self.waiting[sequence.request.id] = sequence
        if not self._rejects:
            return
        patient_until_s = self._options.admission.patient_until_s(sequence.request)
        sequence.expires_s = min(expiry_s(sequence, self._options.tables.values()), patient_until_s)
        self._note_expiry(sequence)

    def restore(self, waiting: Iterable[SequenceState], head: Verdict | None) -> None:
        """Continue, in a new queue, from what another one held."""
        self.head = head
        for sequence in waiting:
            self.waiting[sequence.request.id] = sequence
            self._note_expiry(sequence)

    def take(self, request_id: int) -> SequenceState | None:
        """A request leaves, from anywhere in the queue; None if it is not in it. O(log n) amortised."""
        sequence = self.waiting.pop(request_id, None)
        if sequence is not None and self._expiries:
            self._forget_expiries()
        return sequence

    def expire(self, now_s: float) -> list[tuple[SequenceState, Reason]]:
        """Requests that have waited too long, with the reason; they leave. O(1) when there are none."""
        expired = []
        while self.next_expiry_s <= now_s:
            sequence = self.take(self._expiries[0][1])
            assert sequence is not None, "the first expiry is always of a request that waits"
            held_back = now_s >= self._options.admission.patient_until_s(sequence.request)
            expired.append((sequence, Reason.HELD_BACK if held_back else Reason.OWN_DEADLINE))
        return expired

    def least_size(self) -> int:
        """The smallest engine size that the first request fits on, so that it cannot starve; 0: any will do."""
        if not self.waiting:
            return 0
        request = next(iter(self.waiting.values())).request
        fitting = [tp for tp, spec in self._options.specs.items() if never_fits(request, spec) is None]
        return min(fitting, default=0)

    def admit(self, engine: EngineState | None, now_s: float) -> list[tuple[SequenceState, Verdict]]:
        """Decide on the first request while it may join; where requests are rejected, on all in order.

        Those that leave the queue are returned: rejected ones (REJECT), and the others, which are on the engine's
        scoreboard already.
        """
        self.head = None
        if engine is None or engine.spec is None:
            self.head = Verdict(kind=VerdictKind.WAIT, why=Reason.NO_ENGINE)
            return []
        left: list[tuple[SequenceState, Verdict]] = []
        held: list[SequenceState] = []
        for sequence in islice(self.waiting.values(), _MOST_EXAMINED if self._rejects else None):
            if held and any(_is_no_lighter(sequence, other) for other in held):
                if not self._may_be_passed(sequence):
                    break
                continue
            sequence.earliest = engine.iteration + (engine.began_s is not None)
            verdict = self._verdict(engine, engine.spec, sequence, now_s, crowded=len(self.waiting) - len(left) > 1)
            if verdict.kind is not VerdictKind.WAIT:
                left.append((sequence, self._join(engine, sequence, verdict)))
                continue
            self.head = self.head or verdict
            held.append(sequence)
            if len(held) == _MOST_WAIT_VERDICTS or not self._may_be_passed(sequence):
                break
        for sequence, _ in left:
            del self.waiting[sequence.request.id]
        if self._expiries:
            self._forget_expiries()
        return left

    def _may_be_passed(self, sequence: SequenceState) -> bool:
        """A request that expires soon anyway holds up no other; one that waits without end would starve."""
        return self._rejects and self._options.admission.patient_until_s(sequence.request) < math.inf

    def _join(self, engine: EngineState, sequence: SequenceState, verdict: Verdict) -> Verdict:
        """A request goes to the engine unless it is rejected; what became of it."""
        lost = verdict.kind is VerdictKind.LOST
        if lost and self._rejects:
            return Verdict(kind=VerdictKind.REJECT, why=verdict.why)
        if verdict.kind is not VerdictKind.REJECT:
            sequence.lost = lost
            engine.board.dispatch(sequence)
        return verdict

    def _verdict(
        self, engine: EngineState, spec: EngineSpec, sequence: SequenceState, now_s: float, *, crowded: bool
    ) -> Verdict:
        why = never_fits(sequence.request, spec)
        if why is not None:  # on this engine; if a larger one can hold it, the autoscaler will bring that up
            sizes = self._options.specs.values() if self._options.autoscale else ()
            larger = any(never_fits(sequence.request, other) is None for other in sizes)
            return Verdict(kind=VerdictKind.WAIT if larger else VerdictKind.REJECT, why=why)
        if not self._options.slo_aware:
            return ADMIT
        if engine.table is None:
            busy = engine.board.running or engine.board.pending
            full = busy and batch_full(engine.board, spec, sequence)
            return Verdict(kind=VerdictKind.WAIT, why=Reason.BATCH) if full else ADMIT
        return admit(
            engine.board,
            spec,
            engine.table,
            sequence,
            first=engine.iteration,
            base_s=now_s if engine.began_s is None else engine.began_s,
            delay_s=engine.maximum_clock_delay_s(now_s, self._options.throttle.switch_latency_s),
            margin=self._options.admission.margin_in_force,
            patient=self._options.admission.is_patient(sequence.request, now_s),
            crowded=crowded,
        )

    def _note_expiry(self, sequence: SequenceState) -> None:
        if sequence.expires_s < math.inf:
            heapq.heappush(self._expiries, (sequence.expires_s, sequence.request.id))
            self.next_expiry_s = self._expiries[0][0]

    def _forget_expiries(self) -> None:
        """Drop the expiries of requests that have left: those at the front, and all once they are many."""
        if len(self._expiries) > 2 * len(self.waiting) + _SLACK:
            self._expiries = [entry for entry in self._expiries if entry[1] in self.waiting]
            heapq.heapify(self._expiries)
        while self._expiries and self._expiries[0][1] not in self.waiting:
            heapq.heappop(self._expiries)
        self.next_expiry_s = self._expiries[0][0] if self._expiries else math.inf


def _is_no_lighter(sequence: SequenceState, other: SequenceState) -> bool:
    """Whether a request is in the way as much as the other, at least; then it must wait where the other had to."""
    return (
        sequence.request.prompt_tokens >= other.request.prompt_tokens
        and sequence.output_tokens >= other.output_tokens
        and sequence.sequences >= other.sequences
        and sequence.limits().tbt_s <= other.limits().tbt_s
    )
