"""A power limit, as `nvidia-smi -pl` sets it: the GPU runs at the highest clock whose watts stay below the cap.

Real GPUs regulate within milliseconds by watts that they measure; here the clock follows the modelled watts at every
change of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from throttllem.core.clocks.own_policy import EngineView


@dataclass(slots=True, kw_only=True)
class PowerCap:
    """`share`: the cap, of the most that the engine draws at its maximum clock."""

    share: float

    def clock_mhz(self, view: EngineView) -> int:
        """The highest clock under the cap; the lowest where none is."""
        cap_w = self.share * float(view.table.watts[:, -1].max())
        under = view.iteration_w(view.next_prompt_tokens) <= cap_w
        return view.clocks_mhz[len(under) - 1 - int(under[::-1].argmax())] if under.any() else view.clocks_mhz[0]
