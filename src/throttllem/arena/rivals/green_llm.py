"""GreenLLM (arXiv 2508.16449): for prompts a queueing rule, for decoding a coarse loop by throughput and a fine one.

The coarse loop looks up the lowest clock for the tokens/s of the last interval; the fine loop moves the clock by a step
about it, by the tail of measured times between tokens. Prompts take the cheapest clock that meets their deadline. The
engine runs at the higher of both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from throttllem.core.clocks.own_policy import EngineView, percentile

COARSE_S, FINE_S = 2.0, 0.2
"""Intervals of the loops. The paper's fine loop has 20 ms; between two changes here nothing is new."""
MOST_STEPS = 6
"""How far the fine loop may go from the coarse clock, in steps of the GPU."""
CALM = 0.65
"""Below this share of the target the fine loop goes down."""


@dataclass(slots=True, kw_only=True)
class GreenLlm:
    """`share`: the target for the time between tokens, of its SLO; and for the first token, where it has an SLO."""

    share: float
    _coarse: int = -1
    _offset: int = 0
    _coarse_s: float = -math.inf
    _fine_s: float = -math.inf
    _tokens: int = 0

    def clock_mhz(self, view: EngineView) -> int:
        """The higher of what decoding and what the prompts need."""
        if not view.running and not view.prompts:
            return view.target_mhz
        target_s = self.share * (view.slo.tbt_s or math.inf)
        if view.now_s - self._coarse_s >= COARSE_S:
            self._look_up(view, target_s)
        if view.now_s - self._fine_s >= FINE_S:
            self._step(view, target_s)
        index = min(max(0, self._coarse + self._offset), len(view.clocks_mhz) - 1)
        return max(view.clocks_mhz[index], self._for_prompts(view))

    def _look_up(self, view: EngineView, target_s: float) -> None:
        """The lowest clock that gives the recent tokens/s at the batch that it settles at (Little's law)."""
        seconds = view.now_s - self._coarse_s
        rate = (view.tokens - self._tokens) / seconds if math.isfinite(seconds) else 0.0
        self._coarse_s, self._tokens, self._offset = view.now_s, view.tokens, 0
        token_s = float(view.token_s()[view.clocks_mhz.index(view.clock_mhz)])
        settled = round(rate * token_s) if math.isfinite(token_s) else view.running
        running = min(view.max_batch, max(1, settled, view.running))
        mhz = view.lowest(view.token_s(running=running) <= target_s)
        self._coarse = view.clocks_mhz.index(mhz)

    def _step(self, view: EngineView, target_s: float) -> None:
        """Up while the tail is late, down while it is calm."""
        self._fine_s = view.now_s
        tail_s = percentile(view.recent.tpot_s, 0.95)
        if tail_s is None:
            return
        step = 1 if tail_s > target_s else -1 if tail_s < CALM * target_s else 0
        self._offset = min(max(self._offset + step, -MOST_STEPS), MOST_STEPS)

    def _for_prompts(self, view: EngineView) -> int:
        """The clock of least energy at which the prompts at hand meet their deadline."""
        if view.slo.ttft_s is None or not view.prompts:
            return view.clocks_mhz[0]
        waited_s, need_s = max(prompt.age_s for prompt in view.prompts), view.first_token_s()
        in_time = waited_s + view.switch_latency_s + need_s <= self.share * view.slo.ttft_s
        return view.cheapest(in_time, need_s * view.iteration_w(view.next_prompt_tokens))
