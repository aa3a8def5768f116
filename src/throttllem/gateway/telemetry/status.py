"""Everything that metrics, dashboard and logs may show of a running gateway: frozen, made on demand from the core's
snapshot, the backends and the SLO attainment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from throttllem.core.clocks.gathering import HoldPlan
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.external_load import Drift
from throttllem.core.forecast.margins import ClassAttainment
from throttllem.core.snapshot import Counts, EngineView, Snapshot
from throttllem.core.types import EngineSpec, FrequencyPlan, Slo, Verdict
from throttllem.engines.base import Report
from throttllem.engines.simulated.fleet import UNKNOWN
from throttllem.gateway.control.backend import Backend
from throttllem.gateway.control.loop import ControlLoop
from throttllem.gateway.control.models import Models
from throttllem.gateway.control.slo_attainment import SloCounts
from throttllem.gateway.energy.accounting import Energy
from throttllem.gpu.device import Reading

_SPECULATES = 1.05
"""Tokens a step from which an engine counts as one that speculates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """The projection from now on, thinned to at most 120 points: seconds from now, requests, KV blocks."""

    at_s: tuple[float, ...] = ()
    batch: tuple[int, ...] = ()
    kv_blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TableBand:
    """One clock band of the performance table, against what the engine does there: `seconds_bias` and `watts_bias` are
    what decoding took and drew over what the table says (1.1: 10 % more; None: not metered), `factor` corrects the
    table's seconds (1: not corrected).
    """

    low_mhz: int
    high_mhz: int
    seconds_bias: float | None
    watts_bias: float | None
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """One engine of the configuration. `view` None: the core does not know it now (down, or starting).

    `state`: "up", "starting", "down" or "stalled"; `trouble` is the reason. `clock_mhz` None: unknown.
    `starts` of its process by the gateway, and `process_failures`: starts that failed and ends that the gateway did not
    ask for (both None: the gateway starts none).
    `kv_blocks` is the scoreboard's estimate, `report` the engine's last report. `clocks` is how clocks are set
    ("on", "dry-run", "off"; "simulated"), `advised_mhz` what would be set, `held` what keeps GPUs from following and
    `unset` why they are not set though they should be. `table` is how far its performance table is from it,
    `clock_axis` whether that table tells one clock from another (None: there is no table).
    """

    name: str
    kind: str
    gpu: str
    model: str
    tp: int
    state: str
    trouble: str | None = None
    starts: int | None = None
    process_failures: int | None = None
    notes: tuple[str, ...] = ()
    spec: EngineSpec | None = None
    view: EngineView | None = None
    clock_mhz: int | None = None
    clocks: str = "simulated"
    advised_mhz: int | None = None
    limit_mhz: int | None = None
    held: str | None = None
    unset: str | None = None
    kv_blocks: int = 0
    report: Report | None = None
    drift: Drift = field(default_factory=Drift)
    table: tuple[TableBand, ...] = ()
    clock_axis: bool | None = None
    energy: Energy = field(default_factory=Energy)
    ahead: Ahead = field(default_factory=Ahead)
    decision: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthStatus:
    """How well lengths are predicted: answers seen, the fraction that outgrew its prediction, mean absolute error of
    the prediction before inflation in tokens.
    """

    seen: int = 0
    exceeded: float | None = None
    mean_error_tokens: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """One model that is served: its queue, its engines, what the core decided. `held` requests of the queue can wait,
    by the plan `hold` (None: none are held). `doubtful`: the core failed, and no request that came since was served.
    `classes`: attainment asked and had by SLO class, with what was learned.
    """

    names: tuple[str, ...]
    queue: int
    held: int
    hold: HoldPlan | None
    head: Verdict | None
    counts: Counts
    engines: tuple[EngineStatus, ...]
    recent: SloCounts
    ever: SloCounts
    length: LengthStatus
    classes: tuple[ClassAttainment, ...] = ()
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    estimated_outputs: int = 0
    estimated_prompts: int = 0
    doubtful: bool = False
    core_faults: int = 0
    engine_rebuilds: int = 0

    @property
    def title(self) -> str:
        """The first of its names; its first engine's where no engine has reported one yet."""
        return next(iter(self.names), self.engines[0].name if self.engines else "unknown")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayStatus:
    """The whole gateway. `now_s` is its own time line, from 0 at its start; `phase` "serving" or "draining".

    `uncontrolled`: requests that were passed on to an engine without control so far.
    """

    version: str
    policy: str
    phase: str
    now_s: float
    slo: Slo
    models: tuple[ModelStatus, ...]
    uncontrolled: int = 0


_POINTS = 120
_DEARER, _FEWEST_SERVED = 0.01, 20
"""A loss of that fraction is shown, once so many requests were served."""
_DOUBTFUL = 1.12
"""A bias that is no longer a table's own error; in a dry run nothing corrects it."""


def gateway_status(models: Models) -> GatewayStatus:
    """Everything that may be shown now."""
    return GatewayStatus(
        version=models.version,
        policy=models.policy,
        phase="draining" if models.draining else "serving",
        now_s=models.now() - models.started_s,
        slo=models.slo,
        models=tuple(_model_status(model.loop, model.all_names()) for model in models.served),
        uncontrolled=models.uncontrolled,
    )


def _model_status(loop: ControlLoop, names: tuple[str, ...]) -> ModelStatus:
    """One model: its queue, its engines, what the core decided."""
    snapshot = loop.controller.snapshot()
    return ModelStatus(
        names=names,
        queue=snapshot.queue,
        held=snapshot.held,
        hold=snapshot.hold,
        head=snapshot.head,
        counts=snapshot.counts,
        engines=tuple(_engine_status(loop, backend, snapshot) for backend in loop.backends),
        recent=loop.slo_attainment.recent(loop.now()),
        ever=loop.slo_attainment.ever,
        length=_length_status(snapshot),
        classes=snapshot.attainment,
        prompt_tokens=loop.prompt_tokens,
        cached_prompt_tokens=loop.cached_prompt_tokens,
        generated_tokens=loop.generated_tokens,
        estimated_outputs=loop.estimated_outputs,
        estimated_prompts=sum(backend.estimated_prompts for backend in loop.backends),
        doubtful=loop.doubtful,
        core_faults=loop.core_faults,
        engine_rebuilds=loop.engine_rebuilds,
    )


def decision(plan: FrequencyPlan | None) -> str:
    """A plan as text."""
    if plan is None:
        return "no decision yet"
    bound = f" (request {plan.binding})" if plan.binding is not None else ""
    return f"{plan.mhz} MHz: {plan.why.value}{bound}"


def assumptions(loop: ControlLoop, backend: Backend) -> tuple[str, ...]:
    """What the core assumes for this engine that was not measured."""
    notes = [*backend.gpu_notes]
    options = loop.controller.options
    if backend.clock.mode == "off":
        notes.append("clocks are left alone: [clocks] mode = 'off'")
    elif backend.clock.mode == "dry-run":
        notes.append("dry run: clocks are decided and shown, not set; [clocks] mode = 'on' sets them")
    elif backend.clock.mode == "simulated" and backend.kind != "simulated":
        what = f"clock and watts are those of a simulated {backend.catalogue_gpu} with {backend.model.name}"
        lacks = "no GPU is named (engines.N.gpu, --gpu)" if backend.model.known else "its model is not"
        unknown = (
            f"the clock is that of a simulated {backend.catalogue_gpu}, and watts and joules are not known: {lacks}"
        )
        notes.append(what if backend.accounting.known() else unknown)
    notes += backend.model.notes
    if options.slo_aware and backend.tp not in options.tables:
        notes.append(
            "no performance table: GPUs stay at the maximum clock, and requests are admitted without checking SLOs "
            "(throttllem profile, train, --tables)"
        )
    table = options.tables.get(backend.tp)
    if table is not None and not table.clocks_measured:
        notes.append(
            "the clock axis of the performance table was not measured: GPUs stay at the maximum clock, and no saving "
            "is estimated (throttllem profile with --gpus and --clocks)"
        )
    if table is not None and table.verdict is not None and table.verdict.faults:
        overruled = "accepted with --accept" if table.verdict.accepted else "--clocks on refuses it"
        notes.append(f"of the performance table `train` found: {'; '.join(table.verdict.faults)} ({overruled})")
    return tuple(notes)


def _engine_status(loop: ControlLoop, backend: Backend, snapshot: Snapshot) -> EngineStatus:
    view = next((view for view in snapshot.engines if view.engine == backend.key), None)
    connected = backend.connected
    energy, reading = backend.accounting.energy(), backend.accounting.reading()
    process = backend.process
    notes = [note] if (note := process.note) else []
    notes += [*(connected.notes if connected else ()), *assumptions(loop, backend), *_clock_notes(reading)]
    if backend.estimated_prompts:
        notes.append(f"the tokens of {backend.estimated_prompts} prompts were estimated, not counted")
    if view is not None and view.external_sequences > 0:
        notes.append(
            f"{view.external_sequences} sequences in this engine are not ours: does another gateway or client use it?"
        )
    notes += _speculation_notes(loop, backend)
    notes += _dearer_notes(loop, energy)
    table = _table(backend, view)
    notes += _table_notes(table, beyond=view is not None and view.beyond_table)
    state, trouble = backend.health(loop.limits.silence_s)
    return EngineStatus(
        name=backend.name,
        kind=backend.kind,
        gpu=backend.catalogue_gpu,
        model=backend.model.name or UNKNOWN,
        tp=backend.tp,
        state=state,
        trouble=trouble,
        starts=process.starts if process.starts_it else None,
        process_failures=process.failures if process.starts_it else None,
        notes=tuple(notes),
        spec=connected.spec if connected else None,
        view=view,
        clock_mhz=reading.clock_mhz,
        clocks=backend.clock.mode,
        advised_mhz=None if backend.clock.mode == "off" else reading.dry_run_mhz,
        limit_mhz=reading.limit_mhz,
        held=reading.held,
        unset=reading.trouble,
        kv_blocks=view.kv_blocks if view else 0,
        report=backend.report,
        drift=view.drift if view else Drift(),
        table=table,
        clock_axis=_clock_axis(loop, backend),
        energy=energy,
        ahead=_ahead(loop, backend, view),
        decision=decision(view.plan if view else None),
    )


def _clock_axis(loop: ControlLoop, backend: Backend) -> bool | None:
    table = loop.controller.options.tables.get(backend.tp)
    return None if table is None else table.clocks_measured


def _table(backend: Backend, view: EngineView | None) -> tuple[TableBand, ...]:
    """The bands of the engine's table. The core's bias, where it has one, is what its correction rests on."""
    meter = backend.accounting.meter
    if meter is None:
        return ()
    by_core = {band.low_mhz: band for band in (view.table_drift if view else ())}
    found = []
    for band in meter.view():
        core = by_core.get(band.low_mhz)
        found.append(
            TableBand(
                low_mhz=band.low_mhz,
                high_mhz=band.high_mhz,
                seconds_bias=band.seconds_bias if core is None or core.bias is None else core.bias,
                watts_bias=band.watts_bias,
                factor=1.0 if core is None else core.factor,
            )
        )
    return tuple(found)


def _speculation_notes(loop: ControlLoop, backend: Backend) -> Iterator[str]:
    """What times rest on where the engine speculates, or its table was measured while it did."""
    rate = 1.0 if backend.progress is None else backend.progress.tokens_per_step
    table = loop.controller.options.tables.get(backend.tp)
    profiled = None if table is None or table.verdict is None else table.verdict.tokens_per_step
    if rate > _SPECULATES:
        steps = getattr(backend.engine, "steps", None)
        counted = "of each step" if steps is not None and steps.received else "scraped from its metrics: an estimate"
        text = f"the engine speculates: {rate:.2f} tokens a step lately, by its own counts ({counted})"
        if table is not None and (profiled is None or profiled <= _SPECULATES):
            of = "may not have been" if profiled is None else "was not"
            text += f"; its performance table {of} measured with speculation, whose steps take longer: profile again"
        yield text
    elif profiled is not None and profiled > _SPECULATES and backend.progress is not None:
        yield (
            f"the performance table was measured with speculation ({profiled:.2f} tokens a step), and the engine shows "
            "none now"
        )


def _dearer_notes(loop: ControlLoop, energy: Energy) -> Iterator[str]:
    """That the paper's policy has cost more than the maximum clock would have, if it did."""
    lowest = loop.controller.options.throttle.policy is ClockPolicy.THROTTLLEM
    saved, served = energy.saved, loop.controller.snapshot().counts.finished
    if lowest and saved is not None and saved < -_DEARER and served >= _FEWEST_SERVED:
        rate = served / max(loop.now(), 1.0)
        yield (
            f"policy throttllem took {-saved:.1%} more energy than the maximum clock would have (estimate), at "
            f"{rate:.2g} requests/s on the mean: it takes the lowest clock, whatever the GPUs draw at it; least-energy "
            "takes the cheapest"
        )


def _table_notes(table: tuple[TableBand, ...], *, beyond: bool) -> Iterator[str]:
    """What is wrong with a performance table, in words."""
    worst = max((band for band in table if band.seconds_bias), key=_distance, default=None)
    if worst is None:
        return
    where = f"at {worst.low_mhz} to {worst.high_mhz} MHz iterations take {worst.seconds_bias:.2f} times what it says"
    if beyond:
        yield f"the performance table is no basis for a clock: {where}; maximum clock until that is over. Profile again"
    elif any(band.factor != 1.0 for band in table):
        yield f"the performance table is stale: {where}; it is corrected. Profile again"
    elif _distance(worst) > math.log(_DOUBTFUL):
        yield f"the performance table may be stale: {where}. Profile again before clocks are set by it"


def _distance(band: TableBand) -> float:
    return abs(math.log(band.seconds_bias or 1.0))


def _clock_notes(reading: Reading) -> Iterator[str]:
    """Why clocks and joules are not as planned."""
    if reading.misplaced:
        yield f"!! {reading.misplaced}"
    if reading.trouble:
        yield f"dry run, as clocks cannot be set: {reading.trouble}"
    if reading.held:
        yield f"clocks are held at {reading.limit_mhz} MHz: {reading.held}; planned with that"
    if reading.counter_trouble:
        yield f"joules: {reading.counter_trouble}"


def _ahead(loop: ControlLoop, backend: Backend, view: EngineView | None) -> Ahead:
    """The projection at the planned clock, thinned; empty where there is none, or no performance table."""
    table = None if backend.accounting.at_maximum is None else backend.accounting.at_maximum.table
    projection = None if backend.key is None else loop.controller.projection(backend.key)
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
