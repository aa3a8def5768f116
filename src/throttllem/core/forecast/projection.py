"""Batch size and KV blocks at every coming iteration (the paper's projection, part 2 of its system).

Nothing else arrives, and every output is as long as predicted. Then sequence i, with q_i KV tokens in iteration s_i and
r_i iterations to go, is in iterations s_i to s_i + r_i - 1 and gains one token in each; with N tokens in a block,

    B_k  = number of i with s_i <= k < s_i + r_i
    KV_k = sum over those i of ceil((q_i + k - s_i) / N)

Knows nothing of seconds, clocks or SLOs.
"""

# How it is computed. A loop over sequences and iterations costs their product, 100 x 1000 at every decision. But both
# sums change at few places: a sequence adds 1 to the batch and ceil(q/N) blocks where it begins, one block every N
# iterations from then on, and takes all of it away where it ends. So the differences are counted per iteration
# (bincount), and one cumulative sum gives each array. Cost: O(sequences x output / N + horizon), vectorised.
#
# Running sequences are in the batch from offset 0. Pending ones are not: the engine takes prompts as its own batching
# rules allow, so `_place` plays those rules forward (`pack`, the same function that the simulated engine runs). A
# prompt that is processed in chunks holds all its blocks from its first chunk on, but grows only from its first token.

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from throttllem.core.scoreboard import Scoreboard, SequenceState
from throttllem.core.shared_blocks import saved_blocks
from throttllem.core.types import EngineSpec

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """The engine's future from iteration `first` on, shape (horizon,) each, if nothing else arrives.

    `batch` sequences in the iteration, `kv_blocks` in use, `prefill_tokens` processed. `ends[i]` is the offset at which
    request i is gone: running ones in scoreboard order, then the pending ones; `starts[j]` the offset in which the j-th
    pending one gives its first token.
    """

    first: int
    batch: Ints
    kv_blocks: Ints
    prefill_tokens: Ints
    ends: Ints
    starts: Ints

    def replenished(self) -> Projection:
        """The same requests, if others come as these go: neither batch nor KV ever falls below what it is now."""
        if not self.batch.size:
            return self
        batch, kv = np.maximum(self.batch, self.batch[0]), np.maximum(self.kv_blocks, self.kv_blocks[0])
        return replace(self, batch=batch, kv_blocks=kv)

    @property
    def horizon(self) -> int:
        """Iterations until the last sequence is gone."""
        return int(self.batch.size)


def project(board: Scoreboard, spec: EngineSpec, *, first: int, extra: SequenceState | None = None) -> Projection:
    """Project one engine from iteration `first`, the one in progress or next to begin.

    `extra` is a request that joins virtually, behind everything that waits in the engine. Sequences that should be gone
    already count for one more iteration. The external load is in every iteration.
    """
    pending = list(board.pending.values())
    if extra is not None:
        pending.append(extra)
    multi = board.multi_sequence > 0 or (extra is not None and extra.sequences > 1)
    decoding = board.running_sequences + max(0, board.external.batch)
    place = _place_multi_sequence if multi else _place
    begins, starts, prefill = place(pending, decoding, spec, first)
    tokens_now = board.tokens_at_start + (first - board.start)
    left = np.maximum(board.end - first, 1)
    running = len(left)
    if pending:
        prompts = np.array([sequence.prefill_tokens for sequence in pending], dtype=np.int64)
        remaining = np.array([sequence.remaining_tokens for sequence in pending], dtype=np.int64)
        left = np.concatenate([left, starts + remaining])
        tokens_now = np.concatenate([tokens_now, prompts])
    begin = np.zeros(left.size, dtype=np.int64)
    begin[running:] = begins
    grow_from = np.zeros(left.size, dtype=np.int64)
    grow_from[running:] = starts
    widths = None
    if multi:
        widths = np.concatenate([board.widths, [sequence.sequences for sequence in pending]]).astype(np.int64)
    batch, kv_blocks = _accumulate(tokens_now, begin, grow_from, left, spec.block_tokens, widths)
    joins = extra is not None and (extra.request.common_prompt_tokens or extra.request.prefix_of is not None)
    if board.sharing or joins:
        kv_blocks = kv_blocks - _saved(board, pending, extra, begin, left)
    external = board.external
    if external.batch or external.kv_blocks:
        batch = np.maximum(batch + external.batch, 1)
        kv_blocks = np.maximum(kv_blocks + external.kv_blocks, 1)
    padded = np.zeros(batch.size, dtype=np.int64)
    padded[: len(prefill)] = prefill
    return Projection(first=first, batch=batch, kv_blocks=kv_blocks, prefill_tokens=padded, ends=left, starts=starts)


def _saved(
    board: Scoreboard, pending: Sequence[SequenceState], extra: SequenceState | None, begin: Ints, end: Ints
) -> Ints:
    """KV blocks per offset that shared prefixes save, shape (horizon,)."""
    running = [board.at(slot) for slot in range(end.size - len(pending))]
    places = {sequence.request.id: place for place, sequence in enumerate([*running, *pending])}
    links, own = board.shared.links(), board.shared.own
    if extra is not None:
        request = extra.request
        among, prefix = board.shared_blocks(request)
        own = {**own, request.id: among}
        if prefix and request.prefix_of is not None:
            links = (*links, (request.id, request.prefix_of, prefix))
    return saved_blocks(links, own, places, begin, end)


def _accumulate(
    tokens: Ints, begin: Ints, grow_from: Ints, end: Ints, block: int, widths: Ints | None
) -> tuple[Ints, Ints]:
    """Batch and KV blocks per offset, from each request's tokens at `grow_from`; shapes (requests,) in, (horizon,) out.

    `widths` are the sequences of each request, None if all have one.
    """
    horizon = int(end.max(initial=0))
    size = horizon + 1
    if horizon == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    batch = _sums(begin, widths, size) - _sums(end, widths, size)
    # A sequence needs a new block where its tokens go from a multiple of `block` to one more.
    first_growth = grow_from + (-tokens) % block + 1
    growths = np.maximum((end - first_growth + block - 1) // block, 0)
    nth = np.arange(int(growths.sum())) - np.repeat(np.cumsum(growths) - growths, growths)
    each = None if widths is None else np.repeat(widths, growths)
    kv = _sums(np.repeat(first_growth, growths) + block * nth, each, size)
    blocks = -(-tokens // block)
    gone = blocks + growths
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
    pending: Sequence[SequenceState], running: int, spec: EngineSpec, first: int, prompts: list[int] | None = None
) -> tuple[list[int], Ints, list[int]]:
    """Where the engine's packing puts each waiting prompt: offset of its first chunk, of its first token, and the
    prefill tokens of each offset. An engine with whole prompts begins and starts them in the same iteration.

    `prompts`: the tokens of each that it must compute, None: what each would alone.
    """
    begins: list[int] = []
    starts: list[int] = []
    prefill: list[int] = []
    left = [sequence.computed_tokens for sequence in pending] if prompts is None else prompts
    while len(starts) < len(left):
        done, offset = len(starts), len(prefill)
        there = [
            tokens
            for sequence, tokens in zip(pending[done:], left[done:], strict=True)
            if sequence.earliest <= first + offset
        ]
        slots = max(1, spec.max_batch - running - done)
        taken = pack(there, running + done, budget=spec.prefill_budget_tokens, slots=slots, chunked=spec.chunked)
        if there and not taken:  # decoding alone fills the budget: the engine will give the first prompt what it can
            taken = [there[0]]
        for position, tokens in enumerate(taken, start=done):
            if position == len(begins):
                begins.append(offset)
            left[position] -= tokens
            if left[position] == 0:
                starts.append(offset)
        prefill.append(sum(taken))
    return begins, np.array(starts, dtype=np.int64), prefill


def _place_multi_sequence(
    pending: Sequence[SequenceState], running: int, spec: EngineSpec, first: int
) -> tuple[list[int], Ints, list[int]]:
    """The same where requests have several sequences, of which those of one prompt may share it: a request begins with
    its first prompt and gives its first token with its last one.
    """
    each = [sequence for sequence in pending for _ in range(sequence.sequences)]
    prompts = [tokens for sequence in pending for tokens in _prompts(sequence)]
    begins, starts, prefill = _place(each, running, spec, first, prompts)
    after = np.cumsum([sequence.sequences for sequence in pending], dtype=np.int64)
    firsts = [int(last) - sequence.sequences for last, sequence in zip(after, pending, strict=True)]
    return [begins[index] for index in firsts], starts[after - 1], prefill


def _prompts(sequence: SequenceState) -> list[int]:
    """Tokens that each sequence of a request must compute."""
    request, first = sequence.request, min(sequence.request.prompts, sequence.sequences)
    shared = max(request.common_prompt_tokens, request.cached_prompt_tokens)
    further = max(1, sequence.prefill_tokens - shared)
    return [sequence.computed_tokens] * first + [further] * (sequence.sequences - first)


def pack(prompt_tokens: Iterable[int], decode_sequences: int, *, budget: int, slots: int, chunked: bool) -> list[int]:
    """Tokens of each waiting prompt that the next iteration processes, first come first served.

    `prompt_tokens` are the tokens still to be processed of each prompt in order; `decode_sequences` take one token of
    `budget` each; at most `slots` prompts join. Whole prompts (TensorRT-LLM) go while they fit, the first one always;
    chunked (vLLM) the last one is cut to what is left. The list ends at the first prompt that gets nothing.
    """
    left = budget - decode_sequences
    taken: list[int] = []
    for tokens in prompt_tokens:
        if len(taken) == slots:
            break
        share = min(tokens, left) if chunked else tokens
        if share <= 0 or (share > left and taken):
            break
        taken.append(share)
        left -= share
    return taken
