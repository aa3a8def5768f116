"""KV blocks of rows that all grow by one token an iteration: their sum at any iteration, however many rows there are.

A row that holds q tokens in its start iteration s holds ceil((q + k - s) / N) blocks in iteration k. With
q - s + N - 1 = c N + r and k = K N + j that is c + K, and one more where r + j >= N: two sums and a count by r do.
"""

from __future__ import annotations


class GrowingBlocks:
    """The sum over rows. `sequences` is how many grow, each row counted as often as it is wide."""

    def __init__(self, block_tokens: int) -> None:
        self.sequences = 0
        self._whole = 0
        self._by_residue = [0] * block_tokens

    def add(self, tokens: int, start: int, sequences: int) -> None:
        """A row of that many equal sequences grows from `tokens` tokens each in iteration `start` on."""
        size = len(self._by_residue)
        whole, residue = divmod(tokens - start + size - 1, size)
        self.sequences += sequences
        self._whole += sequences * whole
        self._by_residue[residue] += sequences

    def remove(self, tokens: int, start: int, sequences: int) -> None:
        """Such a row is gone."""
        self.add(tokens, start, -sequences)

    def at(self, iteration: int) -> int:
        """Blocks in use in an iteration in which every row has started. O(1) in rows."""
        size = len(self._by_residue)
        whole, past = divmod(iteration, size)
        return self.sequences * whole + self._whole + sum(self._by_residue[size - past :])
