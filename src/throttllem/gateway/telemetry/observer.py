"""Keeps what a control loop did: the flight recorder's lines and the histograms of `/metrics`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from throttllem.core.types import Stepped
from throttllem.gateway.control.loop import Handled
from throttllem.gateway.control.session import Session
from throttllem.gateway.flight.recorder import Recorder
from throttllem.gateway.telemetry.metrics import Histograms


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingObserver:
    """Implements `loop.Observer`. `model` returns the name in metrics; `recorder` None: nothing is recorded."""

    model: Callable[[], str]
    histograms: Histograms
    recorder: Recorder | None

    def handled(self, calls: list[Handled]) -> None:
        """Calls of the core since the last time, in order."""
        if self.recorder is not None:
            self.recorder.record([(call.now_s, call.event, call.commands) for call in calls])
            self.recorder.flush()
        for call in calls:
            event = call.event
            if call.commands or not isinstance(event, Stepped) or event.started or event.finished:
                self.histograms.decision(call.seconds)

    def ended(self, session: Session, met: bool | None) -> None:
        """A request ended; `met`: all its SLOs, None if it had none or its client disconnected."""
        seen = session.latencies()
        ran = session.dispatched_s is not None
        self.histograms.request(
            model=self.model(),
            queue_s=seen.queue_s,
            ttft_s=seen.ttft_s,
            tbt_s=seen.tbt_s,
            e2e_s=seen.e2e_s if session.failure is None else None,
            prompt_tokens=session.prompt_tokens if ran else None,
            generated_tokens=session.generated_tokens if ran else None,
            joules=session.energy_j,
            met=met,
            operation="chat" if session.chat else "text_completion",
        )
