"""A clock policy of one's own, in the simulation and in the arena. From this folder:

throttllem simulate --policy triton,least-energy,own_policy:LowestInTime --seconds 300
throttllem arena --grid tuning --cells "40 %" --policies least-energy,own_policy:LowestInTime
"""

from throttllem.core.clocks.own_policy import EngineView

SHARE = 0.4
"""Of each SLO that may be used up."""


class LowestInTime:
    """The lowest clock at which tokens, and the first token of every waiting prompt, come in time."""

    def clock_mhz(self, view: EngineView) -> int:
        """Asked at every change, and once a second."""
        if not view.running and not view.prompts:
            return view.target_mhz
        in_time = view.token_s() <= SHARE * (view.slo.tbt_s or 0.2)
        if view.prompts:
            left_s = (view.slo.ttft_s or 2.0) * SHARE - max(prompt.age_s for prompt in view.prompts)
            in_time &= view.first_token_s() + view.switch_latency_s <= left_s
        return view.lowest(in_time)
