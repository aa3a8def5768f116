"""The small OpenAI server as an engine on fake GPUs: it batches, and each step lasts and draws what the physics says.

Prompts join whole, first come, first served; each step takes the law's seconds at the clock that the fake GPU has when
it begins. It reports its steps as vLLM's plug-in does, with the seconds of each.
`python -m tools.testbed.engines.physical_engine PORT SETTINGS` (a JSON file with the fields of `Settings`).
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop

from throttllem.engines.step_reports import StepStats, parse_address
from throttllem.physics.catalogue import Catalogue
from throttllem.physics.engine import EnginePhysics
from tools.nvml.build import NAME
from tools.nvml.machine import Machine, Part
from tools.testbed.engines.openai_engine import BLOCK_TOKENS, Connection, Pace, serve
from tools.testbed.engines.vllm_pace import BELOW, FakeGpu
from tools.testbed.processes import Process, answers, free_port, started

GRACE_S = 0.1
"""The GPU stays busy for this time after a step, which the next one replaces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A GPU of the catalogue, played by number 0 of the fake ones; a model by any name that the catalogue takes.

    `served`: the model's name for clients. `busy_w`: watts of the fake GPU at full utilisation by MHz (as text: it is
    JSON). `stats`: where steps are sent.
    """

    library: str
    kind: str
    model: str
    tp: int
    idle_w: float
    busy_w: Mapping[str, float]
    stats: str
    max_batch: int
    budget_tokens: int
    served: str


class PhysicalPace(Pace):
    """Steps of all requests together, by the law."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(served=settings.served)
        self.together = True
        self._settings, catalogue = settings, Catalogue.load()
        self._law = EnginePhysics(catalogue.gpu(settings.kind), catalogue.model(settings.model), settings.tp)
        self._gpu = FakeGpu(settings.library, 0)
        self._busy_w = {int(mhz): watts for mhz, watts in settings.busy_w.items()}
        self._kv_blocks = self._law.kv_capacity_tokens() // BLOCK_TOKENS
        self._prompts: list[Connection] = []
        self._decoding: dict[Connection, int] = {}
        """Each running request with the tokens that it holds."""
        self._busy = False
        family, self._address = parse_address(settings.stats)
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._boot, self._steps = time.time_ns(), 0

    def begin(self, stream: Connection) -> None:
        """Its prompt waits for a step with room for it."""
        self._prompts.append(stream)
        self._go()

    def wait(self, stream: Connection) -> None:
        """It decodes, also in the next step."""
        self._decoding[stream] = self._decoding.get(stream, stream.prompt_tokens) + 1

    def leave(self, stream: Connection) -> None:
        """Its answer has ended."""
        super().leave(stream)
        self._decoding.pop(stream, None)
        if stream in self._prompts:
            self._prompts.remove(stream)

    def page(self) -> str:
        """As vLLM with the plug-in shows it."""
        settings, used = self._settings, sum(self._decoding.values()) / (self._kv_blocks * BLOCK_TOKENS)
        return f"""\
vllm:num_requests_running{{engine="0"}} {len(self._decoding)}
vllm:num_requests_waiting{{engine="0"}} {len(self._prompts)}
vllm:kv_cache_usage_perc{{engine="0"}} {used:.6f}
vllm:cache_config_info{{block_size="{BLOCK_TOKENS}",engine="0",num_gpu_blocks="{self._kv_blocks + 1}"}} 1.0
throttllem_engine_info{{boot="{self._boot}",stats="{settings.stats}",max_num_seqs="{settings.max_batch}",\
max_num_batched_tokens="{settings.budget_tokens}",chunked_prefill="0",engines="1",api_servers="1"}} 1.0
"""

    def _go(self) -> None:
        if not self._busy and (self._prompts or self._decoding):
            self._busy = True
            self._begin_step()

    def _begin_step(self) -> None:
        decoding, prompts = list(self._decoding), list[Connection]()
        left = self._settings.budget_tokens - len(decoding)
        while self._prompts and self._prompts[0].prompt_tokens <= left:
            if len(decoding) + len(prompts) >= self._settings.max_batch:
                break
            prompts.append(self._prompts.pop(0))
            left -= prompts[-1].prompt_tokens
        lengths, mhz = [prompt.prompt_tokens for prompt in prompts], self._gpu.clock_mhz()
        pairs = sum(tokens * tokens for tokens in lengths) / 2
        held = sum(self._decoding.values())
        seconds, watts = self._law.iteration(mhz, len(decoding), held, sum(lengths), pairs)
        idle_w = self._settings.idle_w
        util = (watts / self._settings.tp * BELOW - idle_w) / (self._busy_w[mhz] - idle_w)
        self._gpu.work(max(0.0, min(1.5, util)), seconds + GRACE_S)
        asyncio.get_running_loop().call_later(seconds, self._end_step, decoding, prompts, seconds)

    def _end_step(self, decoding: list[Connection], prompts: list[Connection], seconds: float) -> None:
        made = [stream for stream in decoding if stream in self._decoding]
        for stream in made:
            stream.token()
        began = [stream for stream in prompts if stream in self.open]
        for stream in began:
            stream.first()
        self._report(len(made), began, seconds)
        self._busy = False
        self._go()
        if not self._busy:
            self._gpu.work(0.0, GRACE_S)

    def _report(self, decoding: int, began: list[Connection], seconds: float) -> None:
        used = sum(-(-tokens // BLOCK_TOKENS) for tokens in self._decoding.values()) / self._kv_blocks
        step = StepStats(
            boot=self._boot,
            sequence=self._steps,
            step=self._steps,
            monotonic_s=time.monotonic(),
            running=len(self._decoding),
            waiting=len(self._prompts),
            kv_usage=min(1.0, used),
            prompt_tokens=sum(stream.prompt_tokens for stream in began),
            generated_tokens=decoding + len(began),
            decode_sequences=decoding,
            seconds=seconds,
        )
        self._steps += 1
        with suppress(OSError):  # no listener: the next sequence number shows the gap
            self._socket.sendto(step.pack(), self._address)


@contextmanager
def physical_engine(
    machine: Machine, part: Part, folder: Path, *, kind: str, model: str, served: str, max_batch: int, tp: int = 1
) -> Iterator[tuple[str, str, Process]]:
    """One in a process: its URL, and the address of its steps. Raises ProcessError."""
    port, stats = free_port(), str(folder / "steps.sock")
    settings = Settings(
        library=str(machine.library_folder / NAME),
        kind=kind,
        model=model,
        tp=tp,
        idle_w=part.idle_w,
        busy_w={str(mhz): watts for mhz, watts in zip(part.clocks_mhz, part.busy_w, strict=True)},
        stats=stats,
        max_batch=max_batch,
        budget_tokens=8192,
        served=served,
    )
    file = folder / "engine.json"
    file.write_text(json.dumps(asdict(settings)))
    command = (sys.executable, "-m", "tools.testbed.engines.physical_engine", str(port), str(file))
    with started(
        command,
        folder / "engine.log",
        ready=answers(f"http://127.0.0.1:{port}/health"),
        environment=machine.environment(),
    ) as process:
        yield f"http://127.0.0.1:{port}", stats, process


def main() -> None:
    """Serve on the port of the command line."""
    port, file = sys.argv[1:]
    uvloop.run(serve(int(port), PhysicalPace(Settings(**json.loads(Path(file).read_text())))))


if __name__ == "__main__":
    main()
