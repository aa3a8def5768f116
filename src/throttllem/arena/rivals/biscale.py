"""BiScale (arXiv 2602.18755): predictive control of the clock for prompts, a slack-aware choice for decoding.

The paper places prefill and decode every few minutes, and controls clocks per iteration. Prefill: MPC over the prompts
at hand and those to come. Decode: the lowest clock whose predicted time between tokens leaves slack. One engine does
both, so it runs at the higher clock of the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from throttllem.core.clocks.own_policy import EngineView

HORIZON_S = 5.0
STAGES = 5


@dataclass(slots=True, kw_only=True)
class BiScale:
    """`share`: how much of each SLO may be used up."""

    share: float

    def clock_mhz(self, view: EngineView) -> int:
        """The higher of what decoding and what the prompts need."""
        if not view.running and not view.prompts:
            return view.target_mhz
        return max(self._for_tokens(view), self._for_prompts(view))

    def _for_tokens(self, view: EngineView) -> int:
        """The lowest clock that leaves slack at every stage of the horizon, as the batch grows."""
        in_time = np.ones(len(view.clocks_mhz), dtype=bool)
        token_s = float(view.token_s()[view.clocks_mhz.index(view.clock_mhz)])
        ends = view.running / max(1.0, view.recent.output_tokens or 1.0) / token_s
        grows = max(0.0, view.recent.requests_per_s - ends)
        for stage in range(STAGES):
            batch = view.running + len(view.prompts) + grows * HORIZON_S * stage / STAGES
            in_time &= view.token_s(running=min(view.max_batch, max(1, round(batch)))) <= self.share * (
                view.slo.tbt_s or math.inf
            )
        return view.lowest(in_time)

    def _for_prompts(self, view: EngineView) -> int:
        """The cheapest clock at which the prompts at hand, and as many as the horizon brings meanwhile, are in time."""
        if view.slo.ttft_s is None or not view.prompts:
            return view.clocks_mhz[0]
        need_s = view.first_token_s()
        queue = 1.0 + view.recent.requests_per_s * need_s / len(view.prompts)
        waited_s = max(prompt.age_s for prompt in view.prompts)
        in_time = waited_s + view.switch_latency_s + need_s * queue <= self.share * view.slo.ttft_s
        return view.cheapest(in_time, need_s * view.iteration_w(view.next_prompt_tokens))
