"""Which request used which energy? Each iteration's joules are shared among the requests in it; idle energy is apart.

An iteration's joules are divided by the tokens that it processed: one for each decoding sequence, and its prompt tokens
for each prompt. A running sum of the joules per decoding sequence makes this O(1) an iteration for any batch.
"""

from __future__ import annotations

from collections.abc import Iterable


class EnergyLedger:
    """Energy of one engine's GPUs. At any time: total = ended requests + open requests + idle."""

    def __init__(self) -> None:
        self.total_j = 0.0
        self.idle_j = 0.0
        self._per_sequence_j = 0.0
        self._joined_at: dict[int, float] = {}
        self._own_j: dict[int, float] = {}
        self._sequences: dict[int, int] = {}

    def idle(self, joules: float) -> None:
        """Energy used with no request running."""
        self.total_j += joules
        self.idle_j += joules

    def iteration(self, joules: float, decode_sequences: int, prefills: Iterable[tuple[int, int]]) -> None:
        """Energy of one iteration over `decode_sequences` and the (request id, prompt tokens) of `prefills`.

        Requests decode from `join` to `leave`; an iteration without tokens counts as idle.
        """
        chunks = tuple(prefills)
        tokens = decode_sequences + sum(share for _, share in chunks)
        if tokens == 0:
            self.idle(joules)
            return
        each = joules / tokens
        self.total_j += joules
        self._per_sequence_j += each
        for request_id, share in chunks:
            self._own_j[request_id] = self._own_j.get(request_id, 0.0) + each * share

    def iterations(self, joules: Iterable[float], decode_sequences: int) -> None:
        """Energy of iterations in which the same sequences, at least one, only decode."""
        total_j, per_sequence_j = self.total_j, self._per_sequence_j
        for each_j in joules:
            total_j += each_j
            per_sequence_j += each_j / decode_sequences
        self.total_j, self._per_sequence_j = total_j, per_sequence_j

    def join(self, request_id: int, sequences: int = 1) -> None:
        """A request decodes `sequences` side by side from the next iteration on."""
        self._joined_at[request_id] = self._per_sequence_j
        self._sequences[request_id] = sequences

    def pause(self, request_id: int) -> None:
        """A request no longer decodes but has not ended (preemption)."""
        joined = self._joined_at.pop(request_id, self._per_sequence_j)
        share = self._per_sequence_j - joined
        self._own_j[request_id] = self._own_j.get(request_id, 0.0) + share * self._sequences.pop(request_id, 1)

    def leave(self, request_id: int) -> float:
        """A request ended; the energy that it used in all, joules."""
        self.pause(request_id)
        return self._own_j.pop(request_id)
