"""What an engine's prefix cache holds, as far as the prompts that it was sent show it (as vLLM caches them).

A full KV block is known by its tokens and all before it. Which blocks the engine has evicted, it does not report: the
least recently used go first here too, and the share of predicted hits that it reports scales later predictions.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

Blocks = tuple[int, ...]
"""A hash for each full block of a prompt, of its tokens and of all before it."""
_PRIOR_TOKENS = 1024
"""Reported hits of this many predicted tokens count as much as the prediction itself."""
_REMEMBERED_TOKENS = 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """Of a prompt: `cached_tokens` that the engine should not need to compute, and the request in the engine, `of`,
    with which it has most in common (None: there is none), `tokens` in full blocks.
    """

    cached_tokens: int = 0
    of: int | None = None
    tokens: int = 0


def blocks_of(token_ids: Sequence[int], block_tokens: int, seed: object) -> Blocks:
    """The full blocks of a prompt. `seed`: what else keeps equal tokens apart (adapter, salt)."""
    width = block_tokens * 8
    content = memoryview(array("q", token_ids).tobytes())
    found, block = [], hash(seed)
    for start in range(0, len(content) - width + 1, width):
        block = hash((block, content[start : start + width].tobytes()))
        found.append(block)
    return tuple(found)


class PrefixCache:
    """One engine's, from its start on. O(blocks of the prompt), and O(log) of that for each request in the engine."""

    def __init__(self, *, block_tokens: int, kv_blocks: int) -> None:
        self._block_tokens = block_tokens
        self._most_blocks = kv_blocks
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._running: dict[int, tuple[Blocks, int]] = {}
        """Of each request in the engine its blocks, and how many tokens of them were there when it was sent."""
        self._predicted_tokens = self._hit_tokens = 0.0
        self._sent_tokens = 0
        """Predicted hits since the engine's counter was read last."""
        self._last_hits: float | None = None
        self._by_steps = False

    @property
    def hit_share(self) -> float:
        """The part of predicted hits that the engine reports to have had, at most 1."""
        return min(1.0, (self._hit_tokens + _PRIOR_TOKENS) / (self._predicted_tokens + _PRIOR_TOKENS))

    def shared_tokens(self, prompt_tokens: int) -> int:
        """Tokens of a prompt in blocks that another with the same tokens can use: the last token is always computed."""
        return (prompt_tokens - 1) // self._block_tokens * self._block_tokens

    def find(self, blocks: Blocks, prompt_tokens: int) -> Prefix:
        """What is there of a prompt that is about to be sent."""
        most = min(len(blocks), max(0, prompt_tokens - 1) // self._block_tokens)
        blocks = blocks[:most]
        cached = next((count for count, block in enumerate(blocks) if block not in self._kept), most)
        if not cached:
            return Prefix()
        best, of = 0, None
        for request_id, (others, _) in self._running.items():
            if others[0] == blocks[0] and (common := _common(blocks, others)) > best:
                best, of = common, request_id
        tokens = int(cached * self.hit_share) * self._block_tokens
        return Prefix(cached_tokens=tokens, of=of, tokens=min(best, cached) * self._block_tokens)

    def sent(self, request_id: int, blocks: Blocks) -> None:
        """The engine has a request, and will have these blocks."""
        if not blocks:
            return
        kept = self._kept
        known = next((count for count, block in enumerate(blocks) if block not in kept), len(blocks))
        self._running[request_id] = blocks, known * self._block_tokens
        self._sent_tokens += known * self._block_tokens
        for block in reversed(blocks):  # a prompt's end is evicted first
            kept[block] = None
            kept.move_to_end(block)
        while len(kept) > self._most_blocks:
            kept.popitem(last=False)

    def left(self, request_id: int) -> None:
        """The request is no longer in the engine; its blocks stay until others need the room."""
        self._running.pop(request_id, None)

    def looked_up(self, hit_tokens: int) -> None:
        """The engine reported a step that looked prompts up, and how many of their tokens were hits."""
        self._by_steps = True
        self._learn(self._sent_tokens, hit_tokens)
        self._sent_tokens = 0

    def reported(self, hit_tokens: float) -> None:
        """The engine's counter of tokens that were hits; its steps, where it reports them, show the same."""
        if self._by_steps or not math.isfinite(hit_tokens):
            return
        if self._last_hits is not None and hit_tokens >= self._last_hits:
            self._learn(self._sent_tokens, hit_tokens - self._last_hits)
        self._last_hits, self._sent_tokens = hit_tokens, 0

    def served(self, request_id: int, cached_tokens: int) -> None:
        """The engine reported this of one request, which is still there. Its counter, where it has one, knows more."""
        if self._last_hits is None and not self._by_steps and (found := self._running.get(request_id)) is not None:
            self._learn(found[1], cached_tokens)

    def _learn(self, predicted_tokens: int, hit_tokens: float) -> None:
        self._predicted_tokens += predicted_tokens
        # What others hit is no evidence for ours.
        self._hit_tokens = min(self._hit_tokens + hit_tokens, self._predicted_tokens)
        if self._predicted_tokens > _REMEMBERED_TOKENS:
            self._predicted_tokens /= 2
            self._hit_tokens /= 2


def _common(one: Blocks, other: Blocks) -> int:
    """Blocks that two prompts have in common: each stands for all before it."""
    return bisect_left(range(min(len(one), len(other))), True, key=lambda at: one[at] != other[at])
