"""What is kept of everything that happens: the flight recorder's lines and the histograms of `/metrics`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from throttllem.core.types import Command, Event, Stepped
from throttllem.gateway.control.session import Session
from throttllem.gateway.flight.recorder import Recorder
from throttllem.gateway.telemetry.metrics import Histograms


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Implements `driver.Observer`. `recorder` None: nothing is recorded."""

    model: Callable[[], str]
    histograms: Histograms
    recorder: Recorder | None

    def handled(self, now_s: float, event: Event, commands: list[Command] | None, seconds: float) -> None:
        """The core took `event` in, in `seconds`, and answered with `commands` (None: it raised)."""
        if self.recorder is not None:
            self.recorder.record(now_s, event, commands)
        if commands or not isinstance(event, Stepped) or event.started or event.finished:
            self.histograms.decision(seconds)

    def ended(self, visit: Session, kept: bool | None) -> None:
        """A request ended; `kept`: all its promises, None if it had none or its client left."""
        seen, request = visit.seen(), visit.request
        self.histograms.request(
            model=self.model(),
            queue_s=seen.queue_s,
            ttft_s=seen.ttft_s,
            tbt_s=seen.tbt_s,
            e2e_s=seen.e2e_s if visit.failure is None else None,
            prompt_tokens=None if visit.dispatched_s is None else request.prompt_tokens * request.sequences,
            generated_tokens=None if visit.dispatched_s is None else visit.generated_tokens,
            joules=visit.energy_j,
            kept=kept,
            operation="chat" if visit.chat else "text_completion",
        )
