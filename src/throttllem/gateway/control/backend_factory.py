"""From an entry of the configuration to a backend: the engine, its GPUs (real or simulated), energy and clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from urllib.parse import urlsplit

from throttllem.agent.remote_gpu import RemoteGpu
from throttllem.agent.secured import HOW, client_context
from throttllem.config import EngineEntry, Options
from throttllem.core.clocks.savings_estimate import SavingsEstimate
from throttllem.core.controller import Controller
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.types import EngineSpec
from throttllem.engines.base import RemoteOptions, in_configuration
from throttllem.engines.openai import OpenaiEngine
from throttllem.engines.remote import remote_engine
from throttllem.engines.simulated.fleet import Fleet
from throttllem.engines.simulated.realtime import RealtimeEngine
from throttllem.engines.triton.engine import TritonEngine
from throttllem.gateway.control.backend import Backend
from throttllem.gateway.control.clock_setter import ClockSetter
from throttllem.gateway.control.engine_model import EngineModel
from throttllem.gateway.control.engine_process import EngineProcess
from throttllem.gateway.energy.accounting import EnergyAccounting
from throttllem.gateway.energy.prior_estimate import PriorEstimate
from throttllem.gateway.energy.table_meter import TableMeter
from throttllem.gateway.telemetry.metrics import Histograms
from throttllem.gpu.device import Gpu
from throttllem.gpu.hardware import HardwareGpu, Mode
from throttllem.gpu.setters import clock_setter
from throttllem.gpu.simulated import SimulatedGpu
from throttllem.launchers.base import EngineCommand, Launcher
from throttllem.launchers.remote import RemoteLauncher
from throttllem.launchers.running import RunningLauncher
from throttllem.physics.catalogue import Catalogue
from throttllem.physics.engine import EnginePhysics
from throttllem.profiling.storage import profiled_model

RealGpu = HardwareGpu | RemoteGpu
AnyEngine = RealtimeEngine | OpenaiEngine | TritonEngine


def called(entry: EngineEntry) -> str:
    """The name of a model in files, and of a simulated one for clients; where none is given, the engine's address."""
    return entry.served_as or entry.model or urlsplit(entry.url or "").netloc


def sets_clocks(entry: EngineEntry, options: Options) -> bool:
    """Whether clocks of real GPUs are set for it."""
    return entry.gpus is not None and options.clocks.mode == "on"


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendFactory:
    """Reaches nothing yet."""

    options: Options
    catalogue: Catalogue
    histograms: Histograms
    now: Callable[[], float]
    local: Launcher
    """Starts the engines that have a command."""
    version: str

    def backend(
        self,
        entry: EngineEntry,
        fleet: Fleet,
        table: PerformanceTable | None,
        controller: Controller,
        notes: tuple[str, ...] = (),
        *,
        number: int | None = None,
    ) -> Backend:
        """The backend of an entry; `fleet` has its size. `notes`: what is to be known of its GPUs. `number`: which one
        it is of those of its size (None: the only one).
        """
        spec, physics = fleet.specs[entry.tp], fleet.physics.get(entry.tp)
        model = EngineModel(
            catalogue=self.catalogue,
            gpu=entry.kind_of_gpu,
            tp=entry.tp,
            configured=entry.model,
            name=entry.model,
            physics=physics,
            profiled=profiled_model(table, entry.tables or Path())
            if table and sets_clocks(entry, self.options)
            else None,
        )
        gpu = self._gpu(entry, spec, model, table)
        short = PurePath(entry.model or entry.served_as or "").name
        name = "-".join(part for part in (entry.kind, short, f"tp{entry.tp}", number and str(number)) if part)
        # The joules of a real engine's GPUs are modelled only where both are known: model, and kind of GPU.
        named = entry.kind == "simulated" or entry.gpu is not None
        mode = "simulated" if entry.gpus is None else self.options.clocks.mode
        follows = entry.kind == "simulated" or entry.gpus is not None
        accounting = EnergyAccounting(
            gpu=gpu,
            now=self.now,
            kv_blocks=lambda: 0 if backend.key is None else controller.kv_blocks(backend.key),
            at_maximum=SavingsEstimate(table=table) if table else None,
            dry_run=SavingsEstimate(table=table) if table and mode in ("on", "dry-run") else None,
            prior=PriorEstimate(physics=lambda: model.physics, slo=self.options.slo)
            if table is None and mode in ("on", "dry-run")
            else None,
            meter=TableMeter(table=table) if table and table.clocks_measured and follows else None,
            external=lambda: (
                backend.uncontrolled_requests
                + (0 if backend.key is None else controller.external_sequences(backend.key))
            ),
            known=lambda: entry.gpus is not None or (model.known and named),
        )
        engine = self._engine(entry, spec, physics, gpu)
        backend = Backend(
            name=name,
            kind=entry.kind,
            tp=entry.tp,
            catalogue_gpu=entry.kind_of_gpu,
            gpu_notes=notes,
            model=model,
            engine=engine,
            close=None if isinstance(engine, RealtimeEngine) else engine.close,
            clock=ClockSetter(
                name=name,
                gpu=gpu,
                reading=accounting.reading,
                now=self.now,
                mode=mode,
                follows=follows,
                on_command=self.histograms.clock_command,
            ),
            accounting=accounting,
            process=self._process(entry, gpu),
            now=self.now,
        )
        return backend

    def _process(self, entry: EngineEntry, gpu: Gpu) -> EngineProcess:
        address = urlsplit(entry.url or "")
        engine_id, host, port = f"{address.hostname}-{address.port}", address.hostname or "", address.port or 0

        def command() -> EngineCommand:
            variables = {}
            if isinstance(gpu, HardwareGpu):
                variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.uuids)
            if entry.stats is not None:
                where = Path(entry.stats).expanduser() if "/" in entry.stats else entry.stats
                variables["THROTTLLEM_STATS"] = str(where)
            if entry.stats_secret is not None:
                variables["THROTTLLEM_STATS_SECRET"] = str(entry.stats_secret.expanduser())
            words = entry.command_words
            return EngineCommand(
                engine_id=engine_id, words=words, host=host, port=port, gpus=entry.tp, environment=variables
            )

        return EngineProcess(
            launcher=self._launcher(entry),
            engine_id=engine_id,
            command=command,
            ready_s=entry.ready_s,
            keep_running=entry.keep_running,
            now=self.now,
        )

    def _launcher(self, entry: EngineEntry) -> Launcher:
        if entry.command is None:
            return RunningLauncher()
        return self.local if entry.launcher is None else RemoteLauncher(entry.launcher.expanduser())

    def _gpu(
        self, entry: EngineEntry, spec: EngineSpec, model: EngineModel, table: PerformanceTable | None
    ) -> SimulatedGpu | RealGpu:
        if entry.gpus is not None:
            clocks = self.options.clocks
            if entry.agent is not None:
                return self._remote_gpu(entry.gpus, entry.agent, table.clocks_mhz if table else spec.clocks_mhz[-1:])
            return HardwareGpu(
                entry.gpus,
                mode=Mode(clocks.mode),
                setter=clock_setter(keeper=clocks.keeper, zeusd=clocks.zeusd, ttl_s=clocks.ttl_s),
                clocks_mhz=table.clocks_mhz if table else spec.clocks_mhz[-1:],
                url=entry.url,
            )
        return SimulatedGpu(
            spec.clocks_mhz,
            switch_latency_s=self.options.throttle.switch_latency_s,
            watts=model.watts,
            idle_w=spec.idle_w,
            now=self.now,
        )

    def _remote_gpu(self, gpus: tuple[str, ...], agent: str, clocks_mhz: tuple[int, ...]) -> RemoteGpu:
        clocks = self.options.clocks
        if clocks.agent_secret is None:
            raise ValueError(
                f"engines: agent = {agent}: needs the pool's secret, clocks.agent_secret; it is made by: {HOW}"
            )
        return RemoteGpu(
            gpus,
            address=agent,
            context=client_context(clocks.agent_secret),
            mode=Mode(clocks.mode),
            clocks_mhz=clocks_mhz,
            ttl_s=clocks.ttl_s,
            version=self.version,
            now=self.now,
        )

    def _engine(self, entry: EngineEntry, spec: EngineSpec, physics: EnginePhysics | None, gpu: Gpu) -> AnyEngine:
        name = called(entry)
        if entry.url is None:
            assert physics is not None
            seed = (self.options.server.seed, entry.tp)
            return RealtimeEngine(spec, physics, noise=self.options.noise, seed=seed, gpu=gpu, name=name, now=self.now)
        assert entry.kind != "simulated"
        number = next((n for n, each in enumerate(self.options.engines) if each.url == entry.url), 0)
        options = RemoteOptions(
            url=entry.url,
            kind=entry.kind,
            served_as=entry.served_as,
            stats=entry.stats,
            stats_secret=entry.stats_secret,
            tokenizer=entry.tokenizer,
            metrics_url=entry.metrics_url,
            api_key=entry.api_key,
            max_batch=entry.max_batch,
            max_context_tokens=entry.max_context_tokens,
            kv_blocks=entry.kv_blocks,
            block_tokens=entry.block_tokens,
            flags=partial(in_configuration, number=number),
        )
        return remote_engine(options, spec)
