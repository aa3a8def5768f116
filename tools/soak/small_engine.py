"""The engine as the gateway sees it: simulated, fast, at the clock that the fake GPU has; it can die, stall and return.

The process that keeps the GPUs busy is another one (`engine_process`); what happens to that one is done here too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

from throttllem.config import Noise
from throttllem.core.types import EngineSpec
from throttllem.engines.base import Call, Connected, EngineError, PromptCount, Reply, Report
from throttllem.engines.simulated.realtime import RealtimeEngine
from throttllem.gpu.device import Reading, Work
from throttllem.openai_api.requests import ParsedRequest
from tools.nvml.build import NAME

STEP_S = 0.006
IDLE_W = 50.0
MODEL = "small"


def small_spec(clocks_mhz: tuple[int, ...], tp: int) -> EngineSpec:
    """What the core is told of it."""
    return EngineSpec(
        gpu="fake",
        model=MODEL,
        tp=tp,
        kv_blocks=400,
        block_tokens=16,
        max_batch=16,
        max_context_tokens=1024,
        prefill_budget_tokens=1024,
        chunked=True,
        no_evict=False,
        clocks_mhz=clocks_mhz,
        idle_w=IDLE_W,
        startup_s=1.0,
    )


@dataclass(frozen=True, slots=True)
class TrueClock:
    """The GPU as the engine's kernels feel it: its clock, whatever anybody can read of it."""

    library: ctypes.CDLL
    index: int
    top_mhz: int

    async def set_clock(self, mhz: int | None, sent: Callable[[], None] | None = None) -> int | None:
        """Engines set nothing."""
        raise AssertionError("an engine set a clock")

    def read(self) -> Reading:
        """The clock in force."""
        return Reading(clock_mhz=self.library.fake_nvml_clock(self.index) or self.top_mhz, watts=0.0, energy_j=0.0)

    def worked(self, work: Work) -> None:
        """The other process says it."""

    def idled(self, seconds: float) -> None:
        """The other process says it."""


@dataclass(slots=True)
class StepPhysics:
    """Every iteration takes equally long at a clock; the next one longer by `stalled_s`, once."""

    top_mhz: int
    stalled_s: float = 0.0

    def iteration(
        self, clock_mhz: float, decode_batch: int, kv_tokens: int, prefill_tokens: int, prefill_pairs: float
    ) -> tuple[float, float]:
        """Seconds and watts."""
        stalled_s, self.stalled_s = self.stalled_s, 0.0
        return STEP_S * min(4.0, self.top_mhz / clock_mhz) + stalled_s, IDLE_W + clock_mhz / 10

    def idle_w(self) -> float:
        """Watts."""
        return IDLE_W


@dataclass(slots=True)
class SmallEngine:
    """`LiveEngine`; `kill`, `back` and `stall` are what happens to it."""

    spec: EngineSpec
    library_folder: Path
    gpu: int
    seed: int
    gone: bool = False
    physics: StepPhysics = field(init=False)
    _inner: RealtimeEngine = field(init=False)

    def __post_init__(self) -> None:
        """Reaches nothing."""
        self.physics = StepPhysics(self.spec.clocks_mhz[-1])
        self._inner = self._made()

    async def connect(self) -> Connected:
        """As the protocol says."""
        self._check()
        return await self._inner.connect()

    async def well(self) -> None:
        """As the protocol says."""
        self._check()
        await self._inner.well()

    async def count(self, ask: ParsedRequest) -> PromptCount:
        """As the protocol says."""
        return await self._inner.count(ask)

    def open(self, call: Call) -> AbstractAsyncContextManager[Reply]:
        """As the protocol says."""
        return self._inner.open(call)

    async def watch(self, tell: Callable[[Report], None]) -> None:
        """As the protocol says."""
        await self._inner.watch(tell)

    async def kill(self) -> None:
        """Its process is gone."""
        self.gone = True
        before, self._inner = self._inner, self._made()
        await before.close("its process was killed")

    def back(self) -> None:
        """It was started again."""
        self.gone = False

    def stall(self, seconds: float) -> None:
        """It stands still for so long."""
        self.physics.stalled_s += seconds

    def _check(self) -> None:
        if self.gone:
            raise EngineError("nobody is there", status=503)

    def _made(self) -> RealtimeEngine:
        library = ctypes.CDLL(str(self.library_folder / NAME))
        top_mhz = self.spec.clocks_mhz[-1]
        clock = TrueClock(library, self.gpu, top_mhz)
        quiet = Noise(time=0.0, power=0.0)
        return RealtimeEngine(self.spec, self.physics, noise=quiet, seed=(self.seed,), gpu=clock, name=MODEL)
