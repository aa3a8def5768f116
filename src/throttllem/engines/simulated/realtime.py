"""The simulated engine in real time: one task sleeps through its iterations while requests run in it.

The GPU's clock is read at each step. Knows nothing of energy counters or SLOs: the gateway accounts by the reports.
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
from throttllem.engines.base import Call, Card, Connected, EngineError, PromptCount, Reply, Report, error_reply
from throttllem.engines.simulated.batcher import Iteration, Outcome
from throttllem.engines.simulated.engine import Physics, SimulatedEngine
from throttllem.engines.simulated.replies import Answer, SimulatedApi
from throttllem.gpu.device import Gpu
from throttllem.openai_api.errors import ApiError
from throttllem.openai_api.large_bodies import LARGE_BYTES
from throttllem.openai_api.requests import CHAT, COMPLETION_TOKENS, COMPLETIONS, ParsedRequest
from throttllem.openai_api.responses import STREAM_HEADERS

log = logging.getLogger("throttllem.engine")

_LATE_S = 1.0
"""An engine that is later than this goes on from now; one that is less late catches up."""


class _Generation:
    """An answer being generated: `tokens` of it are out, and `sent` of those were read."""

    __slots__ = ("answer", "broken", "sent", "tokens", "waiter", "wanted")

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.tokens = 0
        self.sent = 0
        self.wanted = 0
        self.waiter: asyncio.Future[None] | None = None
        self.broken: str | None = None

    async def reach(self, tokens: int) -> None:
        """Wait until this many tokens are out. Raises EngineError if they never will be."""
        while self.tokens < tokens:
            if self.broken is not None:
                raise EngineError(self.broken)
            self.wanted = tokens
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter

    async def read(self) -> bytes:
        """The events of all tokens that are out since the last call, at least one; a slow reader costs no memory."""
        first = self.sent
        if first == self.answer.output_tokens:
            return b""
        if self.tokens == first:
            await self.reach(first + 1)
        self.sent = self.tokens
        return self.answer.events(first, self.tokens)

    def wake(self) -> None:
        """Let the reader look again."""
        waiter, self.waiter = self.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class RealtimeEngine:
    """LiveEngine around the simulated one. `seed` drives noise, texts and lengths; `now` counts seconds."""

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
        self._api = SimulatedApi(spec, name=name, seed=seed)
        self._generations: dict[int, _Generation] = {}
        self._decoding: dict[int, _Generation] = {}
        self._left: list[int] = []
        self._iterating = False
        self._task: asyncio.Task[None] | None = None
        self._watchers: list[Callable[[Report], None]] = []
        self._over = asyncio.Event()
        self._dead: str | None = None

    async def connect(self) -> Connected:
        """What it is. Raises EngineError once it was closed."""
        self._check_alive()
        note = "simulated: its text is meaningless, its time and energy are the physical model's with noise"
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
        """Raises EngineError once it was closed."""
        self._check_alive()

    async def cards(self) -> dict[str, Card]:
        """Its one model."""
        return {self.name: {}}

    async def count(self, request: ParsedRequest) -> PromptCount:
        """Tokens by its own tokenizer: exact, unless the prompt is far too long to be served."""
        if len(request.body) > LARGE_BYTES:
            return await asyncio.to_thread(self._api.count, request)
        return self._api.count(request)

    @asynccontextmanager
    async def open(self, call: Call) -> AsyncIterator[Reply]:
        """Answer a request. A whole answer is waited for here, as its headers come with it."""
        self._check_alive()
        path = call.path.partition("?")[0]
        if (call.method, path) == ("GET", "/v1/models"):
            yield self._api.models()
            return
        try:
            if path not in (COMPLETIONS, CHAT):
                raise ApiError(404, f"The simulated engine has no {path}.", code="not_found")
            if call.method != "POST":
                raise ApiError(405, f"{path} takes POST.")
            answer = self._api.answer(call)
        except ApiError as error:
            yield error_reply(error)
            return
        key, generation = self._join(call, answer)
        try:
            if answer.request.stream:
                yield Reply(status=200, headers=STREAM_HEADERS, read=generation.read)
            else:
                await generation.reach(answer.output_tokens)
                yield answer.whole()
        finally:
            self._leave(key, generation)

    async def watch(self, report: Callable[[Report], None]) -> None:
        """Report every step, when its tokens are out and before any of them is read."""
        self._check_alive()
        self._watchers.append(report)
        try:
            await self._over.wait()
        finally:
            self._watchers.remove(report)
        self._check_alive()

    async def close(self, why: str = "the simulated engine was stopped") -> None:
        """Stop for good: running requests break off, and later ones fail."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])
        self._die(why)

    # ---- requests --------------------------------------------------------------------------------------------

    def _join(self, call: Call, answer: Answer) -> tuple[int, _Generation]:
        """Requests that the control core does not know get a negative id."""
        key = -self._api.answers if call.request_id is None else call.request_id
        if key in self._generations:
            raise EngineError(f"request {key} is in the engine already", status=503)
        self._engine.batcher.add(
            key, prompt_tokens=answer.prompt_tokens, output_tokens=answer.output_tokens, max_tokens=answer.limit_tokens
        )
        self._generations[key] = generation = _Generation(answer)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())
        return key, generation

    def _leave(self, key: int, generation: _Generation) -> None:
        """Take a request out: at once between two iterations, else at the end of the running one."""
        generation.broken = generation.broken or "the request was ended"
        generation.wake()
        if self._generations.get(key) is not generation:
            return
        if self._iterating:
            self._left.append(key)
        else:
            self._cancel(key)

    def _cancel(self, key: int) -> None:
        self._engine.batcher.cancel(key)
        self._engine.ledger.leave(key)
        self._decoding.pop(key, None)
        del self._generations[key]

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
                self._decoding.pop(key, None)
            now_s = self._now()
            end_s = now_s if end_s + seconds < now_s - _LATE_S else end_s + seconds
            await asyncio.sleep(max(0.0, end_s - now_s))
            # Reported without an await in between: a client that reads its last token finds the step accounted for.
            self._report(iteration, self._finish(), seconds, watts)

    def _finish(self) -> Outcome:
        """End an iteration: one token for every sequence in it."""
        outcome, _ = self._engine.finish()
        self._iterating = False
        for key in outcome.started:
            self._decoding[key] = self._generations[key]
        for generation in self._decoding.values():
            generation.tokens += 1
            if generation.waiter is not None and generation.tokens >= generation.wanted:
                generation.wake()
        for key in outcome.finished:
            del self._decoding[key], self._generations[key]
        for key in self._left:
            if key in self._generations:
                self._cancel(key)
        self._left.clear()
        return outcome

    def _report(self, iteration: Iteration, outcome: Outcome, seconds: float, watts: float) -> None:
        if not self._watchers:
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
        for watcher in tuple(self._watchers):
            watcher(report)

    # ---- its end ---------------------------------------------------------------------------------------------

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineError(self._dead)

    def _die(self, why: str) -> None:
        self._dead = self._dead or why
        for generation in self._generations.values():
            generation.broken = why
            generation.wake()
        self._generations.clear()
        self._decoding.clear()
        self._over.set()
