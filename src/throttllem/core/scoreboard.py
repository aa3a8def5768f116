"""What is running on one engine, and how far along (the paper's scoreboard, part 2 of its system).

While the batch is unchanged every running row gains one token per iteration, so a row's progress is
`iteration - row.start` and nothing here is touched: rows change on start, finish, preemption and misprediction only.
The columns that the projection needs are kept as compact arrays (the last row moves into a gap).
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from throttllem.core.types import Request

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(slots=True, kw_only=True)
class Row:
    """One request on its way through an engine.

    `predicted_tokens` is the first prediction, inflated; `sure_tokens` the same before inflation (None: not inflated);
    `answer_tokens` the prediction in force. `earliest` is the first iteration that can hold the row. `done_tokens` were
    generated before the last (re)start and are part of the prompt now; `start` is the iteration of the first token
    since then, None while it waits inside the engine.
    """

    request: Request
    predicted_tokens: int
    answer_tokens: int
    sure_tokens: int | None = None
    earliest: int = 0
    lost: bool = False
    done_tokens: int = 0
    start: int | None = None
    first_token_s: float | None = None
    slot: int = -1

    @property
    def prefill_tokens(self) -> int:
        """Tokens that a (re)start must process: the prompt, and what a preemption threw away."""
        return self.request.prompt_tokens + self.done_tokens

    @property
    def remaining_tokens(self) -> int:
        """Tokens still to come after the last (re)start, by the prediction in force."""
        return max(1, self.answer_tokens - self.done_tokens)

    @property
    def gaps(self) -> int:
        """Gaps between tokens that a mean may be spread over: those of the answer as far as it is sure to come."""
        outgrown = self.answer_tokens > self.predicted_tokens
        tokens = self.answer_tokens if outgrown or self.sure_tokens is None else self.sure_tokens
        return max(1, tokens - 1)

    def generated_tokens(self, iteration: int) -> int:
        """Tokens of the answer that are out when `iteration` is over."""
        return self.done_tokens + (0 if self.start is None else iteration - self.start + 1)

    @property
    def tbt_s(self) -> float:
        """The promise on the time between tokens, inf where there is none or the row is lost."""
        tbt_s = self.request.slo.tbt_s
        return math.inf if tbt_s is None or self.lost else tbt_s

    def spare_s(self) -> float:
        """What a reserve may take from the deadline at most: a tenth of what a TBT promise gives."""
        return 0.1 * self.tbt_s * self.gaps

    def deadline_s(self) -> float:
        """When the last token is due: E2E, and the mean time between tokens once the first is out; inf if lost."""
        if self.lost:
            return math.inf
        slo, due_s = self.request.slo, math.inf
        if slo.e2e_s is not None:
            due_s = self.request.arrival_s + slo.e2e_s
        if slo.tbt_s is not None and self.first_token_s is not None:
            due_s = min(due_s, self.first_token_s + slo.tbt_s * self.gaps)
        return due_s


class Scoreboard:
    """Rows of one engine: `pending` (dispatched, no token yet) and running ones.

    `lost_rows` counts the lost among them; `reserved_blocks` is what an engine that never evicts has set aside.
    """

    def __init__(self, block_tokens: int) -> None:
        self.pending: dict[int, Row] = {}
        self.running: dict[int, Row] = {}
        self.lost_rows = 0
        self.reserved_blocks = 0
        self._block_tokens = block_tokens
        self._slots: list[Row] = []
        self._columns: Ints = np.zeros((3, 64), dtype=np.int64)
        self._promises: Floats = np.zeros((4, 64))
        self._ends: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.pending) + len(self.running)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self.pending or request_id in self.running

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

    def row_at(self, slot: int) -> Row:
        """The running row behind one index of the columns."""
        return self._slots[slot]

    def rows(self) -> list[Row]:
        """Every row, running ones first. For snapshots and engine loss, never per iteration."""
        return [*self.running.values(), *self.pending.values()]

    def tightest_tbt_s(self) -> float:
        """The strictest promise on the time between tokens among rows that are not lost; inf if there is none."""
        waiting = min((row.tbt_s for row in self.pending.values()), default=math.inf)
        return min(waiting, float(self._promises[1, : len(self._slots)].min(initial=math.inf)))

    def reservation(self, request: Request) -> int:
        """KV blocks that an engine which never evicts sets aside for a request."""
        return -(-(request.prompt_tokens + request.max_tokens) // self._block_tokens)

    def dispatch(self, row: Row) -> None:
        """A request goes to the engine and waits for its first token there."""
        self.pending[row.request.id] = row
        self.lost_rows += row.lost
        self.reserved_blocks += self.reservation(row.request)

    def begin(self, request_id: int, iteration: int, now_s: float) -> None:
        """The engine gave the first token (or the first after a preemption) of a pending row."""
        row = self.pending.pop(request_id)
        row.start = iteration
        if row.first_token_s is None:
            row.first_token_s = now_s
        row.slot = len(self._slots)
        if row.slot == self._columns.shape[1]:
            self._columns = np.concatenate([self._columns, np.zeros_like(self._columns)], axis=1)
            self._promises = np.concatenate([self._promises, np.zeros_like(self._promises)], axis=1)
        self._slots.append(row)
        self.running[request_id] = row
        self._write(row)

    def remove(self, request_id: int) -> Row:
        """A row ended, wherever it stood."""
        row = self.pending.pop(request_id, None) or self._leave(request_id)
        self.lost_rows -= row.lost
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

    def mark_lost(self, row: Row) -> None:
        """A row can no longer keep its promises: it binds nothing from now on."""
        self.lost_rows += not row.lost
        row.lost = True
        if row.start is not None:
            self._write(row)

    def outgrown(self, iteration: int) -> list[Row]:
        """Rows that were to be gone before `iteration` and are not: their answer becomes max_tokens (the paper).

        A row that outgrew even that is given one more token at a time: the engine knows better. O(1) when none did.
        """
        found: list[Row] = []
        while self._ends and self._ends[0][0] <= iteration:
            end, request_id = heapq.heappop(self._ends)
            row = self.running.get(request_id)
            if row is None or row.start is None or row.start + row.remaining_tokens != end:
                continue
            generated = row.done_tokens + iteration - row.start
            row.answer_tokens = max(row.request.max_tokens, generated + 1)
            self._write(row)
            found.append(row)
        return found

    def _write(self, row: Row) -> None:
        assert row.start is not None
        end = row.start + row.remaining_tokens
        self._columns[:, row.slot] = (row.start, row.prefill_tokens, end)
        e2e_s = row.request.slo.e2e_s or 0.0
        self._promises[:, row.slot] = (row.deadline_s(), row.tbt_s, e2e_s, row.spare_s())
        heapq.heappush(self._ends, (end, row.request.id))

    def _leave(self, request_id: int) -> Row:
        row = self.running.pop(request_id)
        last = self._slots.pop()
        if last is not row:
            self._columns[:, row.slot] = self._columns[:, last.slot]
            self._promises[:, row.slot] = self._promises[:, last.slot]
            self._slots[row.slot], last.slot = last, row.slot
        row.slot = -1
        return row
