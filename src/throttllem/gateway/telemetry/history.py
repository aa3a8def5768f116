"""A short memory of a gateway: what it looked like once a second over the last five minutes (less often while it had no
requests), so that a page that is opened now has a past. Knows nothing of pages.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from dataclasses import dataclass

from throttllem.gateway.control.models import Models
from throttllem.gateway.telemetry.status import EngineStatus, GatewayStatus, ModelStatus, gateway_status

KEPT_S = 300.0
PERIOD_S = 1.0
_IDLE_PERIODS = 5
"""A gateway without requests is looked at this much less often: it looks the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSample:
    """One engine at one time; None: not known then."""

    clock_mhz: int | None
    planned_mhz: int | None
    watts: float | None
    running: int | None
    pending: int | None
    kv_blocks: int
    total_j: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSample:
    """One model at one time; `attainment` of the recent requests, None while none of them had an SLO."""

    queue: int
    attainment: float | None
    generated_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The gateway `at_s` seconds after its start: engines by their name, models by their title."""

    at_s: float
    engines: dict[str, EngineSample]
    models: dict[str, ModelSample]


class History:
    """Samples of the last `kept_s` seconds. `run_id` distinguishes starts of the gateway."""

    def __init__(self, *, period_s: float = PERIOD_S, kept_s: float = KEPT_S) -> None:
        self.run_id = secrets.token_hex(4)
        self._period_s = period_s
        self._kept_s = kept_s
        self._samples: deque[Sample] = deque()

    async def run(self, models: Models) -> None:
        """Take a sample every period, until cancelled; fewer while there are no requests."""
        while True:
            status = gateway_status(models)
            self.note(status)
            await asyncio.sleep(self._period_s * (1 if _busy(status) else _IDLE_PERIODS))

    def note(self, status: GatewayStatus) -> None:
        """Remember this status, unless the last one is less than half a period old."""
        samples = self._samples
        if samples and status.now_s - samples[-1].at_s < self._period_s / 2:
            return
        samples.append(sample(status))
        while samples[0].at_s < status.now_s - self._kept_s:
            samples.popleft()

    def since(self, at_s: float | None = None) -> list[Sample]:
        """Samples later than `at_s`, all without it; oldest first."""
        return [one for one in self._samples if at_s is None or one.at_s > at_s]


def sample(status: GatewayStatus) -> Sample:
    """What is remembered of a status."""
    return Sample(
        at_s=status.now_s,
        engines={engine.name: _engine(engine) for model in status.models for engine in model.engines},
        models={model.title: _model(model) for model in status.models},
    )


def _busy(status: GatewayStatus) -> bool:
    """Whether a request waits or runs."""
    return any(
        model.queue or any(engine.view and (engine.view.running or engine.view.pending) for engine in model.engines)
        for model in status.models
    )


def _engine(engine: EngineStatus) -> EngineSample:
    view = engine.view
    return EngineSample(
        clock_mhz=engine.clock_mhz,
        planned_mhz=view.plan.mhz if view and view.plan else None,
        watts=engine.energy.watts,
        running=view.running if view else None,
        pending=view.pending if view else None,
        kv_blocks=engine.kv_blocks,
        total_j=engine.energy.total_j,
    )


def _model(model: ModelStatus) -> ModelSample:
    return ModelSample(queue=model.queue, attainment=model.recent.attainment, generated_tokens=model.generated_tokens)
