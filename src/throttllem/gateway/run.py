"""A gateway from its start to its end: ports taken first, engines reached while it listens, what was learned saved.

Knows nothing of the command line.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import uvloop
from starlette.types import ASGIApp

from throttllem.config import Options
from throttllem.core.lengths.online import OnlineLengthPredictor
from throttllem.files import hold_dir
from throttllem.gateway.bounds.descriptors import fitted, raise_limit
from throttllem.gateway.build import Gateway, Progress, build_gateway
from throttllem.gateway.check import exposed, open_doors
from throttllem.gateway.http.app import Gateway as Front
from throttllem.gateway.http.app import build_app, build_private_app
from throttllem.gateway.http.server import Sockets, bind, run
from throttllem.gateway.telemetry.dashboard import dashboard_routes
from throttllem.gateway.telemetry.history import History
from throttllem.gateway.telemetry.metrics import metrics_page
from throttllem.gateway.telemetry.status import GatewayStatus, assumptions
from throttllem.gpu.boards.users import Place
from throttllem.gpu.hardware import check_apart
from throttllem.profiling.lengths import save_lengths

log = logging.getLogger("throttllem.gateway")

Say = Callable[[str], None]
_SAVE_EVERY_S = 30.0
_YOUNG_OBJECTS = 5_000
"""A collection after this many new objects takes about 2 ms."""
_M_MMAP_THRESHOLD = -3
_LARGE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A gateway that holds its ports and has everything that is slow behind it. `serve` once."""

    options: Options
    gateway: Gateway
    sockets: Sockets
    held: int

    def serve(self, say: Say) -> None:
        """Serve until a signal; returns when running requests have ended and everything is saved."""
        _return_large_blocks()
        _keep_what_is_there()
        uvloop.run(self.serving(say))

    async def serving(self, say: Say, stop: asyncio.Event | None = None) -> None:
        """The same on the loop that runs; `stop` does what a signal does."""
        gateway, options, history = self.gateway, self.options, History()
        models = gateway.models
        app = build_app(
            models,
            options,
            metrics_page=self._metrics_page,
            extra_routes=dashboard_routes(models, history),
            on_response=gateway.histograms.http,
        )
        private = build_private_app(app) if self.sockets.private is not None else None
        async with contextlib.AsyncExitStack() as hardware:
            try:
                for gpu in gateway.hardware:  # restored at the very end, whatever happens before
                    await hardware.enter_async_context(gpu)
                check_apart(gateway.hardware)
            except BaseException:
                self.sockets.close()
                os.close(self.held)
                raise
            await self._serve_on(app, private, history, say, stop)
        say("stopped")

    async def _serve_on(
        self, app: Front, private: ASGIApp | None, history: History, say: Say, stop: asyncio.Event | None
    ) -> None:
        gateway, options, models = self.gateway, self.options, self.gateway.models
        aside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")
        for recorder in gateway.recorders:
            recorder.start(aside)
        await self._warn_of_unknown_engines()
        await models.start()
        beside = [asyncio.create_task(work) for work in (history.run(models), self._saves())]
        for task in beside:
            task.add_done_callback(_failed)
        try:
            await run(
                app,
                private,
                options,
                sockets=self.sockets,
                on_listening=lambda addresses: self._greet(say, addresses),
                on_drain=lambda: self._drain(say),
                stop=stop,
            )
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            await models.stop()
            _save(gateway.predictors)
            for recorder in gateway.recorders:
                recorder.close()
            gateway.local.close()
            aside.shutdown()
            os.close(self.held)

    async def _warn_of_unknown_engines(self) -> None:
        """Engines that an earlier gateway started, and that the configuration has no more, take GPUs for nothing."""
        known = {backend.process.engine_id for model in self.gateway.models.served for backend in model.loop.backends}
        for launched in await self.gateway.local.listed():
            if launched.engine_id not in known:
                what = f"engine {launched.engine_id} ({launched.incarnation}) was started by an earlier gateway"
                log.warning("%s, and no entry of the configuration has its url: stop it", what)

    def _greet(self, say: Say, addresses: tuple[tuple[str, int], ...]) -> None:
        urls = [f"http://{f'[{host}]' if ':' in host else host}:{port}" for host, port in addresses]
        engines = [backend.name for model in self.gateway.models.served for backend in model.loop.backends]
        say(f"throttllem {self.gateway.models.version}: policy {self.options.policy}, engine {', '.join(engines)}")
        say(f"API        {urls[0]}/v1")
        say(f"dashboard  {urls[-1]}/dashboard   metrics  {urls[-1]}/metrics")
        for model in self.gateway.models.served:
            for backend in model.loop.backends:
                for note in assumptions(model.loop, backend):
                    say(f"note       {backend.name}: {note}")
        for gpu in self.gateway.hardware:
            if (found := gpu.placement) is not None and found.place is not Place.RIGHT:
                say(f"{'!!' if found.place is Place.WRONG else 'note':<10} gpus {', '.join(gpu.names)}: {found.text}")
        for door in open_doors(self.options.server):
            say(f"warning    {door}")

    def _drain(self, say: Say) -> None:
        self.gateway.models.drain()
        running = sum(len(model.loop.open()) for model in self.gateway.models.served)
        say(f"stopping: {running} requests have up to {self.options.limits.drain_s:g} s; again to stop at once")

    def _metrics_page(self, status: GatewayStatus) -> tuple[str, bytes]:
        self.gateway.flush()
        return metrics_page(status, self.gateway.histograms)

    async def _saves(self) -> None:
        while True:
            await asyncio.sleep(_SAVE_EVERY_S)
            # The copies are named nowhere: they would be kept until the next time.
            writing = asyncio.ensure_future(
                asyncio.to_thread(_save, [(file, predictor.copy()) for file, predictor in self.gateway.predictors])
            )
            try:
                await asyncio.shield(writing)
            except asyncio.CancelledError:
                await writing  # it must not come after the last one
                raise
            except Exception:
                log.exception("lengths were not saved this time")


def _save(predictors: Iterable[tuple[Path, OnlineLengthPredictor]]) -> None:
    for file, predictor in predictors:
        if trouble := save_lengths(predictor, file):
            log.warning("%s", trouble)


def _keep_what_is_there() -> None:
    """What start-up made stays to the end; garbage collection of it stopped the event loop for 100 ms at a time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 20, 20)


def _return_large_blocks() -> None:
    """Checkpoints take a few MB now and then; glibc would raise its threshold and never return them (mallopt(3))."""
    with contextlib.suppress(OSError, AttributeError):  # another C library does as it likes
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def _failed(task: asyncio.Task[None]) -> None:
    """Log that a background task has failed; serving goes on without it."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s failed", task.get_coro(), exc_info=error)


def run_gateway(options: Options, cache_dir: Path, *, progress: Progress = lambda *_: None) -> Prepared:
    """Take the ports, then do what is slow. Raises ValueError and OSError for what cannot be."""
    connections = fitted(options.limits.connections, raise_limit())
    options = options.model_copy(update={"limits": replace(options.limits, connections=connections)})
    sockets = bind(options.server)
    held: int | None = None
    try:
        folder, held = _own_folder(options.state_dir.expanduser(), sockets.addresses()[0][1])
        options = options.model_copy(update={"state_dir": folder})
        for text in exposed(options, cache_dir):
            log.warning("%s", text)
        gateway = build_gateway(
            options, cache_dir, version=version("throttllem"), now=time.monotonic, progress=progress
        )
    except BaseException:
        sockets.close()
        if held is not None:
            os.close(held)
        raise
    return Prepared(options=options, gateway=gateway, sockets=sockets, held=held)


def _own_folder(state_dir: Path, port: int) -> tuple[Path, int]:
    """A folder that no other gateway uses, and the hold on it: the configured one, else one for this port in it."""
    for folder in (state_dir, state_dir / f"port-{port}"):
        held = hold_dir(folder, private=True)
        if held is not None:
            return folder, held
        log.warning("%s: another gateway keeps its state there", folder)
    raise OSError(f"state_dir {state_dir}: other gateways keep their state there; set another state_dir for this one")
