"""In-flight batching as a state machine without a clock: one iteration at a time, in virtual or in real time.

`begin` composes an iteration (which sequences decode, which prompt tokens are processed, which sequences are
preempted), `end` counts its tokens. Knows nothing of seconds, watts or texts.
"""

# The state is in arrays, and what changes it is compiled: `physics.iterations`, which also explains how an iteration is
# O(1) while the batch is unchanged. Here is what Python sees of it, by the requests' ids.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from throttllem.core.types import EngineSpec
from throttllem.physics.iterations import (
    CHUNK_TOKENS,
    CHUNKS,
    COUNTS,
    FINISHED,
    NEVER,
    PREEMPTED,
    RULES,
    SEQUENCE,
    STARTED,
    Batch,
    begin,
    cancel,
    end,
    join,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """What one iteration processes.

    `decode_sequences` read `kv_tokens` of KV together; `prefills` are (request id, prompt tokens) with
    `prefill_pairs` query-key pairs of attention; `kv_blocks` are in use while it runs.
    """

    index: int
    decode_sequences: int
    kv_tokens: int
    kv_blocks: int
    prefills: tuple[tuple[int, int], ...]
    prefill_tokens: int
    prefill_pairs: float
    preempted: tuple[int, ...]

    @property
    def batch(self) -> int:
        """Requests in the iteration."""
        return self.decode_sequences + len(self.prefills)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one iteration produced: `started` gave their first token (since a preemption), `finished` their last.

    `preempted` left when it was composed.
    """

    index: int
    started: tuple[int, ...]
    finished: tuple[int, ...]
    preempted: tuple[int, ...]


_SLOTS = 64


class Batcher:
    """Paged KV blocks, whole or chunked prompts, reservation or preemption by recomputation, by the engine's spec."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.state = new_batch(spec, _SLOTS)
        self._counts = self.state.counts[0]
        self._requests = [0] * _SLOTS
        self._slots: dict[int, int] = {}
        self._free = list(reversed(range(_SLOTS)))

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def iteration(self) -> int:
        """The iteration under way, or the next to begin."""
        return int(self._counts["iteration"])

    @property
    def used_blocks(self) -> int:
        """KV blocks in use."""
        return int(self._counts["used_blocks"])

    @property
    def preemptions(self) -> int:
        """Sequences that were preempted so far."""
        return int(self._counts["preemptions"])

    @property
    def waiting(self) -> int:
        """Requests that hold no KV blocks."""
        return int(self._counts["waiting"])

    def add(self, request_id: int, *, prompt_tokens: int, output_tokens: int, max_tokens: int) -> None:
        """Add a request that will generate `output_tokens`, which the engine learns only with the last one.

        Raises ValueError if its prompt and max_tokens can never fit.
        """
        blocks = -(-(prompt_tokens + max_tokens) // self.spec.block_tokens)
        if not 1 <= output_tokens <= max_tokens or prompt_tokens < 1:
            raise ValueError(
                f"request {request_id}: prompt {prompt_tokens}, answer {output_tokens}, max_tokens {max_tokens}: "
                "prompt and answer must be at least 1 and the answer at most max_tokens"
            )
        if blocks > self.spec.kv_blocks or prompt_tokens + max_tokens > self.spec.max_context_tokens:
            raise ValueError(f"request {request_id}: {prompt_tokens} + {max_tokens} tokens can never fit this engine")
        if not self._free:
            self._extend()
        slot = self._slots[request_id] = self._free.pop()
        self._requests[slot] = request_id
        join(self.state, slot, prompt_tokens, output_tokens, blocks)

    def cancel(self, request_id: int) -> None:
        """Remove a request before its end, between two iterations. Raises KeyError if it is not here."""
        slot = self._slots.pop(request_id)
        cancel(self.state, slot)
        self._free.append(slot)

    def begin(self) -> Iteration | None:
        """Compose the next iteration; None if there is nothing to run."""
        if not self._slots:
            return None
        (decode_sequences, kv_tokens, prefill_tokens, pairs), (index, used_blocks, chunks, preempted) = begin(
            self.state
        )
        return Iteration(
            index=index,
            decode_sequences=decode_sequences,
            kv_tokens=kv_tokens,
            kv_blocks=used_blocks,
            prefills=self.prefills(chunks),
            prefill_tokens=prefill_tokens,
            prefill_pairs=pairs,
            preempted=self.preempted(preempted),
        )

    def end(self) -> Outcome:
        """Count the tokens of the iteration that `begin` composed."""
        index, preempted, started, finished = end(self.state)
        ended = self._named(FINISHED, finished)
        for request_id in ended:
            self._free.append(self._slots.pop(request_id))
        return Outcome(
            index=index,
            started=self._named(STARTED, started),
            finished=ended,
            preempted=self.preempted(preempted),
        )

    def prefills(self, count: int) -> tuple[tuple[int, int], ...]:
        """(request id, prompt tokens) of the `count` prompts in the iteration under way."""
        if not count:
            return ()
        return tuple(zip(self._named(CHUNKS, count), self.state.lists[CHUNK_TOKENS, :count].tolist(), strict=True))

    def preempted(self, count: int) -> tuple[int, ...]:
        """The `count` requests that were preempted in it."""
        return self._named(PREEMPTED, count)

    def _named(self, which: int, count: int) -> tuple[int, ...]:
        """The requests of one list."""
        if not count:
            return ()
        return tuple(self._requests[slot] for slot in self.state.lists[which, :count].tolist())

    def _extend(self) -> None:
        """Twice as many slots."""
        slots = len(self._requests)
        self.state = self.state._replace(sequences=np.concatenate([self.state.sequences, np.zeros(slots, SEQUENCE)]))
        self._requests.extend([0] * slots)
        self._free.extend(reversed(range(slots, 2 * slots)))


def new_batch(spec: EngineSpec, slots: int) -> Batch:
    """An engine in which nothing runs, with room for that many requests."""
    rules, counts = np.zeros(1, RULES), np.zeros(1, COUNTS)
    for name in RULES.names or ():
        rules[name] = getattr(spec, name)
    counts["next_finish"], counts["first_waiting"], counts["last_waiting"] = NEVER, -1, -1
    at_once = min(spec.max_batch, spec.kv_blocks)
    return Batch(
        rules=rules,
        counts=counts,
        sequences=np.zeros(slots, SEQUENCE),
        lists=np.zeros((FINISHED + 1, at_once), np.int64),
        residues=np.zeros(spec.block_tokens, np.int64),
    )
