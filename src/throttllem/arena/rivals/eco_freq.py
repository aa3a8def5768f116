"""EcoFreq of VoltanaLLM (arXiv 2509.04827): per iteration, the lowest clock that keeps the phase's latency SLO.

The paper predicts TTFT of the prompts at hand and time between tokens by batch and KV, for instances of prefill and of
decode apart, and takes the lowest of a few clocks that meet the SLO. One engine does both here, so both must hold, and
prompts stretch the time between tokens beyond what is predicted.
"""

from __future__ import annotations

from dataclasses import dataclass

from throttllem.core.clocks.own_policy import EngineView


@dataclass(slots=True, kw_only=True)
class EcoFreq:
    """`share`: how much of each SLO may be used up (the paper's SLOs are set by hand; E2E SLOs are unknown to it)."""

    share: float

    def clock_mhz(self, view: EngineView) -> int:
        """The lowest clock in time for tokens, and for first tokens where there is a TTFT SLO."""
        if not view.running and not view.prompts:
            return view.target_mhz
        in_time = view.iteration_s() <= self.share * (view.slo.tbt_s or float("inf"))
        if view.slo.ttft_s is not None and view.prompts:
            waited_s = max(prompt.age_s for prompt in view.prompts)
            in_time &= waited_s + view.switch_latency_s + view.first_token_s() <= self.share * view.slo.ttft_s
        return view.lowest(in_time)
