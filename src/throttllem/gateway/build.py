"""From options to a gateway that can start: engines, their GPUs, tables, controllers, recorders. Reaches nothing yet.

Everything that can be refused is refused here, with the option's name, before a port is served.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from throttllem.core.controller import Controller
from throttllem.core.length import LengthPredictor, MaxTokens
from throttllem.core.online import Online, OnlineOptions
from throttllem.core.options import ControllerOptions
from throttllem.core.performance import PerformanceTable
from throttllem.core.policy import Policy, parse_policy
from throttllem.core.types import EngineSpec
from throttllem.engine.fleet import build_fleet
from throttllem.engine.openai import OpenaiEngine
from throttllem.engine.realtime import RealtimeEngine
from throttllem.engine.remote import Remote
from throttllem.engine.triton import TritonEngine
from throttllem.gateway.booking import Booking
from throttllem.gateway.driver import Driver
from throttllem.gateway.energy_meter import EnergyMeter
from throttllem.gateway.link import Link
from throttllem.gateway.metrics import Histograms
from throttllem.gateway.models import AllModels, Served
from throttllem.gateway.recorder import Recorder
from throttllem.gateway.recordings import safe_name
from throttllem.gateway.settings import EngineEntry, ServeOptions
from throttllem.gateway.top_clock import TopClock
from throttllem.gateway.witness import Record
from throttllem.gpu.simulated import SimulatedGpu
from throttllem.learn.lengths import load_lengths
from throttllem.learn.storage import load_table
from throttllem.learn.tables import Progress, performance_tables
from throttllem.physics.catalogue import Catalogue
from throttllem.physics.engine import EnginePhysics

log = logging.getLogger("throttllem.gateway")

AnyEngine = RealtimeEngine | OpenaiEngine | TritonEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """Everything that runs, and what must be saved when it stops."""

    models: AllModels
    histograms: Histograms
    recorders: tuple[Recorder, ...]
    predictors: tuple[tuple[Path, Online], ...]


def build_gateway(
    options: ServeOptions,
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
    catalogue = Catalogue.load(options.catalogue)
    histograms = Histograms()
    served, recorders, predictors = [], [], []
    where = cache_dir if learn else None
    part = _Part(options=options, catalogue=catalogue, cache_dir=where, now=now, progress=progress)
    for entries in groups(options.engines):
        model = part.build(entries, histograms)
        served.append(model.served)
        recorders.extend([model.recorder] if model.recorder else [])
        predictors.extend([model.predictor] if model.predictor else [])
    models = AllModels(served=tuple(served), version=version, policy=options.policy, slo=options.slo, now=now)
    return Gateway(models=models, histograms=histograms, recorders=tuple(recorders), predictors=tuple(predictors))


def groups(entries: tuple[EngineEntry, ...]) -> list[tuple[EngineEntry, ...]]:
    """Engines of one model and one name belong together, as sizes of it. Raises ValueError for two of one size."""
    if not entries:
        raise ValueError("engines: none is configured; without [[engines]] the simulated one is served")
    numbered = sorted(entries, key=_together)
    found = [tuple(group) for _, group in groupby(numbered, key=_together)]
    for group in found:
        sizes = [entry.tp for entry in group]
        if len(set(sizes)) < len(sizes):
            raise ValueError(
                f"engines: two of model {group[0].model} with tp = {max(sizes, key=sizes.count)}: one engine of each "
                "size is served; give other models another served_as, or run a gateway for each"
            )
    names = [_called(group[0]) for group in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"engines: two models are called {name}: give each its own served_as, as clients name it")
    return found


def _called(entry: EngineEntry) -> str:
    """The name of a model in files, and of a simulated one for clients."""
    return entry.served_as or entry.model


def _together(entry: EngineEntry) -> tuple[str, str, str]:
    return entry.gpu, entry.model, entry.served_as or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Built:
    served: Served
    recorder: Recorder | None
    predictor: tuple[Path, Online] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One model's worth of building."""

    options: ServeOptions
    catalogue: Catalogue
    cache_dir: Path | None
    now: Callable[[], float]
    progress: Progress

    def build(self, entries: tuple[EngineEntry, ...], histograms: Histograms) -> _Built:
        options, first = self.options, entries[0]
        sizes = tuple(sorted(entry.tp for entry in entries))
        fleet = build_fleet(self.catalogue, first.gpu, first.model, sizes, options.batching)
        policy = parse_policy(options.policy, fleet.clocks_mhz, sizes)
        tables = self._tables(entries, policy)
        predictor, file = self._predictor(first)
        controller = Controller(self._controller_options(policy, fleet.specs, tables, predictor))
        links = tuple(
            self._link(entry, fleet.specs[entry.tp], fleet.physics[entry.tp], tables.get(entry.tp), controller)
            for entry in entries
        )
        recorder = self._recorder(first, controller)
        witness = Record(
            model=lambda: next(iter(served.all_names()), first.model), histograms=histograms, recorder=recorder
        )
        driver = Driver(controller=controller, links=links, limits=options.limits, now=self.now, witness=witness)
        served = Served(driver=driver, names=(first.served_as,) if first.served_as else ())
        learned = (file, predictor) if isinstance(predictor, Online) else None
        return _Built(served=served, recorder=recorder, predictor=learned)

    def _controller_options(
        self,
        policy: Policy,
        specs: dict[int, EngineSpec],
        tables: dict[int, PerformanceTable],
        predictor: LengthPredictor,
    ) -> ControllerOptions:
        options = self.options
        if policy.autoscale and set(options.autoscale.capacity_rps) != set(specs):
            raise ValueError(
                f"policy {options.policy!r}: [autoscale.capacity_rps] must give the requests/s that each size bears "
                f"({', '.join(str(tp) for tp in sorted(specs))}); `throttllem characterize` finds them"
            )
        return ControllerOptions(
            throttle=replace(options.throttle, policy=policy.clock, fixed_mhz=policy.fixed_mhz),
            slo_aware=policy.slo_aware,
            admission=options.admission,
            autoscale=options.autoscale if policy.autoscale else None,
            predictor=predictor,
            specs=specs,
            tables=tables,
        )

    def _tables(self, entries: tuple[EngineEntry, ...], policy: Policy) -> dict[int, PerformanceTable]:
        """The tables that were named; simulated engines without one are learned (and cached)."""
        tables = {}
        for entry in entries:
            if entry.tables is not None:
                tables[entry.tp] = self._table(entry, entry.tables.expanduser() / f"table-tp{entry.tp}.npz")
            elif entry.kind == "simulated" and policy.slo_aware and self.cache_dir is not None:
                alone = build_fleet(self.catalogue, entry.gpu, entry.model, (entry.tp,), self.options.batching)
                tables |= performance_tables(alone, self.cache_dir, seed=0, progress=self.progress)
        return tables

    def _table(self, entry: EngineEntry, file: Path) -> PerformanceTable:
        table, gpu = load_table(file), self.catalogue.gpu(entry.gpu)
        if unknown := sorted(set(table.clocks_mhz) - set(gpu.clocks_mhz)):
            raise ValueError(f"{file}: was learned at {unknown[-1]} MHz, which {entry.gpu} does not have")
        return table

    def _predictor(self, first: EngineEntry) -> tuple[LengthPredictor, Path]:
        file = self.options.state_dir.expanduser() / f"lengths-{safe_name(_called(first))}.json"
        if self.options.length.predictor == "max-tokens":
            return MaxTokens(), file
        restored = load_lengths(file, OnlineOptions(exceed=self.options.length.exceed))
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
            model=_called(first),
            policy=self.options.policy,
            file_bytes=recorder.file_bytes,
            files=recorder.files,
            say=log.warning,
        )

    def _link(
        self,
        entry: EngineEntry,
        spec: EngineSpec,
        physics: EnginePhysics,
        table: PerformanceTable | None,
        controller: Controller,
    ) -> Link:
        gpu = SimulatedGpu(
            spec.clocks_mhz,
            switch_latency_s=self.options.throttle.switch_latency_s,
            watts=lambda mhz, work: physics.iteration(
                mhz, work.decode_rows, work.kv_tokens, work.prefill_tokens, work.prefill_pairs
            )[1],
            idle_w=spec.idle_w,
            now=self.now,
        )
        name = f"{entry.kind}-{entry.model}-tp{entry.tp}"
        meter = EnergyMeter(gpu=gpu, top=TopClock(table=table) if table else None)
        booking = Booking(meter=meter, now=self.now, kv_blocks=lambda: _kv_blocks(controller, link))
        engine = self._engine(entry, spec, physics, gpu)
        link = Link(
            name=name,
            kind=entry.kind,
            tp=entry.tp,
            catalogue_gpu=entry.gpu,
            catalogue_model=entry.model,
            engine=engine,
            close=None if isinstance(engine, RealtimeEngine) else engine.close,
            gpu=gpu,
            booking=booking,
            now=self.now,
        )
        return link

    def _engine(self, entry: EngineEntry, spec: EngineSpec, physics: EnginePhysics, gpu: SimulatedGpu) -> AnyEngine:
        name = _called(entry)
        if entry.url is None:
            seed = (self.options.server.seed, entry.tp)
            return RealtimeEngine(spec, physics, noise=self.options.noise, seed=seed, gpu=gpu, name=name, now=self.now)
        assert entry.kind != "simulated"
        return Remote(
            url=entry.url,
            kind=entry.kind,
            served_as=entry.served_as,
            stats=entry.stats,
            tokenizer=entry.tokenizer,
            metrics_url=entry.metrics_url,
            api_key=entry.api_key,
            max_batch=entry.max_batch,
            max_context_tokens=entry.max_context_tokens,
            kv_blocks=entry.kv_blocks,
            block_tokens=entry.block_tokens,
        ).engine(spec)


def _kv_blocks(controller: Controller, link: Link) -> int:
    """The core's own estimate of the blocks in use."""
    return next((view.kv_blocks for view in controller.snapshot().engines if view.engine == link.key), 0)
