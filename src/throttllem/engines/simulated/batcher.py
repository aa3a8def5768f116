"""In-flight batching as a state machine without a clock: one iteration at a time, in virtual or in real time.

`begin` composes an iteration (which sequences decode, which prompt tokens are processed, which sequences are
preempted), `end` counts its tokens. Knows nothing of seconds, watts or texts.
"""

# Both are O(1) while the batch is unchanged. All running sequences gain one token an iteration, so
# - their KV tokens are a sum (of prompt tokens minus start iteration) plus batch size times iteration;
# - a sequence needs a new KV block in every `block_tokens`-th iteration, so the sequences that need one in iteration k
#   are those of one residue class modulo `block_tokens`, and a counter per class is enough;
# - the iteration of a sequence's last token is known when it starts, and is entered in `_finish_at`.
# A token's keys and values are written in the iteration after the one that made it: the start iteration of a prompt of
# q tokens holds q, the j-th one after it q + j.

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from throttllem.core.forecast.projection import pack
from throttllem.core.types import EngineSpec


@dataclass(slots=True)
class Sequence:
    """One request inside the engine. The batcher is its only writer.

    `prompt_tokens` includes the tokens generated before a preemption; `left_tokens` are still to be generated;
    `prefilled_tokens` of the prompt are in the KV cache; `start` is the iteration of the first token since the last
    (re)start.
    """

    request_id: int
    prompt_tokens: int
    left_tokens: int
    reserved_blocks: int
    prefilled_tokens: int = 0
    start: int = -1


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


class Batcher:
    """Paged KV blocks, whole or chunked prompts, reservation or preemption by recomputation, by the engine's spec."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.iteration = 0
        self.used_blocks = 0
        self.preemptions = 0
        self._reserved_blocks = 0
        self._waiting: deque[Sequence] = deque()
        self._prefilling: list[Sequence] = []
        self._running: dict[int, Sequence] = {}
        self._tokens_ahead = 0
        self._by_residue = [0] * spec.block_tokens
        self._finish_at: dict[int, list[Sequence]] = {}
        self._chunks: list[tuple[Sequence, int]] = []
        self._preempted: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._prefilling) + len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that hold no KV blocks."""
        return len(self._waiting)

    def add(self, request_id: int, *, prompt_tokens: int, output_tokens: int, max_tokens: int) -> None:
        """Add a request that will generate `output_tokens`, which the engine learns only with the last one.

        Raises ValueError if its prompt and max_tokens can never fit.
        """
        blocks = self._blocks(prompt_tokens + max_tokens)
        if not 1 <= output_tokens <= max_tokens or prompt_tokens < 1:
            raise ValueError(
                f"request {request_id}: prompt {prompt_tokens}, answer {output_tokens}, max_tokens {max_tokens}: "
                "prompt and answer must be at least 1 and the answer at most max_tokens"
            )
        if blocks > self.spec.kv_blocks or prompt_tokens + max_tokens > self.spec.max_context_tokens:
            raise ValueError(f"request {request_id}: {prompt_tokens} + {max_tokens} tokens can never fit this engine")
        self._waiting.append(
            Sequence(
                request_id=request_id, prompt_tokens=prompt_tokens, left_tokens=output_tokens, reserved_blocks=blocks
            )
        )

    def cancel(self, request_id: int) -> None:
        """Remove a request before its end, between two iterations. Raises KeyError if it is not here."""
        if request_id in self._running:
            sequence = self._running[request_id]
            self._finish_at[sequence.start + sequence.left_tokens - 1].remove(sequence)
            self._leave(sequence, self.iteration - 1)
            return
        for sequence in (*self._prefilling, *self._waiting):
            if sequence.request_id == request_id:
                if sequence in self._prefilling:
                    self._drop_prompt(sequence)
                else:
                    self._waiting.remove(sequence)
                return
        raise KeyError(request_id)

    def begin(self) -> Iteration | None:
        """Compose the next iteration; None if there is nothing to run."""
        if not len(self):
            return None
        k = self.iteration
        self._preempted = preempted = tuple(self._grow(k))
        decode_sequences = len(self._running)
        self._chunks = list(self._take_prompts(decode_sequences, admit=not preempted))
        prefill_tokens, pairs = 0, 0.0
        for sequence, tokens in self._chunks:
            prefill_tokens += tokens
            pairs += tokens * (sequence.prefilled_tokens + tokens / 2)
        return Iteration(
            index=k,
            decode_sequences=decode_sequences,
            kv_tokens=self._tokens_ahead + decode_sequences * k,
            kv_blocks=self.used_blocks,
            prefills=tuple((sequence.request_id, tokens) for sequence, tokens in self._chunks),
            prefill_tokens=prefill_tokens,
            prefill_pairs=pairs,
            preempted=preempted,
        )

    def end(self) -> Outcome:
        """Count the tokens of the iteration that `begin` composed."""
        k = self.iteration
        started = []
        for sequence, tokens in self._chunks:
            sequence.prefilled_tokens += tokens
            if sequence.prefilled_tokens == sequence.prompt_tokens:
                started.append(sequence.request_id)
                self._prefilling.remove(sequence)
                self._run(sequence, k)
        self._chunks = []
        finished = self._finish_at.pop(k, [])
        for sequence in finished:
            self._leave(sequence, k)
        self.iteration = k + 1
        return Outcome(
            index=k,
            started=tuple(started),
            finished=tuple(sequence.request_id for sequence in finished),
            preempted=self._preempted,
        )

    # ---- KV blocks -------------------------------------------------------------------------------------------

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.spec.block_tokens)

    def _residue(self, sequence: Sequence) -> int:
        """The iterations (modulo the block size) in which a running sequence needs a new block."""
        return (1 - (sequence.prompt_tokens - sequence.start)) % self.spec.block_tokens

    def _grow(self, k: int) -> Iterator[int]:
        """Allocate the new blocks of iteration k, preempting the latest sequences where blocks run out."""
        while self._by_residue[k % self.spec.block_tokens] > self.spec.kv_blocks - self.used_blocks:
            victim = self._prefilling[-1] if self._prefilling else self._running[next(reversed(self._running))]
            self._preempt(victim, k)
            yield victim.request_id
        self.used_blocks += self._by_residue[k % self.spec.block_tokens]

    def _preempt(self, victim: Sequence, k: int) -> None:
        """Recompute later: the generated tokens become part of the prompt."""
        self.preemptions += 1
        if victim.start < 0:
            self._drop_prompt(victim)
        else:
            last = victim.start + victim.left_tokens - 1
            self._finish_at[last].remove(victim)
            self._leave(victim, k - 1)
            done = k - victim.start
            victim.prompt_tokens += done
            victim.left_tokens -= done
        victim.prefilled_tokens, victim.start = 0, -1
        self._waiting.appendleft(victim)

    # ---- sequences -------------------------------------------------------------------------------------------

    def _take_prompts(self, decode_sequences: int, *, admit: bool) -> Iterator[tuple[Sequence, int]]:
        """The prompt tokens of this iteration, first come first served; no prompt starts right after a preemption."""
        spec = self.spec
        partial = len(self._prefilling)
        candidates = chain(self._prefilling, self._waiting) if admit else iter(tuple(self._prefilling))
        slots = spec.max_batch - decode_sequences if admit else partial
        taken = pack(
            (sequence.prompt_tokens - sequence.prefilled_tokens for sequence in candidates),
            decode_sequences,
            budget=spec.prefill_budget_tokens,
            slots=slots,
            chunked=spec.chunked,
        )
        for sequence, tokens in zip(self._prefilling[:], taken, strict=False):
            yield sequence, tokens
        for tokens in taken[partial:]:
            sequence = self._waiting[0]
            if not self._hold_prompt(sequence):
                return
            self._prefilling.append(self._waiting.popleft())
            yield sequence, tokens

    def _hold_prompt(self, sequence: Sequence) -> bool:
        """Allocate the blocks of a whole prompt (and its reservation), if they are free."""
        spec, blocks = self.spec, self._blocks(sequence.prompt_tokens)
        reserved = self._reserved_blocks + sequence.reserved_blocks
        if self.used_blocks + blocks > spec.kv_blocks or (spec.no_evict and reserved > spec.kv_blocks):
            return False
        self.used_blocks += blocks
        self._reserved_blocks = reserved
        return True

    def _drop_prompt(self, sequence: Sequence) -> None:
        """Free the blocks of a prompt that is not processed yet."""
        self._prefilling.remove(sequence)
        self.used_blocks -= self._blocks(sequence.prompt_tokens)
        self._reserved_blocks -= sequence.reserved_blocks

    def _run(self, sequence: Sequence, k: int) -> None:
        sequence.start = k
        self._running[sequence.request_id] = sequence
        self._tokens_ahead += sequence.prompt_tokens - k
        self._by_residue[self._residue(sequence)] += 1
        self._finish_at.setdefault(k + sequence.left_tokens - 1, []).append(sequence)

    def _leave(self, sequence: Sequence, k: int) -> None:
        """Free the blocks of a running sequence after iteration k."""
        del self._running[sequence.request_id]
        self._tokens_ahead -= sequence.prompt_tokens - sequence.start
        self._by_residue[self._residue(sequence)] -= 1
        self.used_blocks -= self._blocks(sequence.prompt_tokens + k - sequence.start)
        self._reserved_blocks -= sequence.reserved_blocks
