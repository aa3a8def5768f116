"""AGFT (arXiv 2508.01744): a contextual bandit that learns the clock online, from the engine's own figures.

LinUCB over a pruned set of clocks: the context is load (running, waiting, KV), the reward is the negative product of
energy and delay over a window of decisions. It knows no SLO and no table; the table only stands in for a power meter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from throttllem.core.clocks.own_policy import EngineView, Floats

WINDOW_S = 0.8
ARMS = 9
"""Clocks that are tried, evenly spaced over the upper three quarters of the range."""
EXPLORE = 0.5


@dataclass(slots=True, kw_only=True)
class Agft:
    """`delay_weight`: exponent of delay in the product (1: the paper's energy-delay product)."""

    delay_weight: float
    _designs: list[Floats] = field(default_factory=list)
    _targets: list[Floats] = field(default_factory=list)
    _arm: int = ARMS - 1
    _context: Floats | None = None
    _since_s: float = 0.0
    _last_s: float = 0.0
    _energy_j: float = 0.0
    _waiting_s: float = 0.0
    _tokens: int = 0
    _scale: float | None = None

    def clock_mhz(self, view: EngineView) -> int:
        """The arm of the window, chosen again when the window is over."""
        seconds = view.now_s - self._last_s
        self._last_s = view.now_s
        self._energy_j += view.power_w * seconds
        self._waiting_s += (view.running + len(view.prompts)) * seconds
        if view.now_s - self._since_s >= WINDOW_S and (view.running or view.prompts):
            self._decide(view)
        low = len(view.clocks_mhz) // 4
        return view.clocks_mhz[low + round(self._arm * (len(view.clocks_mhz) - 1 - low) / (ARMS - 1))]

    def _decide(self, view: EngineView) -> None:
        """Learn from the window that ends, and choose the arm of the next."""
        context = np.array(
            [
                1.0,
                view.running / view.max_batch,
                view.kv_blocks / view.kv_capacity_blocks,
                min(len(view.prompts), 8) / 8,
            ]
        )
        if not self._designs:
            self._designs = [np.eye(context.size) for _ in range(ARMS)]
            self._targets = [np.zeros(context.size) for _ in range(ARMS)]
        tokens = view.tokens - self._tokens
        if self._context is not None and tokens > 0:
            product = (self._energy_j / tokens) * (self._waiting_s / tokens) ** self.delay_weight
            self._scale = product if self._scale is None else self._scale
            self._designs[self._arm] += np.outer(self._context, self._context)
            self._targets[self._arm] -= self._context * math.log(product / self._scale)
        self._context, self._since_s, self._tokens = context, view.now_s, view.tokens
        self._energy_j = self._waiting_s = 0.0
        bounds = [self._bound(arm, context) for arm in range(ARMS)]
        self._arm = ARMS - 1 - int(np.argmax(bounds[::-1]))

    def _bound(self, arm: int, context: Floats) -> float:
        """Upper confidence bound of an arm's reward in this context."""
        solved = np.linalg.solve(self._designs[arm], np.column_stack([self._targets[arm], context]))
        return float(context @ solved[:, 0] + EXPLORE * math.sqrt(float(context @ solved[:, 1])))
