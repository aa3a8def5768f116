"""Who comes in, who waits, who is turned away: the queue in front of the engine that serves.

The head of the queue is asked for whenever something changed, and a request never overtakes another; but where who
cannot keep its promise is rejected, nobody waits behind one that may never get a place. Knows nothing of how clocks are
chosen or engines are started.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from throttllem.core.admission import ADMIT, admit, batch_full, give_up_s, never_fits
from throttllem.core.clocks.controller import Governor
from throttllem.core.engine_state import Engines, EngineState
from throttllem.core.lengths.expectation import LengthPrediction
from throttllem.core.options import ControllerOptions
from throttllem.core.queue import Queue
from throttllem.core.sequence_state import SequenceState
from throttllem.core.state_update import StateUpdate
from throttllem.core.types import Command, Dispatch, EngineSpec, Reason, Reject, Request, Verdict, VerdictKind

Changed = dict[int, EngineState]
_ASKED = 8
"""So many of those that wait are refused at one time at most: each costs a projection."""
_LOOKED_AT = 64
"""So many of those that wait are looked at after one event at most, however long the queue is."""


class AdmissionQueue:
    """The queue of one controller. `head` says why its head waits, None if nothing does."""

    def __init__(
        self,
        options: ControllerOptions,
        engines: Engines,
        governor: Governor,
        foresight: LengthPrediction,
        booking: StateUpdate,
    ) -> None:
        self.head: Verdict | None = None
        self._options = options
        self._engines = engines
        self._governor = governor
        self._foresight = foresight
        self._booking = booking
        self._queue = Queue()

    def __len__(self) -> int:
        return len(self._queue)

    def arrived(self, request: Request, commands: list[Command]) -> SequenceState | None:
        """A request joins the queue; None if it was turned away at once."""
        reasons = [never_fits(request, spec) for spec in self._engines.specs()]
        why = reasons[-1] if reasons and all(reasons) else None
        if why is None and len(self._queue) >= self._options.admission.queue_limit:
            why = Reason.QUEUE_FULL
        if why is not None:
            self._reject(request.id, why, commands)
            return None
        row = self._foresight.row(request)
        self._queue.push(row, self._gives_up_s(row) if self._rejects else math.inf)
        return row

    def cancelled(self, request_id: int, commands: list[Command]) -> None:
        """The client of a request that may wait here is gone."""
        row = self._queue.take(request_id)
        if row is not None:
            self._turn_away(row, Reason.CANCELLED, commands)

    def least_size(self) -> int:
        """The smallest size that the queue's head fits on, so that it cannot starve."""
        row = self._queue.head()
        if row is None:
            return 0
        fitting = [tp for tp, spec in self._options.specs.items() if never_fits(row.request, spec) is None]
        return min(fitting, default=0)

    def give_up_s(self) -> float:
        """When the next request that waits can no longer keep its promise; inf where nothing is known of the speed."""
        serving = self._engines.serving
        return math.inf if serving and serving.table is None else self._queue.give_up_s()

    def give_up(self, now_s: float, commands: list[Command], changed: Changed) -> None:
        """Turn away who waits in vain, so that the client hears early."""
        if self.give_up_s() > now_s:
            return
        for row in self._queue.expired(now_s):
            held_back = now_s >= self._options.admission.patient_until_s(row.request)
            self._turn_away(row, Reason.HELD_BACK if held_back else Reason.OWN_DEADLINE, commands)
        if self._engines.serving:
            changed[self._engines.serving.engine] = self._engines.serving

    def let_in(self, now_s: float, commands: list[Command], changed: Changed) -> None:
        """Dispatch who may join: the queue's head while it may, or whoever waits where nobody waits for others."""
        self.head = None
        engine = self._engines.serving
        refused: list[SequenceState] = []
        for row in self._in_turn():
            if engine is None or engine.spec is None:
                self.head = Verdict(kind=VerdictKind.WAIT, why=Reason.NO_ENGINE)
                return
            if any(_is_no_lighter(row, other) for other in refused):
                if not self._may_be_passed(row):
                    return
                continue
            row.earliest = engine.iteration + engine.in_progress
            verdict = self._verdict(engine, engine.spec, row, now_s)
            changed[engine.engine] = engine
            if verdict.kind is not VerdictKind.WAIT:
                self._answer(engine, row, verdict, commands)
                continue
            self.head = self.head or verdict
            refused.append(row)
            if not self._may_be_passed(row) or len(refused) == _ASKED:
                return

    @property
    def _rejects(self) -> bool:
        return self._options.slo_aware and self._options.admission.rejects

    def _may_be_passed(self, row: SequenceState) -> bool:
        """One that is turned away in time anyway holds nobody up; one that waits without end would starve."""
        return self._rejects and self._options.admission.patient_until_s(row.request) < math.inf

    def _in_turn(self) -> Iterable[SequenceState]:
        """Who is asked: everybody in order, or always the head, until it has to wait."""
        return self._queue.first(_LOOKED_AT) if self._rejects else iter(self._queue.head, None)

    def _gives_up_s(self, row: SequenceState) -> float:
        """Until when a request is of use in the queue: its own promise, and its patience."""
        own_s = give_up_s(row, self._options.tables.values())
        return min(own_s, self._options.admission.patient_until_s(row.request))

    def _answer(self, engine: EngineState, row: SequenceState, verdict: Verdict, commands: list[Command]) -> None:
        """A request leaves the queue, into the engine or away."""
        self._queue.take(row.request.id)
        lost = verdict.kind is VerdictKind.LOST
        if verdict.kind is VerdictKind.REJECT or (lost and self._rejects):
            self._turn_away(row, verdict.why, commands)
            return
        row.lost = lost
        engine.board.dispatch(row)
        self._booking.count(dispatched=1)
        commands.append(Dispatch(engine=engine.engine, request_id=row.request.id))

    def _verdict(self, engine: EngineState, spec: EngineSpec, row: SequenceState, now_s: float) -> Verdict:
        why = never_fits(row.request, spec)
        if why is not None:  # on this engine; if a larger one can hold it, the autoscaler will bring that up
            larger = any(never_fits(row.request, other) is None for other in self._engines.specs())
            return Verdict(kind=VerdictKind.WAIT if larger else VerdictKind.REJECT, why=why)
        if not self._options.slo_aware:
            return ADMIT
        if engine.table is None:
            full = len(engine.board) > 0 and batch_full(engine.board, spec, row)
            return Verdict(kind=VerdictKind.WAIT, why=Reason.BATCH) if full else ADMIT
        return admit(
            engine.board,
            spec,
            engine.table,
            row,
            first=engine.iteration,
            base_s=engine.base_s(now_s),
            delay_s=self._governor.top_delay_s(engine, now_s),
            margin=self._options.admission.kept_back,
            patient=self._options.admission.is_patient(row.request, now_s),
            crowded=len(self._queue) > 1,
        )

    def _turn_away(self, row: SequenceState, why: Reason, commands: list[Command]) -> None:
        self._foresight.dropped(row)
        self._reject(row.request.id, why, commands)

    def _reject(self, request_id: int, why: Reason, commands: list[Command]) -> None:
        self._booking.count(rejected=1)
        commands.append(Reject(request_id=request_id, why=why))


def _is_no_lighter(row: SequenceState, other: SequenceState) -> bool:
    """Would this one be in the way as much, at least? Then it need not be asked where the other had to wait."""
    return (
        row.request.prompt_tokens >= other.request.prompt_tokens
        and row.output_tokens >= other.output_tokens
        and row.sequences >= other.sequences
        and row.tbt_s <= other.tbt_s
    )
