"""Batch size and KV blocks at every coming iteration (the paper's projection, part 2 of its system).

    B_k  = number of i with s_i <= k < s_i + r_i
    KV_k = sum over those i of ceil((q_i + k - s_i) / N)

A naive loop is rows x horizon. Here each row contributes a handful of differences instead: +1 to the batch and
ceil(q/N) blocks where it begins, one block every N iterations from then on, and minus all of it where it ends; one
cumulative sum gives both arrays. Rows that wait inside the engine begin where the engine's own packing puts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from throttllem.core.forecast.packing import pack
from throttllem.core.scoreboard import Scoreboard
from throttllem.core.sequence_state import SequenceState
from throttllem.core.types import EngineSpec

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """The engine's future from iteration `first` on, shape (horizon,) each, if nothing else arrives.

    `batch` requests in the iteration, `kv_blocks` in use, `prefill_tokens` processed. `ends[i]` is the offset at which
    row i is gone: running rows in scoreboard order, then the pending ones; `starts[j]` the offset in which the j-th
    pending row gives its first token.
    """

    first: int
    batch: Ints
    kv_blocks: Ints
    prefill_tokens: Ints
    ends: Ints
    starts: Ints

    def replenished(self) -> Projection:
        """The same rows, if others come as these go: neither batch nor KV ever falls below what it is now."""
        if not self.batch.size:
            return self
        batch, kv = np.maximum(self.batch, self.batch[0]), np.maximum(self.kv_blocks, self.kv_blocks[0])
        return replace(self, batch=batch, kv_blocks=kv)

    @property
    def horizon(self) -> int:
        """Iterations until the last row is gone."""
        return int(self.batch.size)


def project(board: Scoreboard, spec: EngineSpec, *, first: int, extra: SequenceState | None = None) -> Projection:
    """Project one engine from iteration `first`, the one in progress or next to begin.

    `extra` is a request that joins virtually, behind everything that waits in the engine. Rows in the scoreboard that
    should be gone already count for one more iteration. What else the engine holds is in every iteration.
    Cost: O(rows x answer / block_tokens + horizon), vectorised.
    """
    pending = list(board.pending.values())
    if extra is not None:
        pending.append(extra)
    wide = board.multi_sequence > 0 or (extra is not None and extra.sequences > 1)
    decoding = board.running_sequences + max(0, board.others.batch)
    place = _place_wide if wide else _place
    begins, starts, prefill = place(pending, decoding, spec, first)
    tokens_now = board.tokens_at_start + (first - board.start)
    left = np.maximum(board.end - first, 1)
    running = len(left)
    if pending:
        prompts = np.array([row.prefill_tokens for row in pending], dtype=np.int64)
        left = np.concatenate([left, starts + np.array([row.remaining_tokens for row in pending], dtype=np.int64)])
        tokens_now = np.concatenate([tokens_now, prompts])
    begin = np.zeros(left.size, dtype=np.int64)
    begin[running:] = begins
    grow_from = np.zeros(left.size, dtype=np.int64)
    grow_from[running:] = starts
    widths = np.concatenate([board.widths, [row.sequences for row in pending]]).astype(np.int64) if wide else None
    batch, kv_blocks = _accumulate(tokens_now, begin, grow_from, left, spec.block_tokens, widths)
    if board.others.batch or board.others.kv_blocks:
        batch = np.maximum(batch + board.others.batch, 1)
        kv_blocks = np.maximum(kv_blocks + board.others.kv_blocks, 1)
    padded = np.zeros(batch.size, dtype=np.int64)
    padded[: len(prefill)] = prefill
    return Projection(first=first, batch=batch, kv_blocks=kv_blocks, prefill_tokens=padded, ends=left, starts=starts)


def _accumulate(
    tokens: Ints, begin: Ints, grow_from: Ints, end: Ints, block: int, widths: Ints | None
) -> tuple[Ints, Ints]:
    """Batch and KV blocks per offset, from each row's tokens at `grow_from`; shapes (rows,) in, (horizon,) out.

    `widths` are the sequences of each row, None if all have one.
    """
    horizon = int(end.max(initial=0))
    size = horizon + 1
    if horizon == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    batch = _sums(begin, widths, size) - _sums(end, widths, size)
    # A row needs a new block where its tokens go from a multiple of `block` to one more.
    first_growth = grow_from + (-tokens) % block + 1
    events = np.maximum((end - first_growth + block - 1) // block, 0)
    total = int(events.sum())
    nth = np.arange(total) - np.repeat(np.cumsum(events) - events, events)
    each = None if widths is None else np.repeat(widths, events)
    kv = _sums(np.repeat(first_growth, events) + block * nth, each, size)
    blocks = -(-tokens // block)
    gone = blocks + events
    if widths is not None:
        blocks, gone = blocks * widths, gone * widths
    kv = kv + np.bincount(begin, weights=blocks, minlength=size).astype(np.int64)
    kv -= np.bincount(end, weights=gone, minlength=size).astype(np.int64)
    return np.cumsum(batch)[:horizon], np.cumsum(kv)[:horizon]


def _sums(at: Ints, weights: Ints | None, size: int) -> Ints:
    """How much falls on each offset, shape (size,)."""
    if weights is None:
        return np.bincount(at, minlength=size)
    return np.bincount(at, weights=weights, minlength=size).astype(np.int64)


def _place(
    pending: Sequence[SequenceState], running: int, spec: EngineSpec, first: int
) -> tuple[list[int], Ints, list[int]]:
    """Where the engine's packing puts each waiting prompt: offset of its first chunk, of its first token, and the
    prefill tokens of each offset. An engine with whole prompts begins and starts them in the same iteration.
    """
    begins: list[int] = []
    starts: list[int] = []
    prefill: list[int] = []
    left = [row.prefill_tokens for row in pending]
    while len(starts) < len(left):
        done, offset = len(starts), len(prefill)
        there = [
            tokens for row, tokens in zip(pending[done:], left[done:], strict=True) if row.earliest <= first + offset
        ]
        slots = max(1, spec.max_batch - running - done)
        taken = pack(there, running + done, budget=spec.prefill_budget_tokens, slots=slots, chunked=spec.chunked)
        if there and not taken:  # decode rows alone fill the budget: the engine will give the first prompt what it can
            taken = [there[0]]
        for position, tokens in enumerate(taken, start=done):
            if position == len(begins):
                begins.append(offset)
            left[position] -= tokens
            if left[position] == 0:
                starts.append(offset)
        prefill.append(sum(taken))
    return begins, np.array(starts, dtype=np.int64), prefill


def _place_wide(
    pending: Sequence[SequenceState], running: int, spec: EngineSpec, first: int
) -> tuple[list[int], Ints, list[int]]:
    """The same where rows have several sequences, each with a prompt of its own: a row begins with its first prompt and
    gives its first token with its last one.
    """
    prompts = [row for row in pending for _ in range(row.sequences)]
    begins, starts, prefill = _place(prompts, running, spec, first)
    after = np.cumsum([row.sequences for row in pending], dtype=np.int64)
    firsts = [int(last) - row.sequences for last, row in zip(after, pending, strict=True)]
    return [begins[index] for index in firsts], starts[after - 1], prefill
