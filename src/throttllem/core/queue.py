"""Requests that wait for a place, first come first served. Knows nothing of engines.

A request may leave from anywhere (its client is gone, or its promise cannot be kept any more) in O(log n): it is
forgotten by its id, and what stands for it in the line and in the heap is dropped when it comes to the front.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from itertools import islice

from throttllem.core.sequence_state import SequenceState

_SLACK = 64


class Queue:
    """Rows in order of arrival, each with the time from which on it is of no use to wait (inf: never)."""

    def __init__(self) -> None:
        self._line: deque[int] = deque()
        self._rows: dict[int, SequenceState] = {}
        self._ends: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def push(self, row: SequenceState, give_up_s: float = math.inf) -> None:
        """A request joins at the end."""
        self._rows[row.request.id] = row
        self._line.append(row.request.id)
        if give_up_s < math.inf:
            heapq.heappush(self._ends, (give_up_s, row.request.id))

    def first(self, most: int) -> tuple[SequenceState, ...]:
        """So many of those that wait, in order of arrival."""
        return tuple(islice(self._rows.values(), most))

    def head(self) -> SequenceState | None:
        """Whose turn it is."""
        return self._rows[self._line[0]] if self._line else None

    def take(self, request_id: int) -> SequenceState | None:
        """A request leaves, wherever it stands; None if it is not here."""
        row = self._rows.pop(request_id, None)
        if row is not None:
            self._tidy()
        return row

    def give_up_s(self) -> float:
        """When the next request gives up, if nothing happens before."""
        return self._ends[0][0] if self._ends else math.inf

    def expired(self, now_s: float) -> list[SequenceState]:
        """Requests that have waited too long; they leave. O(1) when none has."""
        gone = []
        while self._ends and self._ends[0][0] <= now_s:
            row = self.take(self._ends[0][1])
            assert row is not None, "the heap's first is always here"
            gone.append(row)
        return gone

    def _tidy(self) -> None:
        while self._line and self._line[0] not in self._rows:
            self._line.popleft()
        while self._ends and self._ends[0][1] not in self._rows:
            heapq.heappop(self._ends)
        most = 2 * len(self._rows) + _SLACK
        if len(self._line) > most:
            self._line = deque(key for key in self._line if key in self._rows)
        if len(self._ends) > most:
            self._ends = [(end_s, key) for end_s, key in self._ends if key in self._rows]
            heapq.heapify(self._ends)
