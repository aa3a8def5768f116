"""A driver as others may see it: frozen status out of the core's snapshot, the links and the promises."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from throttllem.core.snapshot import EngineView, Snapshot
from throttllem.core.types import FrequencyPlan
from throttllem.gateway.control.backend import Backend
from throttllem.gateway.control.loop import ControlLoop
from throttllem.gateway.telemetry.status import Ahead, Drift, EngineStatus, LengthStatus, ModelStatus
from throttllem.gpu.device import Reading

_POINTS = 120
_STALLED_AFTER_S = 10.0


def model_status(driver: ControlLoop, names: tuple[str, ...]) -> ModelStatus:
    """One model: its queue, its engines, what the core decided."""
    snapshot = driver.controller.snapshot()
    now_s = driver.now()
    return ModelStatus(
        names=names,
        queue=snapshot.queue,
        head=snapshot.head,
        counts=snapshot.counts,
        engines=tuple(_engine_status(driver, link, snapshot) for link in driver.links),
        recent=driver.promises.recent(now_s),
        ever=driver.promises.ever,
        length=_length_status(snapshot),
        prompt_tokens=driver.prompt_tokens,
        generated_tokens=driver.generated_tokens,
        estimated_prompts=sum(link.estimated_prompts for link in driver.links),
    )


def decision(plan: FrequencyPlan | None) -> str:
    """A plan in words."""
    if plan is None:
        return "no decision yet"
    bound = f" (request {plan.binding})" if plan.binding is not None else ""
    return f"{plan.mhz} MHz: {plan.why.value}{bound}"


def assumptions(driver: ControlLoop, link: Backend) -> tuple[str, ...]:
    """What the core goes by for this engine that nobody has measured."""
    notes = []
    options = driver.controller.options
    if link.clock.mode == "off":
        notes.append("clocks are left alone: [clocks] mode = 'off'")
    elif link.clock.mode == "dry-run":
        notes.append("clocks are not set, only advised: [clocks] mode = 'on' sets them")
    elif link.clock.mode == "simulated" and link.kind != "simulated":
        notes.append(f"clock and watts are those of a simulated {link.catalogue_gpu} with {link.catalogue_model}")
    if options.slo_aware and link.tp not in options.tables:
        notes.append("no performance table: top clock, no admission by promises (throttllem profile, train, --tables)")
    return tuple(notes)


def _engine_status(driver: ControlLoop, link: Backend, snapshot: Snapshot) -> EngineStatus:
    view = next((view for view in snapshot.engines if view.engine == link.key), None)
    connected = link.connected
    reading = link.booking.meter.reading()
    notes = (*(connected.notes if connected else ()), *assumptions(driver, link), *_of_clocks(reading))
    if link.estimated_prompts:
        notes = (*notes, f"the tokens of {link.estimated_prompts} prompts were estimated, not counted")
    if view is not None and view.foreign > 0:
        notes = (
            *notes,
            f"{view.foreign} sequences in this engine are not ours: does another gateway or client use it?",
        )
    state, trouble = engine_state(driver, link)
    spec = connected.spec if connected else None
    return EngineStatus(
        name=link.name,
        kind=link.kind,
        gpu=link.catalogue_gpu,
        model=link.catalogue_model,
        tp=link.tp,
        state=state,
        trouble=trouble,
        notes=notes,
        spec=spec,
        view=view,
        clock_mhz=reading.clock_mhz,
        clocks=link.clock.mode,
        advised_mhz=None if link.clock.mode == "off" else reading.advised_mhz,
        limit_mhz=reading.limit_mhz,
        held=reading.held,
        unset=reading.trouble,
        kv_blocks=view.kv_blocks if view else 0,
        report=link.report,
        drift=_drift(view),
        energy=link.booking.meter.energy(),
        ahead=_ahead(driver, link, view),
        decision=decision(view.plan if view else None),
    )


def _of_clocks(reading: Reading) -> Iterator[str]:
    """Why clocks are not what they should be."""
    if reading.trouble:
        yield f"clocks are only advised, as they cannot be set: {reading.trouble}"
    if reading.held:
        yield f"clocks are held at {reading.limit_mhz} MHz: {reading.held}; planned with that"


def engine_state(driver: ControlLoop, link: Backend) -> tuple[str, str | None]:
    """Up means that it also moves: one that holds requests and gives no sign has stalled."""
    still_s = driver.now() - link.last_sign_s
    if link.state == "up" and link.booking.open and still_s > min(_STALLED_AFTER_S, driver.limits.silence_s / 2):
        return "stalled", f"no sign of progress for {still_s:.0f} s"
    return link.state, link.trouble


def _drift(view: EngineView | None) -> Drift:
    if view is None:
        return Drift()
    drift = view.drift
    return Drift(
        batch=drift.batch,
        kv_blocks=drift.kv_blocks,
        mean_batch=drift.mean_batch,
        mean_kv_blocks=drift.mean_kv_blocks,
        corrections=drift.corrections,
    )


def _ahead(driver: ControlLoop, link: Backend, view: EngineView | None) -> Ahead:
    """The projection at the clock planned, thinned; empty where there is none, or no model to say how long it takes."""
    table = link.booking.meter.table
    projection = None if link.key is None else driver.controller.projection(link.key)
    if table is None or projection is None or view is None or not projection.horizon:
        return Ahead()
    passed = min(max(0, view.iteration - projection.first), projection.horizon - 1)
    batch, kv = projection.batch[passed:], projection.kv_blocks[passed:]
    plan = view.plan.mhz if view.plan else table.clocks_mhz[-1]
    column = table.clocks_mhz.index(plan) if plan in table.clocks_mhz else -1
    seconds = table.seconds[table.cells(batch, kv, projection.prefill_tokens[passed:]), column]
    at_s = np.concatenate([[0.0], np.cumsum(seconds, dtype=np.float64)[:-1]])
    picked = np.unique(np.linspace(0, batch.size - 1, min(_POINTS, batch.size)).astype(np.int64))
    return Ahead(
        at_s=tuple(at_s[picked].round(3).tolist()),
        batch=tuple(batch[picked].tolist()),
        kv_blocks=tuple(kv[picked].tolist()),
    )


def _length_status(snapshot: Snapshot) -> LengthStatus:
    score = snapshot.lengths
    if not score.seen:
        return LengthStatus()
    return LengthStatus(
        seen=score.seen, exceeded=score.exceeded / score.seen, mean_error_tokens=score.error_tokens / score.seen
    )
