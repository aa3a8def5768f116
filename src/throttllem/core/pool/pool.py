"""How the engines of a pool come to be as many of each size as are wanted: what to start, to drain and to stop.

Every start ends: the engine is ready, it fails, or its deadline passes. Knows nothing of requests, nor of why so many
are wanted.
"""

# The rules, each after something that went wrong elsewhere. An engine is stopped only when it is empty: one too many
# takes no new requests and ends those that it has. None drains before those that are to replace it serve, unless their
# GPUs are needed. One that is not up yet is given up before one that serves. Engines that start, serve and drain never
# have more GPUs than the pool. A start that hangs ends at a deadline, and holds up nothing else meanwhile. A size whose
# start failed is tried again after a pause, which doubles each time.

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from throttllem.core.engine_state import EngineState, Phase
from throttllem.core.types import OptionError, check

_DEADLINE = 4.0
"""A start may take this many times as long as engines of its size do."""
_LEAST_DEADLINE_S = 10.0
_MOST_PAUSES = 3
"""Doublings of the pause after a failed start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """A pool of `gpus`, and how many `engines` of each size (tensor parallel degree) it begins with. `free_w`: watts of
    a GPU without an engine.

    `start_s` None: the driver brings up the first engine, and a start may take several times what engines of its size
    take. Else the pool starts all of them, and a start may take so long (inf: what starts them sees to its end).
    """

    gpus: int
    engines: Mapping[int, int]
    start_s: float | None = None
    free_w: float = 0.0

    def __post_init__(self) -> None:
        check("pool", gpus=(self.gpus, 1, 1_000_000))
        needed = sum(tp * count for tp, count in self.engines.items())
        if min(self.engines.values(), default=0) < 0 or not 0 < needed <= self.gpus:
            raise OptionError("pool", "engines", dict(self.engines), f"must be one or more that fit {self.gpus} GPUs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Starts of one size that failed in a row, and the time before which none is tried: `alone_s` as long as no engine
    serves or starts, so that the pool is not down for a long pause, `until_s` otherwise.
    """

    count: int
    until_s: float
    alone_s: float

    def ends_s(self, *, alone: bool) -> float:
        """When the pause is over."""
        return self.alone_s if alone else self.until_s


@dataclass(slots=True, kw_only=True)
class Changes:
    """What is to be done: sizes to `start`, engines to `serve` again, to `drain`, and to `stop` while they start.
    `missing`: how many engines of each size do not serve yet; `alone`: whether no other serves or starts.
    """

    start: list[int] = field(default_factory=list)
    serve: list[EngineState] = field(default_factory=list)
    drain: list[EngineState] = field(default_factory=list)
    stop: list[EngineState] = field(default_factory=list)
    missing: dict[int, int] = field(default_factory=dict)
    alone: bool = False


@dataclass(slots=True, kw_only=True)
class Pool:
    """State of the pool: engines that are to serve (`target`, by size), when starts end at the latest (`starts`, by
    engine), `failures` by size, and when something is to be done without an event (`due_s`; inf: never). `start_s`: see
    `PoolOptions`.
    """

    gpus: int
    target: dict[int, int]
    start_s: float | None = None
    starts: dict[int, float] = field(default_factory=dict)
    failures: dict[int, Failures] = field(default_factory=dict)
    due_s: float = math.inf

    def started(self, engine: int, startup_s: float, now_s: float) -> None:
        """A start was commanded."""
        limit_s = max(_LEAST_DEADLINE_S, _DEADLINE * startup_s) if self.start_s is None else self.start_s
        self.starts[engine] = now_s + limit_s

    def ready(self, engine: EngineState) -> None:
        """It is up."""
        self.starts.pop(engine.engine, None)
        self.failures.pop(engine.tp, None)

    def given_up(self, engine: EngineState) -> None:
        """It starts no more, as it is not wanted any longer."""
        del self.starts[engine.engine]

    def lost(self, engine: EngineState, startup_s: float, now_s: float) -> None:
        """It is gone; a start that failed is tried again after a pause."""
        if self.starts.pop(engine.engine, None) is None:
            return
        count = self.failures[engine.tp].count + 1 if engine.tp in self.failures else 1
        pause_s = max(1.0, startup_s)
        until_s = now_s + pause_s * 2.0 ** min(count - 1, _MOST_PAUSES)
        self.failures[engine.tp] = Failures(count=count, until_s=until_s, alone_s=now_s + pause_s)

    def with_one(self, tp: int, target: Mapping[int, int]) -> dict[int, int]:
        """The target with one engine of size `tp` in place of as many of the smallest as it needs the GPUs of."""
        found = dict(sorted(target.items()))
        for size in list(found):
            while found[size] and sum(other * count for other, count in found.items()) + tp > self.gpus:
                found[size] -= 1
        return {size: count for size, count in (found | {tp: found.get(tp, 0) + 1}).items() if count}

    def overdue(self, now_s: float) -> list[int]:
        """Engines whose start has not ended in time."""
        return [engine for engine, deadline_s in self.starts.items() if deadline_s <= now_s]

    def changes(self, engines: Iterable[EngineState], now_s: float) -> Changes:
        """What brings the engines closer to the target now. O(engines): to be asked when engines, target or `due_s`
        call for it.
        """
        engines = list(engines)
        by_phase: dict[Phase, dict[int, list[EngineState]]] = {phase: {} for phase in Phase}
        for engine in engines:
            by_phase[engine.phase].setdefault(engine.tp, []).append(engine)
        changes, start = Changes(), []
        for tp in sorted({*self.target, *(engine.tp for engine in engines)}, reverse=True):
            wanted, starting = self.target.get(tp, 0), by_phase[Phase.STARTING].get(tp, [])
            serving = len(by_phase[Phase.SERVING].get(tp, []))
            again = _fullest(by_phase[Phase.DRAINING].get(tp, []))[: max(0, wanted - serving)]
            changes.serve += again
            changes.missing[tp] = max(0, wanted - serving - len(again))
            changes.stop += starting[changes.missing[tp] :]
            start += [tp] * (changes.missing[tp] - len(starting))
        changes.alone = not by_phase[Phase.SERVING] and not changes.serve and len(self.starts) <= len(changes.stop)
        free = self.gpus - _gpus(engines) + _gpus(changes.stop)
        lacking = 0
        for tp in start:
            if tp in self.failures and self.failures[tp].ends_s(alone=changes.alone) > now_s:
                continue
            if tp > free:
                lacking += tp
                continue
            changes.start.append(tp)
            free -= tp
        draining = [engine for found in by_phase[Phase.DRAINING].values() for engine in found]
        lacking -= free + _gpus(draining) - _gpus(changes.serve)
        starts = bool(changes.start or len(self.starts) > len(changes.stop))
        changes.drain = self._surplus(by_phase[Phase.SERVING], any(changes.missing.values()), lacking, starts=starts)
        return changes

    def find_due(self, changes: Changes, now_s: float) -> None:
        """Find `due_s`: the deadline of a start, or the end of a pause of a size of which engines are missing."""
        alone = changes.alone and not changes.start
        ends = (failed.ends_s(alone=alone) for tp, failed in self.failures.items() if changes.missing.get(tp))
        self.due_s = min([*self.starts.values(), *(end_s for end_s in ends if end_s > now_s)], default=math.inf)

    def _surplus(
        self, serving: Mapping[int, list[EngineState]], missing: bool, lacking: int, *, starts: bool
    ) -> list[EngineState]:
        """Engines that serve and are too many: all once none is missing, otherwise those whose GPUs others are
        `lacking`, where the last one that serves stays as long as another one `starts`.
        """
        found: list[EngineState] = []
        count = sum(map(len, serving.values()))
        for tp, engines in serving.items():
            for engine in reversed(_fullest(engines)[self.target.get(tp, 0) :]):
                if not missing or (_gpus(found) < lacking and (count - len(found) > 1 or not starts)):
                    found.append(engine)
        return found


def _gpus(engines: Iterable[EngineState]) -> int:
    return sum(engine.tp for engine in engines)


def _fullest(engines: Iterable[EngineState]) -> list[EngineState]:
    """Those with the most requests first, then the oldest."""
    return sorted(engines, key=lambda engine: (-len(engine.board), engine.engine))
