"""Gives a real vLLM the speed of an engine on a GPU: each step lasts as long as a law computes for its batch.

A plug-in of vLLM (`vllm.general_plugins`); batching, KV cache and API stay vLLM's own. The law is the physics of a
catalogue's GPU at the clock that a fake NVML has just then, which is given the load and watts of the step; or a line
without any GPU. Each step can be a line in a file. Inside vLLM it needs the standard library, and throttllem's physics.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

VARIABLE = "VLLM_PACE"
"""Names a JSON file with the fields of `Settings`."""
SLICE_S = 0.002
"""How often a step looks at the clock."""
GRACE_S = 0.1
"""The GPU stays as busy as it was for this time while the engine has requests: the host's work between two steps, which
the physics counts into them."""
NAP_S = 0.0002
BELOW = 1.0 - 1e-9
"""At the power limit a rounding error must not make the GPU lower its clock."""


class Physics(NamedTuple):
    """A GPU of the catalogue, played by a fake one: number `gpu` of the state file in the environment of `library`.

    `busy_w`: watts of the fake GPU at full utilisation by MHz (as text: it is JSON).
    """

    library: str
    gpu: int
    kind: str
    model: str
    tp: int
    idle_w: float
    busy_w: Mapping[str, float]


class Settings(NamedTuple):
    """`line`: seconds of every step, of each decoding sequence, of each prompt token; else `physics` holds."""

    line: tuple[float, float, float] | None = None
    physics: Physics | None = None
    log: str | None = None


def install(settings: Settings, folder: Path) -> dict[str, str]:
    """Put the plug-in and its settings into a folder; the environment that makes vLLM load it in its processes."""
    name = Path(__file__).stem
    described = folder / f"{name}-0.dist-info"
    described.mkdir(parents=True, exist_ok=True)
    shutil.copy(__file__, folder)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (described / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{name} = {name}:register\n")
    file = folder / "settings.json"
    file.write_text(json.dumps(settings))
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), VARIABLE: str(file)}


class Batch(NamedTuple):
    """One step, as the physics counts: decoding sequences, the KV they read, prompt tokens, query-key pairs."""

    decode_sequences: int
    kv_tokens: int
    prefill_tokens: int
    prefill_pairs: float


class Gpu(Protocol):
    """A GPU, as an engine feels it."""

    def clock_mhz(self) -> int:
        """As it is now."""

    def work(self, util: float, valid_s: float) -> None:
        """Load from now on, for `valid_s` unless it is set again."""


Law = Callable[[int, int, int, int, float], tuple[float, float]]
"""(clock, *Batch) to seconds and watts."""


class Step(NamedTuple):
    """One line of the file, times on the machine's monotonic clock.

    `waited_s`: what the host took between the step before and this one, of which it is a part; `real_s`: what the
    engine itself computed; `over`: 1 if that was longer than the step should have lasted.
    """

    ended_s: float
    seconds: float
    waited_s: float
    real_s: float
    over: int
    clock_mhz: int
    decode_sequences: int
    kv_tokens: int
    prefill_tokens: int
    joules: float


class Batches:
    """Knows from vLLM's scheduler output what each step computes, and whether the engine has work after it."""

    def __init__(self) -> None:
        self._most: dict[str, int] = {}
        """Tokens of a request at its end: prompt and max_tokens."""

    def take(self, output: Any) -> tuple[Batch, bool]:
        """The step's batch; whether all its requests end with it, as far as can be foreseen."""
        for gone in output.finished_req_ids:
            self._most.pop(gone, None)
        rows: list[tuple[str, int, int]] = []
        for new in output.scheduled_new_reqs:
            self._most[new.req_id] = len(new.prompt_token_ids) + new.sampling_params.max_tokens
            rows.append((new.req_id, new.num_computed_tokens, 0))
        cached = output.scheduled_cached_reqs
        rows += zip(cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True)
        return self._sum(rows, output.num_scheduled_tokens)

    def _sum(self, rows: list[tuple[str, int, int]], scheduled: Mapping[str, int]) -> tuple[Batch, bool]:
        decode_sequences = kv_tokens = prefill_tokens = 0
        pairs, last = 0.0, bool(rows)
        for name, computed, generated in rows:
            tokens = scheduled[name]
            if generated and tokens == 1:
                decode_sequences, kv_tokens = decode_sequences + 1, kv_tokens + computed + 1
            else:
                prefill_tokens, pairs = prefill_tokens + tokens, pairs + tokens * (computed + tokens / 2)
            # What this step makes is its last token: there is one more token than have been computed.
            last &= computed + tokens >= self._most[name] - 1
        return Batch(decode_sequences, kv_tokens, prefill_tokens, pairs), last


class Pacer:
    """Stretches steps: `begin` before the engine computes, `finish` after it."""

    def __init__(
        self,
        law: Law,
        gpu: Gpu,
        idle_w: float,
        busy_w: Mapping[int, float],
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._law, self._gpu, self._idle_w, self._busy_w, self._now, self._sleep = law, gpu, idle_w, busy_w, now, sleep
        self._until_s = -1.0
        """The step before ended then, and the engine has gone on; in the past: it was idle."""

    def begin(self, batch: Batch, last: bool) -> None:
        """A step begins: now, or when the one before ended, where the engine had work all the while."""
        self._batch, self._last, called_s = batch, last, self._now()
        busy = called_s - self._until_s < GRACE_S
        self._began_s = self._at_s = min(called_s, self._until_s) if busy else called_s
        self._called_s, self._done, self._joules, self._mhz = called_s, 0.0, 0.0, 0
        self._look()

    def finish(self) -> Step:
        """Wait until the step has done its work at the clocks that there were meanwhile."""
        real_s = self._now() - self._called_s
        left_s = self._on()
        over = left_s <= 0
        while left_s > 0:
            self._sleep(min(left_s, SLICE_S))
            left_s = self._on()
        # A sleep ends a little late; the next step begins when this one should have ended.
        ended_s = self._at_s if over else self._at_s + left_s
        self._joules += 0.0 if over else left_s * self._watts
        self._until_s = -1.0 if self._last else ended_s
        return Step(
            ended_s,
            ended_s - self._began_s,
            self._called_s - self._began_s,
            real_s,
            int(over),
            self._mhz,
            self._batch.decode_sequences,
            self._batch.kv_tokens,
            self._batch.prefill_tokens,
            self._joules,
        )

    def _on(self) -> float:
        """Count what was done since the last look; seconds that are left at the clock of now, below 0 if it is over."""
        now_s = self._now()
        passed_s, self._at_s = now_s - self._at_s, now_s
        self._done += passed_s / self._seconds
        self._joules += passed_s * self._watts
        left_s = (1.0 - self._done) * self._seconds
        if left_s > 0:
            self._look()
            left_s = (1.0 - self._done) * self._seconds
        return left_s

    def _look(self) -> None:
        """Read the clock, and set how busy the GPU is at it."""
        mhz = self._gpu.clock_mhz()
        if mhz == self._mhz:
            return
        self._mhz = mhz
        self._seconds, self._watts = self._law(mhz, *self._batch)
        left_s = (1.0 - self._done) * self._seconds - (self._now() - self._at_s)
        util = (self._watts * BELOW - self._idle_w) / (self._busy_w[mhz] - self._idle_w)
        self._gpu.work(util, max(0.0, left_s) + (0.0 if self._last else GRACE_S))


class FakeGpu:
    """Through the fake NVML's own functions."""

    def __init__(self, library: str, gpu: int) -> None:
        self._library, self._gpu = ctypes.CDLL(library), gpu
        self._library.fake_nvml_clock.restype = ctypes.c_uint
        self._library.fake_nvml_work.argtypes = (ctypes.c_uint, ctypes.c_double, ctypes.c_double)

    def clock_mhz(self) -> int:
        """The clock in force."""
        return int(self._library.fake_nvml_clock(self._gpu))

    def work(self, util: float, valid_s: float) -> None:
        """Raises OSError if the fake GPU refused it."""
        if code := self._library.fake_nvml_work(self._gpu, util, valid_s):
            raise OSError(f"fake GPU {self._gpu}: utilisation {util:.3f} for {valid_s:.3f} s: error {code}")


class NoGpu:
    """One clock, and nothing to load."""

    def clock_mhz(self) -> int:
        """Always the same."""
        return 1

    def work(self, util: float, valid_s: float) -> None:
        """Ignored."""


def register() -> None:
    """Called by vLLM in each of its processes."""
    if VARIABLE not in os.environ:
        return
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # noqa: PLC0415

    real = GPUModelRunner.execute_model
    if getattr(real, "paced", False):
        return
    _be_patient()
    settings = Settings(*json.loads(Path(os.environ[VARIABLE]).read_text()))
    log: TextIO | None = None
    batches, pacer = Batches(), _pacer(settings)

    def execute_model(self: Any, scheduler_output: Any, *rest: Any, **named: Any) -> Any:
        nonlocal log
        batch, last = batches.take(scheduler_output)
        if not scheduler_output.num_scheduled_tokens:
            return real(self, scheduler_output, *rest, **named)
        pacer.begin(batch, last)
        done = real(self, scheduler_output, *rest, **named)
        step = pacer.finish()
        if settings.log:
            log = log or Path(settings.log).open("a", buffering=1)  # noqa: SIM115 - for as long as the engine lives
            log.write(",".join(f"{value:.6f}".rstrip("0").rstrip(".") for value in step) + "\n")
        return done

    execute_model.paced = True  # type: ignore[attr-defined]
    GPUModelRunner.execute_model = execute_model


def _be_patient() -> None:
    """Engine and worker wait for each other in short naps: spinning, they would take their core from each other."""
    from vllm.distributed.device_communicators import shm_broadcast  # noqa: PLC0415

    shm_broadcast.sched_yield = lambda: time.sleep(NAP_S)


def _pacer(settings: Settings) -> Pacer:
    if settings.physics is None:
        assert settings.line is not None
        step_s, sequence_s, prompt_s = settings.line

        def line(mhz: int, decode: int, kv_tokens: int, prefill_tokens: int, pairs: float) -> tuple[float, float]:
            return step_s + sequence_s * decode + prompt_s * prefill_tokens, 0.0

        return Pacer(line, NoGpu(), 0.0, {1: 1.0})
    from throttllem.physics.catalogue import Catalogue  # noqa: PLC0415
    from throttllem.physics.engine import EnginePhysics  # noqa: PLC0415

    given, catalogue = Physics(*settings.physics), Catalogue.load(None)
    physics = EnginePhysics(catalogue.gpu(given.kind), catalogue.model(given.model), given.tp)
    busy_w = {int(mhz): watts for mhz, watts in given.busy_w.items()}
    return Pacer(physics.iteration, FakeGpu(given.library, given.gpu), given.idle_w, busy_w)
