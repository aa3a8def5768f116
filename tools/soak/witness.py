"""Notes what processes of a schedule say and how they end. Starts and stops nothing."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.nvml.machine import Machine
from tools.soak.child import Child
from tools.soak.evidence import Death, Evidence, Loss, ParsedRequest
from tools.soak.journal_copy import noted


@dataclass(slots=True, kw_only=True)
class Witness:
    """`journal_gone`: a fault has destroyed both copies; `rivals`: there was more than one gateway at a time. `heirs`
    are pidfds of processes that have a gateway's sockets open, by the number of the gateway.
    """

    evidence: Evidence
    machine: Machine
    copies: tuple[Path, Path]
    journal_gone: bool = False
    rivals: bool = False
    ending: bool = False
    heirs: dict[int, int] = field(default_factory=dict)

    def gateway_said(self, word: dict[str, Any], gateway: int) -> None:
        """A line from a gateway."""
        now_s, asks = time.monotonic(), self.evidence.asks
        match word:
            case {"asked": int(number)}:
                asks[number] = ParsedRequest(gateway=gateway, asked_s=now_s, at_the_end=self.ending)
            case {"ended": int(number), "how": str(how), "why": str(why)}:
                asks[number].how, asks[number].why, asks[number].ended_s = how, why, now_s
            case {"child": int(pid)}:
                with suppress(ProcessLookupError):
                    self.heirs[gateway] = os.pidfd_open(pid)
            case {"failed": str(why)}:
                self.evidence.troubles.append(f"the gateway's stage failed: {why}")

    def gateway_died(self, child: Child, gateway: int) -> None:
        """Its clients saw its connections close; its lease goes with the last holder of its sockets, or by time."""
        assert child.ended_s is not None
        for ask in self.evidence.asks.values():
            if ask.gateway == gateway and ask.how is None:
                ask.how, ask.ended_s = "cut", child.ended_s
        self.evidence.gateways.append(Death(at_s=child.ended_s, told=child.told))
        if not self.rivals:
            schedule = self.evidence.schedule
            held = tuple(index for index, gpu in enumerate(schedule.gpus) if gpu.held)
            at_s = child.ended_s + (schedule.ttl_s if gateway in self.heirs else 0.0)
            self.evidence.losses.append(Loss(at_s=at_s, from_s=child.ended_s, why="the gateway died", gpus=held))

    def keeper_starts(self) -> None:
        """It finds what is there."""
        self.evidence.starts_s.append(time.monotonic())
        if self.journal_gone and noted(self.copies) is None:
            self.evidence.forgot = True

    def keeper_died(self, child: Child) -> None:
        """Whatever it had locked must be on disk now."""
        assert child.ended_s is not None
        uuids = noted(self.copies)
        unnoted = () if self.journal_gone else self._unnoted(uuids or frozenset())
        self.evidence.deaths.append(Death(at_s=child.ended_s, told=child.told, unnoted=unnoted))
        opted = tuple(index for index, gpu in enumerate(self.evidence.schedule.gpus) if gpu.allowed)
        now_s = child.ended_s
        self.evidence.losses.append(Loss(at_s=now_s, from_s=now_s, why="the keeper died", gpus=opted))

    def _unnoted(self, uuids: frozenset[str]) -> tuple[int, ...]:
        """GPUs that a keeper has locked, and nobody since, and that the journal does not name."""
        last = {write.gpu: (write.low, write.high) for write in self.machine.writes() if write.result == 0}
        plans = self.evidence.schedule.gpus
        return tuple(
            gpu.index
            for gpu, plan in zip(self.machine.gpus, plans, strict=True)
            if gpu.lock is not None
            and gpu.lock == last.get(gpu.index)
            and gpu.lock != plan.baseline
            and gpu.uuid not in uuids
        )
