"""Notes how requests and processes of a schedule end, and what the journal holds then. Starts and stops nothing."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.nvml.machine import Machine
from tools.soak.evidence import Ask, Death, Evidence, Loss
from tools.soak.process import SoakProcess


@dataclass(slots=True, kw_only=True)
class Observer:
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

    def gateway_sent(self, line: dict[str, Any], gateway: int) -> None:
        """A line from a gateway: it has a child that holds its sockets."""
        with suppress(ProcessLookupError):
            self.heirs[gateway] = os.pidfd_open(line["child"])

    def asked(self, number: int, gateway: int) -> None:
        """A request is on its way."""
        self.evidence.asks[number] = Ask(gateway=gateway, asked_s=time.monotonic(), at_the_end=self.ending)

    def ended(self, number: int, how: str, why: str, *, begun: bool = True) -> None:
        """It has ended, unless its gateway had before."""
        ask = self.evidence.asks[number]
        if ask.how is None:
            ask.how, ask.why, ask.ended_s, ask.begun = how, why, time.monotonic(), begun

    def gateway_died(self, process: SoakProcess, gateway: int) -> None:
        """Its requests are cut off; its lease ends with the last holder of its sockets, or by time."""
        assert process.ended_s is not None
        for ask in self.evidence.asks.values():
            if ask.gateway == gateway and ask.how is None:
                ask.how, ask.ended_s = "cut", process.ended_s
        self.evidence.gateways.append(Death(at_s=process.ended_s, by_us=process.ended_by_us))
        if not self.rivals:
            schedule = self.evidence.schedule
            held = tuple(index for index, gpu in enumerate(schedule.gpus) if gpu.held)
            at_s = process.ended_s + (schedule.ttl_s if gateway in self.heirs else 0.0)
            self.evidence.losses.append(Loss(at_s=at_s, from_s=process.ended_s, why="the gateway died", gpus=held))

    def keeper_starts(self) -> None:
        """It finds what is there."""
        self.evidence.starts_s.append(time.monotonic())
        if self.journal_gone and noted(self.copies) is None:
            self.evidence.forgot = True

    def keeper_died(self, process: SoakProcess) -> None:
        """Every GPU that it had locked must be in the journal now."""
        assert process.ended_s is not None
        uuids = noted(self.copies)
        unnoted = () if self.journal_gone else self._unnoted(uuids or frozenset())
        self.evidence.deaths.append(Death(at_s=process.ended_s, by_us=process.ended_by_us, unnoted=unnoted))
        opted = tuple(index for index, gpu in enumerate(self.evidence.schedule.gpus) if gpu.allowed)
        now_s = process.ended_s
        self.evidence.losses.append(Loss(at_s=now_s, from_s=now_s, why="the keeper died", gpus=opted))

    def _unnoted(self, uuids: frozenset[str]) -> tuple[int, ...]:
        """GPUs that a keeper has locked, and no other controller since, and that the journal does not name."""
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


# ---- the journal, read from its description and not with its code --------------------------------------------


def noted(copies: Iterable[Path]) -> frozenset[str] | None:
    """UUIDs that the newest whole copy names; None: there is no whole copy."""
    found = [entry for path in copies if (entry := _read(path)) is not None]
    return max(found, key=lambda entry: entry[0])[1] if found else None


def _read(path: Path) -> tuple[int, frozenset[str]] | None:
    try:
        checksum, _, body = path.read_bytes().rstrip(b"\n").partition(b" ")
        if int(checksum, 16) != zlib.crc32(body):
            return None
        number, _, baselines, *_ = json.loads(body)
        return number, frozenset(baselines)
    except (OSError, ValueError):
        return None
