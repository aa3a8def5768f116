"""One request on its way through an engine: what was predicted, what is out, and when the rest is due."""

from __future__ import annotations

import math
from dataclasses import dataclass

from throttllem.core.types import Request


@dataclass(slots=True, kw_only=True)
class SequenceState:
    """One request on its way through an engine.

    `predicted_tokens` is the first prediction, inflated; `expected_tokens` the same before inflation (None: not
    inflated); `output_tokens` the prediction in force. `earliest` is the first iteration that can hold the row.
    `done_tokens` were generated before the last (re)start and are part of the prompt now; `start` is the iteration
    of the first token since then, None while it waits inside the engine. Tokens are those of one of its
    `sequences`: all keep pace.
    """

    request: Request
    predicted_tokens: int
    output_tokens: int
    expected_tokens: int | None = None
    earliest: int = 0
    lost: bool = False
    done_tokens: int = 0
    start: int | None = None
    first_token_s: float | None = None
    slot: int = -1

    @property
    def sequences(self) -> int:
        """Answers side by side: the row counts as so many of the batch, and holds so many times its KV blocks."""
        return self.request.sequences

    @property
    def prefill_tokens(self) -> int:
        """Tokens that a (re)start must process: the prompt, and what a preemption threw away."""
        return self.request.prompt_tokens + self.done_tokens

    @property
    def remaining_tokens(self) -> int:
        """Tokens still to come after the last (re)start, by the prediction in force."""
        return max(1, self.output_tokens - self.done_tokens)

    @property
    def gaps(self) -> int:
        """Gaps between tokens that a mean may be spread over: those of the answer as far as it is sure to come."""
        outgrown = self.output_tokens > self.predicted_tokens
        tokens = self.output_tokens if outgrown or self.expected_tokens is None else self.expected_tokens
        return max(1, tokens - 1)

    def generated_tokens(self, iteration: int) -> int:
        """Tokens of the answer that are out when `iteration` is over."""
        return self.done_tokens + (0 if self.start is None else iteration - self.start + 1)

    @property
    def tbt_s(self) -> float:
        """The promise on the time between tokens, inf where there is none or the row is lost."""
        tbt_s = self.request.slo.tbt_s
        return math.inf if tbt_s is None or self.lost else tbt_s

    def spare_s(self) -> float:
        """What a reserve may take from the deadline at most: a tenth of what a TBT promise gives."""
        return 0.1 * self.tbt_s * self.gaps

    def first_due_s(self) -> float:
        """When the first token is due; inf if it is out, or nothing was promised."""
        ttft_s = self.request.slo.ttft_s
        if ttft_s is None or self.lost or self.first_token_s is not None:
            return math.inf
        return self.request.arrival_s + ttft_s

    def deadline_s(self) -> float:
        """When the last token is due: E2E, and the mean time between tokens once the first is out; inf if lost."""
        if self.lost:
            return math.inf
        slo, due_s = self.request.slo, math.inf
        if slo.e2e_s is not None:
            due_s = self.request.arrival_s + slo.e2e_s
        if slo.tbt_s is not None and self.first_token_s is not None:
            due_s = min(due_s, self.first_token_s + slo.tbt_s * self.gaps)
        return due_s
