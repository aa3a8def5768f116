"""Batch size and KV blocks at every coming iteration (the paper's projection, part 2 of its system).

Nothing else arrives, and every output is as long as predicted. Then sequence i, with q_i KV tokens in iteration s_i and
r_i iterations to go, is in iterations s_i to s_i + r_i - 1 and gains one token in each; with N tokens in a block,

    B_k  = number of i with s_i <= k < s_i + r_i
    KV_k = sum over those i of ceil((q_i + k - s_i) / N)

Knows nothing of seconds, clocks or SLOs.
"""

# How it is computed. A loop over sequences and iterations costs their product, 100 x 1000 at every decision. But both
# sums change at few places: a sequence adds 1 to the batch and ceil(q/N) blocks where it begins, one block every N
# iterations from then on, and takes all of it away where it ends. So only these changes are noted (of the growth, the
# first block and the first that does not come), and one pass over the iterations sums them up: a block that came N
# iterations ago comes again. Cost: O(sequences + horizon), a few microseconds, compiled.
#
# Running sequences are in the batch from offset 0. Pending ones are not: the engine takes prompts as its own batching
# rules allow, so `_placed` plays those rules forward. Prompts come first come first served. Whole ones (TensorRT-LLM)
# go while they fit, the first one always; in chunks (vLLM) the last one is cut to what is left. The simulated engine
# has the same rules (`physics.iterations.take_prompts`), and tests compare both with a plain form of them. A prompt
# that is processed in chunks holds all its blocks from its first chunk on, but grows only from its first token.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from throttllem.core.compiled import compiled
from throttllem.core.scoreboard import Scoreboard, SequenceState
from throttllem.core.shared_blocks import saved_blocks
from throttllem.core.types import EngineSpec

Ints = npt.NDArray[np.int64]

_MOST_ITERATIONS = 1 << 22
"""No request takes more; a projection of more would take all memory."""


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
        return Projection(
            first=self.first,
            batch=np.maximum(self.batch, self.batch[0]),
            kv_blocks=np.maximum(self.kv_blocks, self.kv_blocks[0]),
            prefill_tokens=self.prefill_tokens,
            ends=self.ends,
            starts=self.starts,
        )

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
    external = board.external
    begins = starts = prefill = np.zeros(0, dtype=np.int64)
    sizes = np.zeros((0, 3), dtype=np.int64)
    if pending:
        sizes = np.array([(each.prefill_tokens, each.remaining_tokens, each.sequences) for each in pending])
        decoding = board.running_sequences + max(0, external.batch)
        begins, starts, prefill = _placed(
            _prompts(pending, first), decoding, spec.prefill_budget_tokens, spec.max_batch, spec.chunked
        )
    if board.multi_sequence > 0 or (extra is not None and extra.sequences > 1):
        after = np.cumsum(sizes[:, 2])  # its first prompt begins a request, its last one gives the first token
        begins, starts = begins[after - sizes[:, 2]], starts[after - 1]
    begin, ends, batch, kv_blocks, padded = _accumulated(
        board.columns,
        len(board.running),
        first,
        sizes,
        begins,
        starts,
        prefill,
        spec.block_tokens,
    )
    joins = extra is not None and (extra.request.common_prompt_tokens or extra.request.prefix_of is not None)
    if board.sharing or joins:
        kv_blocks = kv_blocks - _saved(board, pending, extra, begin, ends)
    if external.batch or external.kv_blocks:
        batch = np.maximum(batch + external.batch, 1)
        kv_blocks = np.maximum(kv_blocks + external.kv_blocks, 1)
    return Projection(first=first, batch=batch, kv_blocks=kv_blocks, prefill_tokens=padded, ends=ends, starts=starts)


def _prompts(pending: Sequence[SequenceState], first: int) -> Ints:
    """The prompts that wait, shape (sequences, 2): tokens to compute, and the first offset that can hold them. The
    sequences of one request may share a prompt.
    """
    prompts: list[tuple[int, int]] = []
    for sequence in pending:
        earliest = sequence.earliest - first
        if sequence.request.sequences == 1:
            prompts.append((sequence.computed_tokens, earliest))
            continue
        request, own = sequence.request, min(sequence.request.prompts, sequence.sequences)
        shared = max(request.common_prompt_tokens, request.cached_prompt_tokens)
        prompts += [(sequence.computed_tokens, earliest)] * own
        prompts += [(max(1, sequence.prefill_tokens - shared), earliest)] * (sequence.sequences - own)
    return np.array(prompts, dtype=np.int64)


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


@compiled
def _accumulated(
    running: Ints,
    count: int,
    first: int,
    pending: Ints,
    begins: Ints,
    starts: Ints,
    prefill: Ints,
    block: int,
) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """Offsets where each request begins and ends, shape (requests,), then batch, KV blocks and prefill tokens of each
    offset, shape (horizon,).

    `running` are the scoreboard's columns, of which the first `count` are in use; `pending` (requests, 3) are tokens
    of the prompt, tokens to come, and sequences of those that wait, `begins` and `starts` their offsets of first chunk
    and first token.
    """
    requests = count + starts.size
    begin, end = np.zeros(requests, dtype=np.int64), np.empty(requests, dtype=np.int64)
    horizon = 0
    for i in range(requests):
        if i < count:
            end[i] = max(running[2, i] - first, 1)
        else:
            begin[i] = begins[i - count]
            end[i] = starts[i - count] + pending[i - count, 1]
        horizon = max(horizon, end[i])
    if horizon > _MOST_ITERATIONS:
        raise ValueError("a projection has more iterations than any request takes")
    batch, kv_blocks = np.zeros(horizon + 1, dtype=np.int64), np.zeros(horizon + 1, dtype=np.int64)
    grows = np.zeros(horizon + 1, dtype=np.int64)
    for i in range(requests):
        if i < count:
            tokens, grow_from, width = running[1, i] + first - running[0, i], 0, running[3, i]
        else:
            tokens, grow_from, width = pending[i - count, 0], starts[i - count], pending[i - count, 2]
        blocks = -(-tokens // block)
        # A sequence needs a new block where its tokens go from a multiple of `block` to one more.
        first_growth = grow_from + (-tokens) % block + 1
        growths = max((end[i] - first_growth + block - 1) // block, 0)
        if growths:
            grows[first_growth] += width
            if first_growth + growths * block <= horizon:
                grows[first_growth + growths * block] -= width
        batch[begin[i]] += width
        batch[end[i]] -= width
        kv_blocks[begin[i]] += blocks * width
        kv_blocks[end[i]] -= (blocks + growths) * width
    prefill_tokens = np.zeros(horizon, dtype=np.int64)
    prefill_tokens[: prefill.size] = prefill
    now, in_use = 0, 0
    for offset in range(horizon):
        if offset >= block:
            grows[offset] += grows[offset - block]
        now += batch[offset]
        in_use += kv_blocks[offset] + grows[offset]
        batch[offset], kv_blocks[offset] = now, in_use
    return begin, end, batch[:horizon], kv_blocks[:horizon], prefill_tokens


@compiled
def _placed(waiting: Ints, decoding: int, budget: int, max_batch: int, chunked: bool) -> tuple[Ints, Ints, Ints]:
    """Where the engine's packing puts each waiting prompt: offset of its first chunk, of its first token, and the
    prefill tokens of each offset. An engine with whole prompts begins and starts them in the same iteration.

    `waiting` (prompts, 2) are the tokens to compute of each, and the first offset that can hold it; `decoding`
    sequences run already.
    """
    prompts = waiting.shape[0]
    begins, starts = np.empty(prompts, dtype=np.int64), np.empty(prompts, dtype=np.int64)
    left, prefill = waiting[:, 0].copy(), np.zeros(16, dtype=np.int64)
    begun = started = offset = 0
    while started < prompts:
        if offset > _MOST_ITERATIONS:
            raise ValueError("a projection has more iterations than any request takes")
        if offset == prefill.size:
            prefill = np.concatenate((prefill, np.zeros_like(prefill)))
        done, room = started, budget - decoding - started
        last = min(prompts, done + max(1, max_batch - decoding - done))
        for prompt in range(done, last):
            if waiting[prompt, 1] > offset:
                break
            share = min(left[prompt], room) if chunked else left[prompt]
            if share <= 0 or (share > room and prompt > done):
                if prompt > done:
                    break
                share = left[prompt]  # decoding alone fills the budget: the first prompt is given what it needs
            if prompt == begun:
                begins[prompt] = offset
                begun += 1
            left[prompt] -= share
            room -= share
            prefill[offset] += share
            if left[prompt] == 0:
                starts[prompt] = offset
                started += 1
        offset += 1
    return begins, starts, prefill[:offset]
