"""Lengths of answers in bins, finer where they are short. Knows nothing of what is counted in them."""

from __future__ import annotations

BEYOND = 8 * 18
"""The last bin: longer than any answer that was seen, or than 2^20 tokens."""


def bin_of(tokens: int) -> int:
    """The bin of a length: one each below 16, then eight for every doubling, up to 2^20."""
    if tokens < 16:
        return max(tokens, 0)
    octave = tokens.bit_length() - 4
    return min(8 * octave + (tokens >> octave), BEYOND - 1)


def shortest_of(at: int) -> int:
    """The shortest length in a bin."""
    octave = max(at // 8 - 1, 0)
    return (at - 8 * octave) << octave
