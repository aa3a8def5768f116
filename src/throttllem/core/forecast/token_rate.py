"""How many output tokens a sequence gets in one step of its engine: 1, or more where the engine speculates.

Learned from the engine's own counts, fading, so that it follows. Knows nothing of how an engine is reached.
"""

# The core knows one token per sequence and iteration. An engine that speculates gives several, so there an iteration of
# the core is a token, not a step: with r tokens per step, n steps are n r iterations, each 1 / r of a step long. KV
# blocks, outputs and the time between tokens are then counted as they are everywhere else.

from __future__ import annotations

import math
from dataclasses import dataclass

_LONG_STEPS, _SHORT_STEPS = 256.0, 16.0
"""Steps in which evidence fades to 1 / e. What is drafted fits one text and not the next, so a long mean alone would
plan with tokens that no longer come."""

MOST_TOKENS_PER_STEP = 64.0
"""More is an error of counting: drafts are of 1 to 16 tokens."""


@dataclass(slots=True)
class _Mean:
    tokens: float = 0.0
    sequences: float = 0.0

    def learn(self, tokens: float, sequences: float, keep: float) -> None:
        self.tokens = self.tokens * keep + tokens
        self.sequences = self.sequences * keep + sequences

    def value(self) -> float:
        return self.tokens / self.sequences if self.sequences else 1.0


class TokenRate:
    """Tokens per sequence and step; exactly 1 until the engine shows another."""

    def __init__(self) -> None:
        self._long, self._short = _Mean(), _Mean()

    def learn(self, tokens: int, sequences: int, steps: int = 1) -> None:
        """In `steps` steps, `tokens` tokens were given, to sequences that add up to `sequences`. O(1)."""
        if sequences < 1 or not sequences <= tokens <= MOST_TOKENS_PER_STEP * sequences:
            return
        self._long.learn(tokens, sequences, math.exp(-steps / _LONG_STEPS))
        self._short.learn(tokens, sequences, math.exp(-steps / _SHORT_STEPS))

    @property
    def evidence(self) -> float:
        """Sequence steps that the long mean rests on, as far as they have not faded."""
        return self._long.sequences

    @property
    def mean(self) -> float:
        """The long mean: what to expect."""
        return self._long.value()

    @property
    def low(self) -> float:
        """What deadlines may count on: the lower of a long and a short mean."""
        return min(self._long.value(), self._short.value())
