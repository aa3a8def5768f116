"""The simulated engine in real time: one task sleeps through its iterations, and its answers come as OpenAI's API sends
them. The task lives only while something runs, and the clock is the GPU's at each step.

Knows nothing of energy counters or promises: who works on which GPU is the driver's to say, from the reports.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

from throttllem.config import Noise
from throttllem.core.types import EngineSpec
from throttllem.engines.base import Call, Connected, EngineError, ParsedRequest, PromptCount, Reply, Report
from throttllem.engines.paths import COMPLETION_TOKENS
from throttllem.engines.simulated.batcher import Iteration, Outcome
from throttllem.engines.simulated.engine import Physics, SimulatedEngine
from throttllem.engines.simulated.replies import Row, Speech, Stream
from throttllem.engines.simulated.requests import STREAM_HEADERS, FakeApi, json_reply
from throttllem.gpu.device import Gpu

log = logging.getLogger("throttllem.engine")

_LATE_S = 1.0
"""Later than this the past is let go; else it is caught up with."""


class RealtimeEngine:
    """LiveEngine around the simulated one. `seed` drives noise, words and lengths; `now` counts seconds."""

    def __init__(
        self,
        spec: EngineSpec,
        physics: Physics,
        *,
        noise: Noise,
        seed: tuple[int, ...],
        gpu: Gpu,
        name: str,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec = spec
        self.name = name
        self._engine = SimulatedEngine(spec, physics, clock_mhz=spec.clocks_mhz[-1], seed=seed, noise=noise)
        self._gpu = gpu
        self._now = now
        self._api = FakeApi(spec, name=name, seed=seed)
        self._rows: dict[int, Row] = {}
        self._running: dict[int, Row] = {}
        self._gone: list[int] = []
        self._iterating = False
        self._task: asyncio.Task[None] | None = None
        self._tellers: list[Callable[[Report], None]] = []
        self._over = asyncio.Event()
        self._dead: str | None = None

    async def connect(self) -> Connected:
        """What it is; EngineError once it was closed."""
        self._check_alive()
        note = "simulated: its words mean nothing, its time and energy are the physics' with noise"
        return Connected(
            spec=self.spec,
            models=(self.name,),
            default_max_tokens=COMPLETION_TOKENS,
            exact=True,
            named=True,
            version=version("throttllem"),
            notes=(note,),
        )

    async def well(self) -> None:
        """EngineError once it was closed."""
        self._check_alive()

    async def count(self, ask: ParsedRequest) -> PromptCount:
        """Tokens by its own tokenizer: exact, unless the prompt is far too long to be served."""
        return self._api.count(ask)

    @asynccontextmanager
    async def open(self, call: Call) -> AsyncIterator[Reply]:
        """Answer a request. A whole answer is waited for here, as its headers come with it."""
        self._check_alive()
        speech = self._api.answer(call)
        if isinstance(speech, Reply):
            yield speech
            return
        key, row = self._join(call, speech)
        try:
            if speech.wish.stream:
                yield Reply(status=200, headers=STREAM_HEADERS, read=Stream(row, speech).read)
            else:
                await row.reach(speech.output_tokens)
                yield json_reply(200, speech.whole())
        finally:
            self._leave(key, row)

    async def watch(self, tell: Callable[[Report], None]) -> None:
        """Tell of every step, when its tokens are out and before anyone has read them."""
        self._check_alive()
        self._tellers.append(tell)
        try:
            await self._over.wait()
        finally:
            self._tellers.remove(tell)
        self._check_alive()

    async def close(self, why: str = "the simulated engine was stopped") -> None:
        """Stop for good: what runs breaks off, and nothing is served any more."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])
        self._die(why)

    # ---- who runs --------------------------------------------------------------------------------------------

    def _join(self, call: Call, speech: Speech) -> tuple[int, Row]:
        """Requests that the control core does not know get a negative number."""
        key = -self._api.calls if call.request_id is None else call.request_id
        if key in self._rows:
            raise EngineError(f"request {key} is in the engine already", status=503)
        self._engine.batcher.add(
            key, prompt_tokens=speech.prompt_tokens, output_tokens=speech.output_tokens, max_tokens=speech.limit_tokens
        )
        self._rows[key] = row = Row()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())
        return key, row

    def _leave(self, key: int, row: Row) -> None:
        """Take a request out: at once between two iterations, else as soon as the one under way is over."""
        row.broken = row.broken or "the request was ended"
        row.wake()
        if self._rows.get(key) is not row:
            return
        if self._iterating:
            self._gone.append(key)
        else:
            self._cancel(key)

    def _cancel(self, key: int) -> None:
        self._engine.batcher.cancel(key)
        self._engine.ledger.leave(key)
        self._running.pop(key, None)
        del self._rows[key]

    # ---- iterations ------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            await self._iterate()
        except Exception as error:
            log.exception("the simulated engine %s failed", self.name)
            self._die(f"the simulated engine failed: {error!r}")

    async def _iterate(self) -> None:
        """One iteration after the other, each ending when the one before did plus its seconds."""
        end_s = self._now()
        while True:
            self._engine.clock_mhz = self._gpu.read().clock_mhz or self._engine.clock_mhz
            begun = self._engine.step()
            if begun is None:
                return
            iteration, seconds, watts = begun
            self._iterating = True
            for key in iteration.preempted:
                self._running.pop(key, None)
            now_s = self._now()
            end_s = now_s if end_s + seconds < now_s - _LATE_S else end_s + seconds
            await asyncio.sleep(max(0.0, end_s - now_s))
            # Told in the same breath: whoever sees his last token finds its step booked.
            self._report(iteration, self._finish(), seconds, watts)

    def _finish(self) -> Outcome:
        """End an iteration: one token for every row in it."""
        outcome, _ = self._engine.finish()
        self._iterating = False
        for key in outcome.started:
            self._running[key] = self._rows[key]
        for row in self._running.values():
            row.tokens += 1
            if row.waiter is not None and row.tokens >= row.wanted:
                row.wake()
        for key in outcome.finished:
            del self._running[key], self._rows[key]
        for key in self._gone:
            if key in self._rows:
                self._cancel(key)
        self._gone.clear()
        return outcome

    def _report(self, iteration: Iteration, outcome: Outcome, seconds: float, watts: float) -> None:
        if not self._tellers:
            return
        batcher = self._engine.batcher
        report = Report(
            running=len(batcher) - batcher.waiting,
            waiting=batcher.waiting,
            kv_blocks=batcher.used_blocks,
            step=outcome.index,
            seconds=seconds,
            prompt_tokens=iteration.prefill_tokens,
            generated_tokens=iteration.decode_sequences + len(outcome.started),
            started=outcome.started,
            finished=outcome.finished,
            preempted=outcome.preempted,
            prefills=iteration.prefills,
            prefill_pairs=iteration.prefill_pairs,
            decode_sequences=iteration.decode_sequences,
            kv_tokens=iteration.kv_tokens,
            joules=seconds * watts,
        )
        for tell in tuple(self._tellers):
            tell(report)

    # ---- its end ---------------------------------------------------------------------------------------------

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineError(self._dead)

    def _die(self, why: str) -> None:
        self._dead = self._dead or why
        for row in self._rows.values():
            row.broken = why
            row.wake()
        self._rows.clear()
        self._running.clear()
        self._over.set()
