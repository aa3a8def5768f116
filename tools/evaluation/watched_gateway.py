"""`throttllem serve`, watched at every step of its engine: the engine's numbers, and what the core knows then.

`python -m tools.evaluation.watched_gateway STEPS OUT [--plug-in] serve ...`: the engine sends its steps to the socket
STEPS. With `--plug-in` each goes on to the gateway, after its own numbers were noted; without, the gateway never gets
them. One JSON line per step is written to OUT when the gateway ends. Of the product it knows the core's controller.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

from throttllem.cli.app import main as throttllem
from throttllem.core.controller import Controller
from throttllem.engines.step_reports import PACKED, StepStats, bind, unpack

POLL_S = 0.02


class Watch:
    """Notes both sides' numbers at each step that arrives."""

    def __init__(self, steps: Path, *, plug_in: bool) -> None:
        self.samples: list[dict[str, Any]] = []
        self._steps = steps
        self._forward = steps.with_name(f"{steps.name}.gateway") if plug_in else None
        self._socket: socket.socket | None = None
        self._controller: Controller | None = None
        self._beginning: asyncio.Task[None] | None = None

    def install(self) -> None:
        """Begin with the first event that the controller handles, in the gateway's own event loop."""
        handle = Controller.handle

        def handled(controller: Controller, *arguments: Any) -> Any:
            if self._controller is None:
                self._controller = controller
                self._beginning = asyncio.get_running_loop().create_task(self._begin())
            return handle(controller, *arguments)

        Controller.handle = handled  # type: ignore[method-assign, assignment]

    def end(self) -> None:
        """Note nothing any more."""
        if self._socket is not None:
            self._socket.close()
        if self._forward:
            self._forward.unlink(missing_ok=True)

    async def _begin(self) -> None:
        """Listen where the engine sends; with the plug-in once the gateway listens, whose socket is renamed."""
        if self._forward:
            while not self._steps.exists():
                await asyncio.sleep(POLL_S)
            self._steps.rename(self._forward)
        self._socket = bind(str(self._steps))
        asyncio.get_running_loop().add_reader(self._socket, self._receive)

    def _receive(self) -> None:
        assert self._socket is not None
        while True:
            try:
                datagram = self._socket.recv(PACKED.size + 1)
            except BlockingIOError:
                return
            if (step := unpack(datagram)) is not None:
                self._note(step)
            if self._forward:
                self._socket.sendto(datagram, str(self._forward))

    def _note(self, step: StepStats) -> None:
        assert self._controller is not None
        state = next(
            iter(self._controller._engines.by_id.values()), None
        )  # no snapshot has the blocks of prompts under way
        views = self._controller.snapshot().engines
        if state is None or state.spec is None or not views:
            return
        view, blocks, board = views[0], state.spec.kv_blocks, state.board
        engine = {"running": step.running, "waiting": step.waiting, "kv_blocks": round(step.kv_usage * blocks)}
        own = {"running": view.running, "pending": view.pending, "kv_blocks": view.kv_blocks}
        own["pending_blocks"] = board.own(view.iteration).pending_blocks
        others = {"batch": board.external.batch, "kv_blocks": board.external.kv_blocks}
        at = {"step_s": step.monotonic_s, "at_s": time.monotonic(), "step": step.step, "capacity": blocks}
        self.samples.append(at | {"engine": engine, "gateway": own, "others": others})


def main() -> None:
    """Serve until SIGTERM, then write what was seen."""
    parser = argparse.ArgumentParser(prog="watched_gateway", description=__doc__)
    parser.add_argument("steps", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--plug-in", action="store_true")
    given, rest = parser.parse_known_args()
    watch = Watch(given.steps, plug_in=given.plug_in)
    watch.install()
    sys.argv = ["throttllem", *rest, *(["--set", f"engines.0.stats={given.steps}"] if given.plug_in else [])]
    try:
        throttllem()
    finally:
        watch.end()
        given.out.write_text("".join(json.dumps(sample) + "\n" for sample in watch.samples))


if __name__ == "__main__":
    main()
