"""What is running on one engine, and how far along (the paper's scoreboard, part 2 of its system).

While the batch is unchanged every running row gains one token per iteration, so a row's progress is
`iteration - row.start` and nothing here is touched: rows change on start, finish, preemption and misprediction only.
The columns that the projection needs are kept as compact arrays (the last row moves into a gap).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from throttllem.core.blocks import GrowingBlocks
from throttllem.core.external_load import ExternalLoad, Own
from throttllem.core.sequence_state import SequenceState
from throttllem.core.types import Request

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Renew = Callable[[Request, int], float | None]
"""Tokens of an answer that has outgrown its prediction, given those that are out; None: max_tokens."""


class Scoreboard:
    """Rows of one engine: `pending` (dispatched, no token yet) and running ones.

    `lost_requests` counts the lost among them, `multi_sequence` those of several sequences; `reserved_blocks` is
    what an engine that never evicts has set aside. `others` is what the engine holds beside these rows. `next_end` is
    the first iteration at which a row may have outgrown its prediction (inf: none will).
    """

    def __init__(self, block_tokens: int) -> None:
        self.pending: dict[int, SequenceState] = {}
        self.running: dict[int, SequenceState] = {}
        self.lost_requests = 0
        self.multi_sequence = 0
        self.reserved_blocks = 0
        self.others = ExternalLoad()
        self._block_tokens = block_tokens
        self._slots: list[SequenceState] = []
        self._columns: Ints = np.zeros((4, 64), dtype=np.int64)
        self._promises: Floats = np.zeros((4, 64))
        self.next_end: float = math.inf
        self._ends: list[tuple[int, int]] = []
        self._growing = GrowingBlocks(block_tokens)
        self._pending_sequences = 0
        self._pending_blocks = 0

    def __len__(self) -> int:
        return len(self.pending) + len(self.running)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self.pending or request_id in self.running

    @property
    def sequences(self) -> int:
        """Sequences of all rows."""
        return self._growing.sequences + self._pending_sequences

    @property
    def running_sequences(self) -> int:
        """Sequences of the running rows."""
        return self._growing.sequences

    def kv_blocks(self, iteration: int) -> int:
        """KV blocks of the running rows in an iteration that none of them begins after. O(1) in rows."""
        return self._growing.at(iteration)

    def own(self, iteration: int) -> Own:
        """What the engine should hold of ours in such an iteration. O(1)."""
        return Own(
            running=self._growing.sequences,
            kv_blocks=self._growing.at(iteration),
            pending=self._pending_sequences,
            pending_blocks=self._pending_blocks,
        )

    @property
    def start(self) -> Ints:
        """Iteration of the first token of each running row, shape (rows,)."""
        return self._columns[0, : len(self._slots)]

    @property
    def tokens_at_start(self) -> Ints:
        """KV tokens of each running row in its start iteration, shape (rows,)."""
        return self._columns[1, : len(self._slots)]

    @property
    def end(self) -> Ints:
        """First iteration that each running row is no longer part of, by prediction, shape (rows,)."""
        return self._columns[2, : len(self._slots)]

    @property
    def widths(self) -> Ints:
        """Sequences of each running row, shape (rows,)."""
        return self._columns[3, : len(self._slots)]

    @property
    def deadline_s(self) -> Floats:
        """When the last token of each running row is due, inf where nothing binds, shape (rows,)."""
        return self._promises[0, : len(self._slots)]

    @property
    def e2e_s(self) -> Floats:
        """The E2E promise of each running row, 0 where there is none, shape (rows,)."""
        return self._promises[2, : len(self._slots)]

    @property
    def spare_s(self) -> Floats:
        """What a reserve may take from each running row's deadline at most, inf where no TBT binds, shape (rows,)."""
        return self._promises[3, : len(self._slots)]

    def row_at(self, slot: int) -> SequenceState:
        """The running row behind one index of the columns."""
        return self._slots[slot]

    def rows(self) -> list[SequenceState]:
        """Every row, running ones first. For snapshots and engine loss, never per iteration."""
        return [*self.running.values(), *self.pending.values()]

    def tightest_tbt_s(self) -> float:
        """The strictest promise on the time between tokens among rows that are not lost; inf if there is none."""
        waiting = min((row.tbt_s for row in self.pending.values()), default=math.inf)
        return min(waiting, float(self._promises[1, : len(self._slots)].min(initial=math.inf)))

    def reservation(self, request: Request) -> int:
        """KV blocks that an engine which never evicts sets aside for a request."""
        return -(-(request.prompt_tokens + request.max_tokens) // self._block_tokens) * request.sequences

    def dispatch(self, row: SequenceState) -> None:
        """A request goes to the engine and waits for its first token there."""
        self.pending[row.request.id] = row
        self.lost_requests += row.lost
        self.multi_sequence += row.request.sequences > 1
        self.reserved_blocks += self.reservation(row.request)
        self._wait(row, row.request.sequences)

    def begin(self, request_id: int, iteration: int, now_s: float) -> None:
        """The engine gave the first token (or the first after a preemption) of a pending row."""
        row = self.pending.pop(request_id)
        self._wait(row, -row.request.sequences)
        row.start = iteration
        if row.first_token_s is None:
            row.first_token_s = now_s
        row.slot = len(self._slots)
        if row.slot == self._columns.shape[1]:
            self._columns = np.concatenate([self._columns, np.zeros_like(self._columns)], axis=1)
            self._promises = np.concatenate([self._promises, np.zeros_like(self._promises)], axis=1)
        self._slots.append(row)
        self.running[request_id] = row
        self._growing.add(row.prefill_tokens, iteration, row.request.sequences)
        self._write(row)

    def correct(self, request_id: int, tokens: int, iteration: int, now_s: float) -> None:
        """A row (each of its sequences) has `tokens` tokens out when `iteration` is over, whatever its start says.

        Its KV then is its prompt and those tokens less one, and its predicted end moves along; a pending row begins.
        """
        if request_id in self.pending:
            self.begin(request_id, iteration, now_s)
        row = self.running[request_id]
        assert row.start is not None
        self._growing.remove(row.prefill_tokens, row.start, row.request.sequences)
        row.done_tokens = min(row.done_tokens, tokens - 1)
        row.start = iteration + 1 - (tokens - row.done_tokens)
        self._growing.add(row.prefill_tokens, row.start, row.request.sequences)
        self._write(row)

    def remove(self, request_id: int) -> SequenceState:
        """A row ended, wherever it stood."""
        row = self.pending.pop(request_id, None)
        if row is None:
            row = self._leave(request_id)
        else:
            self._wait(row, -row.request.sequences)
        self.lost_requests -= row.lost
        self.multi_sequence -= row.request.sequences > 1
        self.reserved_blocks -= self.reservation(row.request)
        return row

    def preempt(self, request_id: int, iteration: int) -> None:
        """The engine threw a row out before `iteration`; it waits there, in front, to be computed again."""
        row = self._leave(request_id)
        assert row.start is not None
        row.done_tokens += iteration - row.start
        row.start = None
        row.earliest = iteration
        self.pending = {request_id: row, **self.pending}
        self._wait(row, row.request.sequences)

    def mark_lost(self, row: SequenceState) -> None:
        """A row can no longer keep its promises: it binds nothing from now on."""
        self.lost_requests += not row.lost
        row.lost = True
        if row.start is not None:
            self._write(row)

    def outgrown(self, iteration: int, renew: Renew | None = None) -> list[SequenceState]:
        """Rows that were to be gone before `iteration` and are not: `renew` says what to expect now, or else their
        answer becomes max_tokens (the paper).

        A row that outgrew even that is given one more token at a time: the engine knows better. O(1) when none did.
        """
        found: list[SequenceState] = []
        while self._ends and self._ends[0][0] <= iteration:
            end, request_id = heapq.heappop(self._ends)
            row = self.running.get(request_id)
            if row is None or row.start is None or row.start + row.remaining_tokens != end:
                continue
            generated = row.done_tokens + iteration - row.start
            expected = renew(row.request, generated) if renew and generated < row.request.max_tokens else None
            most = row.request.max_tokens
            tokens = most if expected is None or not math.isfinite(expected) else min(most, math.ceil(expected))
            row.output_tokens = max(tokens, generated + 1)
            self._write(row)
            found.append(row)
        self.next_end = self._ends[0][0] if self._ends else math.inf
        return found

    def _wait(self, row: SequenceState, sequences: int) -> None:
        """Count a pending row in, or out if negative."""
        self._pending_sequences += sequences
        self._pending_blocks += -(-row.prefill_tokens // self._block_tokens) * sequences

    def _write(self, row: SequenceState) -> None:
        assert row.start is not None
        end = row.start + row.remaining_tokens
        self._columns[:, row.slot] = (row.start, row.prefill_tokens, end, row.request.sequences)
        e2e_s = row.request.slo.e2e_s or 0.0
        self._promises[:, row.slot] = (row.deadline_s(), row.tbt_s, e2e_s, row.spare_s())
        heapq.heappush(self._ends, (end, row.request.id))
        if len(self._ends) > 4 * len(self._slots) + 64:  # mostly ends of rows that left or were corrected
            self._ends = [(int(end), held.request.id) for end, held in zip(self.end, self._slots, strict=True)]
            heapq.heapify(self._ends)
        self.next_end = self._ends[0][0]

    def _leave(self, request_id: int) -> SequenceState:
        row = self.running.pop(request_id)
        assert row.start is not None
        self._growing.remove(row.prefill_tokens, row.start, row.request.sequences)
        last = self._slots.pop()
        if last is not row:
            self._columns[:, row.slot] = self._columns[:, last.slot]
            self._promises[:, row.slot] = self._promises[:, last.slot]
            self._slots[row.slot], last.slot = last, row.slot
        row.slot = -1
        return row
