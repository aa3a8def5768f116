"""DynamoLLM (arXiv 2408.00741) on one engine: once in an epoch, the cheapest clock of a table by load.

The paper profiles energy and latency by load, lengths, parallelism and clock, and solves for the cheapest setting that
meets the SLOs at the predicted load; of its three controllers only the one of clocks concerns a single engine. Where
requests pile up it goes to the maximum clock. The table is computed here from the performance table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from throttllem.core.clocks.own_policy import EngineView, Floats

EPOCH_S = 60.0
BATCHES = np.unique(np.round(1.3 ** np.arange(0, 24)).astype(int))


@dataclass(slots=True, kw_only=True)
class DynamoLlm:
    """`headroom`: the load that is planned for, of the recent one."""

    headroom: float
    _mhz: int | None = None
    _decided_s: float = -math.inf

    def clock_mhz(self, view: EngineView) -> int:
        """The epoch's clock, or the maximum in an emergency."""
        if view.now_s - self._decided_s >= EPOCH_S and view.recent.output_tokens is not None:
            self._decided_s, self._mhz = view.now_s, self._planned(view)
        oldest_s = max((prompt.age_s for prompt in view.prompts), default=0.0)
        patience_s = min(view.slo.ttft_s or math.inf, 0.1 * (view.slo.e2e_s or math.inf))
        if self._mhz is None or oldest_s > 0.5 * patience_s:
            return view.clocks_mhz[-1]
        return self._mhz

    def _planned(self, view: EngineView) -> int:
        """Of the clocks that hold the load within the SLOs, the one of least watts."""
        output_tokens = view.recent.output_tokens or 1.0
        rate = self.headroom * view.recent.requests_per_s * output_tokens
        token_s, watts = self._settled(view, rate)
        holds = token_s <= (view.slo.tbt_s or math.inf)
        holds &= 3.0 * output_tokens * token_s <= (view.slo.e2e_s or math.inf)
        if view.slo.ttft_s is not None:
            prompt = min(view.prefill_budget_tokens, round(view.recent.prompt_tokens or 0.0))
            holds &= 2.0 * view.iteration_s(prompt) <= view.slo.ttft_s
        return view.cheapest(holds, watts)

    def _settled(self, view: EngineView, rate: float) -> tuple[Floats, Floats]:
        """Seconds between tokens, and mean watts, where each clock settles at `rate` tokens/s; inf where it cannot."""
        token_s = np.full(len(view.clocks_mhz), np.inf)
        watts = np.full(len(view.clocks_mhz), np.inf)
        for batch in reversed([int(batch) for batch in BATCHES if batch <= view.max_batch]):
            each_s = view.token_s(running=batch)
            share = np.minimum(rate * each_s / batch, 2.0)
            keeps_up = share <= 1.0
            token_s = np.where(keeps_up, each_s, token_s)
            busy_w = share * view.iteration_w(running=batch) + (1.0 - share) * view.idle_w
            watts = np.where(keeps_up, busy_w, watts)
        return token_s, watts
