"""From options to a gateway that can start: engines, their GPUs, tables, controllers, recorders. Reaches nothing yet.

Everything that can be refused is refused here, with the option's name, before a port is served.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from throttllem.config import ClockOptions, EngineEntry, Options
from throttllem.core.clocks.policy import ClockPolicy, Policy, parse_policy
from throttllem.core.controller import Controller
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.lengths.online import OnlineLengthOptions, OnlineLengthPredictor
from throttllem.core.lengths.prediction import LengthPredictor, MaxTokens
from throttllem.core.options import ControllerOptions
from throttllem.core.pool.pool import PoolOptions
from throttllem.core.types import EngineSpec
from throttllem.engines.simulated.fleet import build_fleet, fleet_without_model
from throttllem.gateway.control.backend_factory import BackendFactory, RealGpu, called, sets_clocks
from throttllem.gateway.control.engine_model import of_another_model
from throttllem.gateway.control.loop import ControlLoop
from throttllem.gateway.control.models import Models, ServedModel
from throttllem.gateway.flight.recorder import Recorder
from throttllem.gateway.flight.recordings import safe_name
from throttllem.gateway.rehearsal import rehearse
from throttllem.gateway.telemetry.metrics import Histograms
from throttllem.gateway.telemetry.observer import RecordingObserver
from throttllem.gpu.boards.facts import kind_of
from throttllem.gpu.nvml import NvmlError
from throttllem.launchers.local import LocalLauncher
from throttllem.physics.catalogue import Catalogue
from throttllem.profiling.lengths import load_lengths
from throttllem.profiling.storage import load_table, profiled_model

Progress = Callable[[str, float], None]
"""Called with what is being done and the share that is done (0 to 1)."""

log = logging.getLogger("throttllem.gateway")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """Everything that runs, and what must be saved when it stops."""

    models: Models
    histograms: Histograms
    recorders: tuple[Recorder, ...]
    hardware: tuple[RealGpu, ...]
    predictors: tuple[tuple[Path, OnlineLengthPredictor], ...]
    local: LocalLauncher

    def flush(self) -> None:
        """Hand to recorders and histograms what the control loops did."""
        for model in self.models.served:
            model.loop.flush()


def build_gateway(
    options: Options,
    cache_dir: Path,
    *,
    version: str,
    now: Callable[[], float],
    progress: Progress = lambda *_: None,
    learn: bool = True,
) -> Gateway:
    """The gateway of these options. `learn` False: nothing slow, simulated engines go without a table.

    Raises ValueError for what cannot be, OSError for files that cannot be read.
    """
    catalogue, entries, notes = recognised_engines(options.engines, Catalogue.load(options.catalogue), options.clocks)
    options = options.model_copy(update={"engines": entries})
    histograms = Histograms()
    served, recorders, predictors = [], [], []
    hardware: list[RealGpu] = []
    where = cache_dir if learn else None
    local = LocalLauncher(options.state_dir.expanduser() / "engines")
    part = _Part(
        options=options,
        catalogue=catalogue,
        cache_dir=where,
        now=now,
        progress=progress,
        notes=notes,
        local=local,
        version=version,
    )
    for group in groups(options.engines):
        model = part.build(group, histograms)
        served.append(model.served)
        recorders.extend([model.recorder] if model.recorder else [])
        predictors.extend([model.predictor] if model.predictor else [])
        hardware.extend(backend.gpu for backend in model.served.loop.backends if isinstance(backend.gpu, RealGpu))
    models = Models(
        served=tuple(served), version=version, policy=options.policy, slo=options.slo, now=now, started_s=now()
    )
    return Gateway(
        models=models,
        histograms=histograms,
        recorders=tuple(recorders),
        hardware=tuple(hardware),
        predictors=tuple(predictors),
        local=local,
    )


def recognised_engines(
    entries: tuple[EngineEntry, ...], catalogue: Catalogue, clocks: ClockOptions
) -> tuple[Catalogue, tuple[EngineEntry, ...], dict[tuple[str, ...], tuple[str, ...]]]:
    """The engines with the kind of their boards; the catalogue with the kinds that it lacks; by an engine's GPUs, what
    is to be known of them. Where NVML cannot be read, nothing changes: opening the GPUs reports it.

    Raises ValueError for a board that is not here, or not of the kind that was named.
    """
    found, notes = list[EngineEntry](), dict[tuple[str, ...], tuple[str, ...]]()
    for entry in entries:
        found.append(entry)
        if entry.gpus is not None and entry.agent is None:
            with contextlib.suppress(NvmlError):
                kind = kind_of(entry.gpus, entry.gpu, catalogue, only_warn=clocks.mode == "off")
                catalogue, notes[entry.gpus] = catalogue.having(kind.gpu), kind.notes
                found[-1] = replace(entry, gpu=kind.gpu.name)
    return catalogue, tuple(found), notes


def groups(entries: tuple[EngineEntry, ...]) -> list[tuple[EngineEntry, ...]]:
    """Engines of one model and one name belong together, and serve it side by side, or by size. Raises ValueError for
    two at one address, and for two of one size whose tables differ.
    """
    if not entries:
        raise ValueError("engines: none is configured; without [[engines]] the simulated one is served")
    numbered = sorted(entries, key=_together)
    found = [tuple(group) for _, group in groupby(numbered, key=_together)]
    for group in found:
        urls = [entry.url for entry in group if entry.url is not None]
        if twice := [url for url in urls if urls.count(url) > 1]:
            raise ValueError(f"engines: two have url = {twice[0]}: it is one engine, which is named once")
        tables: dict[int, Path | None] = {}
        for entry in group:
            if tables.setdefault(entry.tp, entry.tables) != entry.tables:
                raise ValueError(
                    f"engines: two of model {called(group[0])} with tp = {entry.tp} have different tables: engines of "
                    "a size that serve side by side are alike; name the same `tables`, or give one another served_as"
                )
    names = [called(group[0]) for group in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"engines: two models are called {name}: give each its own served_as, as clients name it")
    return found


def _number(entries: tuple[EngineEntry, ...], place: int) -> int | None:
    """Which engine of its size it is, from 1; None: the only one."""
    same = [other for other, entry in enumerate(entries) if entry.tp == entries[place].tp]
    return same.index(place) + 1 if len(same) > 1 else None


def _pool(entries: tuple[EngineEntry, ...], policy: Policy, *, free_w: float) -> PoolOptions | None:
    """Several engines serve side by side; None: there is one, or the policy selects its size. Raises ValueError."""
    counts = Counter(entry.tp for entry in entries)
    if policy.autoscale and len(counts) > 1:
        tp, count = counts.most_common(1)[0]
        if count > 1:
            raise ValueError(
                f"policy {policy.name!r}: it selects how many engines of one size serve, or one engine of several "
                f"sizes, and {count} of {len(entries)} have tp = {tp}; leave one of each size, or engines of one size, "
                "or leave out +autoscale: then all engines serve side by side"
            )
        return None
    if len(entries) == 1:
        return None
    return PoolOptions(gpus=sum(entry.tp for entry in entries), engines=dict(counts), start_s=math.inf, free_w=free_w)


def _together(entry: EngineEntry) -> tuple[str, str, str]:
    return entry.kind_of_gpu, entry.model or "", entry.served_as or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Built:
    served: ServedModel
    recorder: Recorder | None
    predictor: tuple[Path, OnlineLengthPredictor] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One model's worth of building."""

    options: Options
    catalogue: Catalogue
    cache_dir: Path | None
    now: Callable[[], float]
    progress: Progress
    notes: dict[tuple[str, ...], tuple[str, ...]]
    local: LocalLauncher
    version: str

    def build(self, entries: tuple[EngineEntry, ...], histograms: Histograms) -> _Built:
        options, first = self.options, entries[0]
        sizes = tuple(sorted({entry.tp for entry in entries}))
        if first.model is None:
            fleet = fleet_without_model(self.catalogue, first.kind_of_gpu, sizes, options.batching)
        else:
            fleet = build_fleet(self.catalogue, first.kind_of_gpu, first.model, sizes, options.batching)
        # Engines of one size are a choice too: how many of them serve.
        policy = parse_policy(options.policy, fleet.clocks_mhz, tuple(entry.tp for entry in entries))
        tables = self._tables(entries, policy)
        predictor, file = self._predictor(first)
        core = self._controller_options(entries, policy, fleet.specs, tables, predictor)
        if self.cache_dir is not None and policy.slo_aware:
            rehearse(core)
        controller = Controller(core)
        factory = BackendFactory(
            options=options,
            catalogue=self.catalogue,
            histograms=histograms,
            now=self.now,
            local=self.local,
            version=self.version,
        )
        backends = tuple(
            factory.backend(
                entry,
                fleet,
                tables.get(entry.tp),
                controller,
                self.notes.get(entry.gpus or (), ()),
                number=_number(entries, place),
            )
            for place, entry in enumerate(entries)
        )
        recorder = self._recorder(first, controller)
        observer = RecordingObserver(
            model=lambda: next(iter(served.all_names()), called(first)), histograms=histograms, recorder=recorder
        )
        loop = ControlLoop(
            controller=controller, backends=backends, limits=options.limits, now=self.now, observer=observer
        )
        served = ServedModel(loop=loop, names=(first.served_as,) if first.served_as else ())
        learned = (file, predictor) if isinstance(predictor, OnlineLengthPredictor) else None
        return _Built(served=served, recorder=recorder, predictor=learned)

    def _controller_options(
        self,
        entries: tuple[EngineEntry, ...],
        policy: Policy,
        specs: dict[int, EngineSpec],
        tables: dict[int, PerformanceTable],
        predictor: LengthPredictor,
    ) -> ControllerOptions:
        options = self.options
        real = any(entry.gpus is not None for entry in entries)
        clock = ClockPolicy.TOP if real and options.clocks.mode == "off" else policy.clock
        if policy.autoscale and set(options.autoscale.capacity_rps) != set(specs):
            raise ValueError(
                f"policy {options.policy!r}: [autoscale.capacity_rps] must give the requests/s that each size bears "
                f"({', '.join(str(tp) for tp in sorted(specs))}); `throttllem characterize` finds them"
            )
        # A law that was calibrated on a few points may err by more than the margin for a measured table.
        stated = [table.calibrated.seconds_error for table in tables.values() if table.calibrated]
        margin = max(options.throttle.margin, *stated) if stated else options.throttle.margin
        admission = options.admission
        if stated:
            admission = replace(admission, margin=max(admission.margin, *stated))
        return ControllerOptions(
            throttle=replace(options.throttle, policy=clock, fixed_mhz=policy.fixed_mhz, margin=margin),
            slo_aware=policy.slo_aware,
            admission=admission,
            autoscale=options.autoscale if policy.autoscale else None,
            pool=_pool(entries, policy, free_w=self.catalogue.gpu(entries[0].kind_of_gpu).power.bare_idle_w),
            predictor=predictor,
            specs=specs,
            tables=tables,
            day_offset_s=time.time() - self.now(),
        )

    def _tables(self, entries: tuple[EngineEntry, ...], policy: Policy) -> dict[int, PerformanceTable]:
        """The tables that were named; simulated engines without one are learned (and cached)."""
        tables = {}
        for entry in entries:
            if entry.tables is not None:
                tables[entry.tp] = self._table(entry, entry.tables.expanduser() / f"table-tp{entry.tp}.npz")
            elif entry.kind == "simulated" and entry.model and policy.slo_aware and self.cache_dir is not None:
                from throttllem.profiling.tables import performance_tables  # noqa: PLC0415

                alone = build_fleet(self.catalogue, entry.kind_of_gpu, entry.model, (entry.tp,), self.options.batching)
                tables |= performance_tables(alone, self.cache_dir, seed=0, progress=self.progress)
        return tables

    def _table(self, entry: EngineEntry, file: Path) -> PerformanceTable:
        if not file.exists():
            raise ValueError(f"{file}: no such file; `throttllem train PROFILE --out {file.parent}` makes it")
        table, gpu = load_table(file), self.catalogue.gpu(entry.kind_of_gpu)
        if unknown := sorted(set(table.clocks_mhz) - set(gpu.clocks_mhz)):
            raise ValueError(f"{file}: was learned at {unknown[-1]} MHz, which {entry.kind_of_gpu} does not have")
        self._of_this_kind(entry, file, table)
        if table.clocks_measured:
            self._judged(entry, file, table)
            return table
        if entry.gpus is not None and (mode := self.options.clocks.mode) != "off":
            gpus = ",".join(entry.gpus)
            raise ValueError(
                f"{file}: the clock axis of this table was not measured (a profile without --gpus, or of one clock): "
                f"no clock of engines: gpus = {gpus} can be chosen by it (clocks.mode = '{mode}'); profile again, "
                f"`throttllem profile PROFILE --url {entry.url} --gpus {gpus} --clocks MHZ,MHZ,...`, and "
                f"`throttllem train PROFILE --out {file.parent}`; or leave clocks alone, --clocks off"
            )
        log.warning("%s: the clock axis of this table was not measured: the clock stays at its maximum", file)
        return table.only_at(gpu.clocks_mhz[-1])

    def _of_this_kind(self, entry: EngineEntry, file: Path, table: PerformanceTable) -> None:
        """Refuse to set clocks by a table of another kind of GPU or another model; warn of it where none is set. The
        model that an engine reports is compared when it is reached.
        """
        gpu, other = self.catalogue.gpu(entry.kind_of_gpu), self.catalogue.gpus.get(table.gpu or "")
        # One board may have two entries: that of the catalogue, and a calibrated one.
        same = other is not None and {*other.nvml_names} & {*gpu.nvml_names}
        wrong = []
        if table.gpu not in (None, gpu.name) and not same:
            wrong.append(
                f"was learned on {table.gpu}, and the engine's GPU is {gpu.name}: profile and train on {gpu.name}"
            )
        profiled, model = profiled_model(table, file), entry.model and self.catalogue.model(entry.model)
        if profiled is not None and model and (difference := of_another_model(profiled, model)):
            wrong.append(difference)
        for text in wrong:
            if sets_clocks(entry, self.options):
                raise ValueError(f"{file}: {text}; until then leave clocks alone, --clocks dry-run or off")
            log.warning("%s: %s", file, text)

    def _judged(self, entry: EngineEntry, file: Path, table: PerformanceTable) -> None:
        """Refuse to set clocks by a table that `train` found wanting; warn of it where none is set."""
        if table.verdict is None or table.verdict.sound:
            return
        faults = f"{file}: `train` found that no clock may be set by this table: {'; '.join(table.verdict.faults)}"
        if sets_clocks(entry, self.options):
            raise ValueError(
                f"{faults}. Profile again and train, or overrule the verdict, `throttllem train PROFILE --out "
                f"{file.parent} --accept`; until then leave clocks alone, --clocks dry-run or off"
            )
        log.warning("%s", faults)

    def _predictor(self, first: EngineEntry) -> tuple[LengthPredictor, Path]:
        file = self.options.state_dir.expanduser() / f"lengths-{safe_name(called(first))}.json"
        if self.options.length.predictor == "max-tokens":
            return MaxTokens(), file
        restored = load_lengths(file, OnlineLengthOptions(exceed=self.options.length.exceed))
        if restored.trouble:
            log.warning("%s", restored.trouble)
        return restored.predictor, file

    def _recorder(self, first: EngineEntry, controller: Controller) -> Recorder | None:
        recorder = self.options.recorder
        if not recorder.enabled:
            return None
        folder = recorder.folder or self.options.state_dir / "flight"
        return Recorder(
            folder.expanduser(),
            controller,
            model=called(first),
            policy=self.options.policy,
            file_bytes=recorder.file_bytes,
            files=recorder.files,
            say=log.warning,
        )
