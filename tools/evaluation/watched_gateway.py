"""A gateway that is watched at every step of its engine: what the engine says, and what the gateway knows.

`python -m tools.evaluation.watched_gateway --port N --engine URL --steps SOCKET --out FILE [--plug-in] --set ...`: the
engine sends its steps to SOCKET. With `--plug-in` each goes on to the gateway, after its own numbers were taken down;
without, the gateway never hears of them. Writes one JSON line per step when it is ended by SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import socket
import time
from pathlib import Path
from typing import Any

from throttllem.engines.openai import OpenaiEngine
from throttllem.engines.step_reports import PACKED, StepStats, bind, unpack
from throttllem.gateway.control.loop import ControlLoop
from throttllem.gateway.run import Prepared, run_gateway
from throttllem.option_sources import load_options

POLL_S = 0.02


class Watch:
    """Takes down both sides' numbers at each step that arrives."""

    def __init__(self, loop: ControlLoop, steps: str, *, plug_in: bool) -> None:
        self.samples: list[dict[str, Any]] = []
        self._driver = loop
        self._steps = Path(steps)
        self._forward = Path(f"{steps}.gateway") if plug_in else None
        self._socket: socket.socket | None = None

    async def begin(self) -> None:
        """Listen where the engine sends; with the plug-in, only once the gateway listens, whose place is taken."""
        backend = self._driver.backends[0]
        while backend.state != "up" or (self._forward and not _listens(backend.engine)):
            await asyncio.sleep(POLL_S)
        if self._forward:
            self._steps.rename(self._forward)
        self._socket = bind(str(self._steps))
        asyncio.get_running_loop().add_reader(self._socket, self._hear)

    def end(self) -> None:
        """Take nothing down any more."""
        if self._socket is not None:
            self._socket.close()
        if self._forward:
            self._forward.unlink(missing_ok=True)

    def _hear(self) -> None:
        assert self._socket is not None
        while True:
            try:
                datagram = self._socket.recv(PACKED.size + 1)
            except BlockingIOError:
                return
            step = unpack(datagram)
            if step is not None:
                self._take_down(step)
            if self._forward:
                self._socket.sendto(datagram, str(self._forward))

    def _take_down(self, step: StepStats) -> None:
        connected = self._driver.backends[0].connected
        views = self._driver.controller.snapshot().engines
        if not views or connected is None:
            return
        view, blocks = views[0], connected.spec.kv_blocks
        # Only this measurement needs the blocks of prompts under way.
        board = next(iter(self._driver.controller._engines.by_id.values())).board
        engine = {"running": step.running, "waiting": step.waiting, "kv_blocks": round(step.kv_usage * blocks)}
        own = {"running": view.running, "pending": view.pending, "kv_blocks": view.kv_blocks}
        own["pending_blocks"] = board.own(view.iteration).pending_blocks
        others = {"batch": board.others.batch, "kv_blocks": board.others.kv_blocks}
        at = {"step_s": step.monotonic_s, "at_s": time.monotonic(), "step": step.step, "capacity": blocks}
        self.samples.append(at | {"engine": engine, "gateway": own, "others": others})


def _listens(engine: object) -> bool:
    return isinstance(engine, OpenaiEngine) and engine.steps is not None and engine.steps.listens


def main() -> None:
    """Serve until SIGTERM, then write what was seen."""
    parser = argparse.ArgumentParser(prog="watched_gateway", description=__doc__)
    for name in ("--port", "--engine", "--steps", "--out"):
        parser.add_argument(name, required=True)
    parser.add_argument("--plug-in", action="store_true")
    parser.add_argument("--set", action="append", default=[])
    asked = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(message)s")
    settings = [f"server.port={asked.port}", "engines.0.kind=openai", f"engines.0.url={asked.engine}", *asked.set]
    settings += [f"engines.0.stats={asked.steps}"] if asked.plug_in else []
    options = load_options(settings=settings).options
    prepared = run_gateway(options, options.state_dir / "cache")
    watch = Watch(prepared.gateway.models.served[0].loop, asked.steps, plug_in=asked.plug_in)
    _serve(prepared, watch)
    Path(asked.out).write_text("".join(json.dumps(sample) + "\n" for sample in watch.samples))


def _serve(prepared: Prepared, watch: Watch) -> None:
    beginning: list[asyncio.Task[None]] = []

    def say(line: str) -> None:
        print(line, flush=True)
        # The first word comes from inside the gateway's loop, as soon as it listens.
        if not beginning:
            beginning.append(asyncio.get_running_loop().create_task(watch.begin()))

    try:
        prepared.serve(say)
    finally:
        watch.end()


if __name__ == "__main__":
    main()
