"""Which requests are in an engine, and its steps as energy: of exact reports, of prompt counts, or of the time passed.

Between a link and its meter; the time line is the driver's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from throttllem.core.types import EngineSpec
from throttllem.engines.base import Report
from throttllem.gateway.energy.meter import EnergyMeter, Step
from throttllem.gpu.device import Work

_KV_EVERY_S = 0.25


@dataclass(slots=True)
class Open:
    """One request in the engine. `prefill_left` of its prompt tokens are not booked yet."""

    sequences: int
    prefill_left: int
    decodes: bool = False


@dataclass(slots=True)
class EnergyAccounting:
    """The requests in one engine and the time since its last booked step.

    `kv_blocks` asks the core for its estimate, which is looked up a few times a second at most.
    """

    meter: EnergyMeter
    now: Callable[[], float]
    kv_blocks: Callable[[], int]
    open: dict[int, Open] = field(default_factory=dict)
    _block_tokens: int = 1
    _up: bool = False
    _exact: bool = False
    _busy: bool = False
    """An exact engine may be in an iteration, whoever is open: its report will say from when on."""
    _emptied: bool = True
    """Nobody was open at some time since the last mark."""
    _rows: int = 0
    _marked_s: float = 0.0
    _held_blocks: int = 0
    _held_at_s: float = -math.inf

    def __contains__(self, request_id: int) -> bool:
        return request_id in self.open

    def begin(self, spec: EngineSpec, *, exact: bool = False) -> None:
        """The engine came up, empty; whoever is still in `open` has yet to leave. `exact`: its reports will be."""
        self._block_tokens, self._up, self._exact = spec.block_tokens, True, exact
        self._busy, self._emptied = False, True
        self.meter.begin(spec)
        self._marked_s = self.now()

    def end(self) -> None:
        """The engine is gone; nothing runs in it any more."""
        self._until_now()
        for request_id in self.open:
            self.paused(request_id)
        self._up = False

    def dispatched(self, request_id: int, sequences: int, prompt_tokens: int) -> None:
        """A request is about to be sent; `prompt_tokens` of all its prompts together."""
        self.idle()
        self._busy = True
        self.open[request_id] = Open(sequences=sequences, prefill_left=prompt_tokens)

    def joined(self, request_id: int) -> None:
        """A request decodes from the next iteration on."""
        if (here := self.open.get(request_id)) and not here.decodes:
            here.decodes = True
            self._rows += here.sequences
            self.meter.joined(request_id, here.sequences)

    def paused(self, request_id: int) -> None:
        """A request decodes no longer: it was thrown out of the KV cache and waits again, or it has its last token."""
        if (here := self.open.get(request_id)) and here.decodes:
            here.decodes = False
            self._rows -= here.sequences
            self.meter.paused(request_id)

    def left(self, request_id: int) -> float | None:
        """Nothing of this request is in the engine any more; its joules, None if it never ran."""
        if request_id not in self.open:
            return None
        self._until_now()
        self.paused(request_id)
        del self.open[request_id]
        self._emptied = self._emptied or not self.open
        return self.meter.left(request_id)

    def idle(self) -> None:
        """If nothing is open: nothing was since the last mark, unless an iteration is still to be reported."""
        if not self.open and not (self._exact and self._busy):
            self._idle_until(self.now())

    def exact(self, report: Report) -> None:
        """A simulated engine says what its step took, and whose prompts were in it."""
        now_s, seconds = self.now(), report.seconds or 0.0
        self._exact = True
        if self._emptied or not self.open:
            self._idle_until(now_s - seconds)
        self._busy, self._emptied = report.running + report.waiting > 0, not self.open
        work = Work(
            seconds=seconds,
            decode_sequences=report.decode_sequences or 0,
            kv_tokens=report.kv_tokens or 0,
            prefill_tokens=sum(tokens for _, tokens in report.prefills),
            prefill_pairs=report.prefill_pairs,
            joules=report.joules,
        )
        # Who left in mid-iteration has been given a receipt already: it is shared among those who are here.
        prefills = tuple((request_id, tokens) for request_id, tokens in report.prefills if request_id in self.open)
        self.meter.step(Step(work=work, rows=self._rows, kv_blocks=report.kv_blocks or 0, prefills=prefills))
        self._marked_s = now_s

    def prompts(self, tokens: int) -> None:
        """The engine says how many prompt tokens a step held, not whose: the requests that came first, first."""
        prefills: list[tuple[int, int]] = []
        for request_id, here in self.open.items():
            share = min(tokens, here.prefill_left)
            if share > 0:
                here.prefill_left -= share
                prefills.append((request_id, share))
                tokens -= share
        self._step(tuple(prefills))

    def stepped(self, started: tuple[int, ...]) -> None:
        """A step ended now; prompts of those who started in it that are not booked yet were processed in it."""
        prefills = []
        for request_id in started:
            here = self.open.get(request_id)
            if here and here.prefill_left:
                prefills.append((request_id, here.prefill_left))
                here.prefill_left = 0
        self._step(tuple(prefills))

    def _until_now(self) -> None:
        """Book the time since the last mark, unless the engine itself tells what it took."""
        if not self.open:
            self.idle()
        elif not self._exact:
            self._step(())

    def _idle_until(self, until_s: float) -> None:
        if self._up and until_s > self._marked_s:
            self.meter.idle(until_s - self._marked_s)
            self._marked_s = until_s

    def _step(self, prefills: tuple[tuple[int, int], ...]) -> None:
        now_s = self.now()
        seconds, self._marked_s = now_s - self._marked_s, now_s
        if not self._up or (seconds <= 0 and not prefills):
            return
        if now_s - self._held_at_s >= _KV_EVERY_S:
            self._held_at_s, self._held_blocks = now_s, self.kv_blocks()
        rows, tokens = self._rows, sum(share for _, share in prefills)
        work = Work(
            seconds=seconds,
            decode_sequences=rows,
            kv_tokens=self._held_blocks * self._block_tokens,
            prefill_tokens=tokens,
            prefill_pairs=sum(share * share / 2 for _, share in prefills),
        )
        if not rows and not prefills:
            self.meter.idle(seconds)
            return
        self.meter.step(Step(work=work, rows=rows, kv_blocks=self._held_blocks, prefills=prefills))
