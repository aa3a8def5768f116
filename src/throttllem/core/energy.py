"""Whose joules were they? Each iteration's energy is shared among the requests in it; idle energy stands apart.

An iteration's joules are divided by the tokens it processed: one for each decoding row, and its prompt tokens for each
prompt. A running sum of the joules per decoding row makes this O(1) an iteration however large the batch is.
"""

from __future__ import annotations

from collections.abc import Iterable


class EnergyLedger:
    """Energy of one engine's GPUs. At any time: total = ended requests + open requests + idle."""

    def __init__(self) -> None:
        self.total_j = 0.0
        self.idle_j = 0.0
        self._per_row_j = 0.0
        self._joined_at: dict[int, float] = {}
        self._own_j: dict[int, float] = {}
        self._rows: dict[int, int] = {}

    def idle(self, joules: float) -> None:
        """Energy spent with no request running."""
        self.total_j += joules
        self.idle_j += joules

    def iteration(self, joules: float, decode_sequences: int, prefills: Iterable[tuple[int, int]]) -> None:
        """Energy of one iteration over `decode_sequences` rows and the (request id, prompt tokens) of `prefills`.

        Rows decode from `join` to `leave`; an iteration of nothing at all counts as idle.
        """
        chunks = tuple(prefills)
        tokens = decode_sequences + sum(share for _, share in chunks)
        if tokens == 0:
            self.idle(joules)
            return
        each = joules / tokens
        self.total_j += joules
        self._per_row_j += each
        for request_id, share in chunks:
            self._own_j[request_id] = self._own_j.get(request_id, 0.0) + each * share

    def join(self, request_id: int, rows: int = 1) -> None:
        """A request decodes `rows` rows from the next iteration on."""
        self._joined_at[request_id] = self._per_row_j
        self._rows[request_id] = rows

    def pause(self, request_id: int) -> None:
        """A request no longer decodes but has not ended (preemption)."""
        joined = self._joined_at.pop(request_id, self._per_row_j)
        share = self._per_row_j - joined
        self._own_j[request_id] = self._own_j.get(request_id, 0.0) + share * self._rows.pop(request_id, 1)

    def leave(self, request_id: int) -> float:
        """A request ended; what it cost in all, joules."""
        self.pause(request_id)
        return self._own_j.pop(request_id)

    def open_j(self) -> float:
        """Energy of the requests that have not ended."""
        joined = ((self._per_row_j - at) * self._rows[request_id] for request_id, at in self._joined_at.items())
        return sum(self._own_j.values()) + sum(joined)
