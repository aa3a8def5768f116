"""vLLM and its kin (SGLang, TensorRT-LLM serve, transformers serve ...) as a live engine, over their OpenAI API.

Bytes go on and come back unchanged. Capacities come from the engine where it tells them; step numbers from the plug-in
where it is installed, else from `/metrics` now and then; never who was in a step. Knows nothing of promises or clocks.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, ExitStack
from pathlib import Path

from throttllem.core.types import EngineSpec
from throttllem.engines.base import Call, Connected, EngineError, ParsedRequest, PromptCount, Reply, Report
from throttllem.engines.capacity import (
    ASSUMED_BATCH,
    ASSUMED_BLOCK_TOKENS,
    ASSUMED_BUDGET_TOKENS,
    Capacities,
    Reported,
    ask_capacities,
    metrics_page,
)
from throttllem.engines.http import Upstream
from throttllem.engines.paths import COMPLETION_TOKENS
from throttllem.engines.prometheus import total
from throttllem.engines.step_reports import StepReceiver, check_address
from throttllem.engines.tokens import TokenCounter

SCRAPE_LIMIT_S = 2.0
FAILURES = 3
"""So many scrapes in a row without an answer, and the engine is gone."""


class _StartedAnewError(EngineError):
    """The engine that was reached is gone; another answers in its place."""


class OpenaiEngine:
    """One engine behind `url`. `max_batch`, `max_context_tokens`, `kv_blocks`, `block_tokens` stand in for what it does
    not tell; `tokenizer` is a tokenizer.json; `stats` is where the plug-in sends its steps.
    """

    def __init__(
        self,
        *,
        url: str,
        gpu: str,
        model: str,
        tp: int,
        clocks_mhz: tuple[int, ...],
        idle_w: float,
        startup_s: float = 0.0,
        max_batch: int | None = None,
        max_context_tokens: int | None = None,
        kv_blocks: int | None = None,
        block_tokens: int | None = None,
        tokenizer: Path | None = None,
        stats: str | None = None,
        api_key: str | None = None,
        scrape_s: float = 0.5,
    ) -> None:
        self._upstream = Upstream(url, api_key=api_key)
        self._tokens = TokenCounter(self._upstream, tokenizer)
        self._gpu, self._model, self._tp = gpu, model, tp
        self._clocks_mhz, self._idle_w, self._startup_s = clocks_mhz, idle_w, startup_s
        self._max_batch, self._max_context_tokens = max_batch, max_context_tokens
        self._kv_blocks, self._block_tokens = kv_blocks, block_tokens
        self._stats = stats
        self._scrape_s = scrape_s
        self._told = Reported()
        self._steps_come = False
        self.steps: StepReceiver | None = None
        """The plug-in's steps while `watch` listens to them, with what was lost of them."""

    async def connect(self) -> Connected:
        """Ask what it is. Raises EngineError while it is not well, or if it lacks a number that nobody has set."""
        told = await ask_capacities(self._upstream, need_batch=self._max_batch is None)
        spec, notes = self._spec(told)
        try:
            notes += await self._tokens.begin(told.models[0])
            trouble = self._without_steps(told)
        except ValueError as error:
            raise EngineError(str(error), status=503) from error
        self._told, self._steps_come = told, trouble is None
        return Connected(
            spec=spec,
            models=told.models,
            default_max_tokens=COMPLETION_TOKENS,
            version=told.version,
            notes=(*notes, *([trouble] if trouble is not None else [])),
        )

    async def well(self) -> None:
        """Any answer will do but that it is not well: not every kind has /health. Raises EngineError."""
        status, _ = await self._upstream.get("/health")
        if status >= 500:
            raise EngineError(f"the engine at {self._upstream.url} is not well (/health answers {status})", status=503)

    async def count(self, ask: ParsedRequest) -> PromptCount:
        """Tokens of a prompt, mean if they are several. Raises EngineError if the engine stopped answering."""
        return await self._tokens.count(ask)

    def open(self, call: Call) -> AbstractAsyncContextManager[Reply]:
        """Send a request; leaving the block closes the connection, on which the engine aborts what still runs."""
        return self._upstream.open(call)

    async def close(self) -> None:
        """Close every connection."""
        await self._upstream.close()

    async def watch(self, tell: Callable[[Report], None]) -> None:
        """Tell steps and scrapes until cancelled. Raises EngineError when it is gone, or another than was reached."""
        if not self._told.models:
            await self.connect()
        told, receiver = self._told, None
        with ExitStack() as stack:
            if self._steps_come and self._stats is not None:
                receiver = StepReceiver(self._stats, kv_blocks=told.kv_blocks or 0)
                try:
                    stack.enter_context(receiver.listening(tell))
                except OSError as error:
                    raise EngineError(str(error), status=503) from error
                self.steps = receiver
            await self._scrape(told, receiver, tell)

    async def _scrape(self, told: Reported, receiver: StepReceiver | None, tell: Callable[[Report], None]) -> None:
        failures, heard = 0, 0
        while True:
            try:
                report = await self._scraped(told, steps=receiver is not None)
            except _StartedAnewError:
                raise
            except EngineError:
                failures += 1
                if failures == FAILURES:
                    raise
            else:
                failures = 0
                # While steps come in, they are newer than any scrape.
                if report is not None and (receiver is None or receiver.received == heard):
                    tell(report)
            heard = receiver.received if receiver is not None else 0
            await asyncio.sleep(self._scrape_s)

    async def _scraped(self, told: Reported, *, steps: bool) -> Report | None:
        """One look at the metrics; None: it has none. `steps`: others tell the steps."""
        if not told.metrics:
            await self._upstream.get_json("/v1/models", timeout_s=SCRAPE_LIMIT_S)
            return None
        page = await metrics_page(self._upstream, timeout_s=SCRAPE_LIMIT_S)
        running, waiting = total(page, "vllm:num_requests_running"), total(page, "vllm:num_requests_waiting")
        if running is None or waiting is None:
            raise EngineError(f"the engine at {self._upstream.url} no longer tells what runs on it")
        if total(page, "process_start_time_seconds") != told.started_s:
            raise _StartedAnewError(f"the engine at {self._upstream.url} was started anew")
        usage, iterations = total(page, "vllm:kv_cache_usage_perc"), total(page, "vllm:iteration_tokens_total_count")
        if not all(math.isfinite(value) for value in (running, waiting, usage or 0.0, iterations or 0.0)):
            raise EngineError(f"the engine at {self._upstream.url} tells what is no number of what runs on it")
        known = usage is not None and told.kv_blocks is not None
        return Report(
            running=int(running),
            waiting=int(waiting),
            kv_blocks=round((usage or 0.0) * (told.kv_blocks or 0) / max(1, told.engines)) if known else None,
            step=None if steps or not iterations else int(iterations) - 1,
        )

    def _without_steps(self, told: Reported) -> str | None:
        """Why steps will not come from the plug-in; None: they will."""
        if self._stats is None:
            return "progress is counted from streams and /metrics: set engines.stats and install the plug-in in vLLM"
        if told.sends_to != self._stats:
            state = "is not installed in the engine" if told.sends_to is None else f"sends to {told.sends_to!r}"
            return f"stats = {self._stats!r}, but the plug-in {state}: start vLLM with THROTTLLEM_STATS={self._stats}"
        if told.engines > 1 or told.api_servers > 1:
            return f"steps of {told.engines} engines and {told.api_servers} API servers are no whole: run one of each"
        if self.steps is None or not self.steps.listens:
            try:
                check_address(self._stats)
            except OSError as error:
                return f"{error.strerror}; is another gateway on this engine?"
        return None

    def _spec(self, told: Reported) -> tuple[EngineSpec, tuple[str, ...]]:
        settled, url = Capacities(), self._upstream.url
        batch = settled.capped("max_batch", told.max_batch, self._max_batch)
        batch = settled.assumed("max_batch", ASSUMED_BATCH) if batch is None else batch
        budget = told.prefill_budget_tokens
        blocks = settled.capped("kv_blocks", told.kv_blocks, self._kv_blocks)
        block_tokens = told.block_tokens or self._block_tokens
        context = settled.capped("max_context_tokens", told.max_context_tokens, self._max_context_tokens)
        if blocks is None or context is None:
            missing = "kv_blocks" if blocks is None else "max_context_tokens"
            raise EngineError(f"the engine at {url} does not tell {missing}: set engines.{missing}", status=503)
        spec = EngineSpec(
            gpu=self._gpu,
            model=self._model,
            tp=self._tp,
            kv_blocks=blocks,
            block_tokens=block_tokens or settled.assumed("block_tokens", ASSUMED_BLOCK_TOKENS),
            max_batch=batch,
            max_context_tokens=context,
            prefill_budget_tokens=budget or settled.assumed("its tokens per step", max(ASSUMED_BUDGET_TOKENS, batch)),
            chunked=told.chunked,
            no_evict=False,
            clocks_mhz=self._clocks_mhz,
            idle_w=self._idle_w,
            startup_s=self._startup_s,
        )
        return spec, tuple(settled.notes)
