"""vLLM and its kin (SGLang, TensorRT-LLM serve, transformers serve ...) as a live engine, over their OpenAI API.

Bytes pass unchanged. Capacities come from the engine where it reports them; step numbers from the plug-in where it is
installed, else from `/metrics`; which requests were in a step is never reported. Knows nothing of SLOs or clocks.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from contextlib import ExitStack, suppress

from throttllem.core.types import EngineSpec
from throttllem.engines.base import Card, Connected, EngineError, OwnLimitError, RemoteOptions, Report
from throttllem.engines.capacity import (
    ReportedCapacities,
    engine_spec,
    metrics_page,
    read_capacities,
    read_cards,
    speculated_tokens,
    total,
)
from throttllem.engines.http import Upstream
from throttllem.engines.step_reports import StepReceiver, check_address, parse_address, read_secret, same_address
from throttllem.engines.tokens import TokenCounter
from throttllem.openai_api.requests import COMPLETION_TOKENS

SCRAPE_LIMIT_S = 2.0
FAILURES = 3
"""Scrapes in a row without an answer after which the engine counts as gone."""


class _RestartedError(EngineError):
    """The engine that was reached is gone; another one answers at its address."""


class OpenaiEngine:
    """One engine behind `options.url`; `spec` gives what no engine reports: GPU, model, size, clocks, idle power."""

    def __init__(self, options: RemoteOptions, spec: EngineSpec) -> None:
        self._options = options
        self._spec = spec
        self._upstream = Upstream(options.url, api_key=options.api_key)
        self._tokens = TokenCounter(self._upstream, options.tokenizer, set_by=options.flags("tokenizer"))
        self.count = self._tokens.count
        self.open = self._upstream.open
        """Leaving the block closes the connection, upon which the engine aborts the request."""
        self.close = self._upstream.close
        self._reported = ReportedCapacities()
        self._counted: tuple[int, int] | None = None
        """Tokens generated and accepted of drafts, when the metrics of an engine that speculates were read last."""
        self._reading = asyncio.Lock()
        """Held while the metrics are read: their counts are taken as rises, one after the other."""
        self._report: Callable[[Report], None] | None = None
        self._has_steps = False
        self.steps: StepReceiver | None = None
        """The receiver of the plug-in's steps while `watch` runs, with the count of those that were lost."""

    async def connect(self) -> Connected:
        """Read what it is. Raises EngineError while it is not ready, or if a capacity is neither reported nor set."""
        reported = await read_capacities(self._upstream, need_batch=self._options.max_batch is None)
        spec, notes = engine_spec(reported, self._options, self._spec)
        try:
            notes += await self._tokens.begin(
                next(iter(reported.models)), spec.max_context_tokens, spec.block_tokens if spec.prefix_caching else None
            )
            trouble = self._why_no_steps(reported)
        except ValueError as error:
            raise EngineError(str(error), status=503) from error
        if trouble is not None:
            notes.append(trouble)
        self._reported, self._has_steps = reported, trouble is None
        self._counted = reported.speculated_tokens
        return Connected(
            spec=spec,
            models=tuple(reported.models),
            cards=reported.models,
            roots=reported.roots,
            kv_cache_dtype=reported.kv_cache_dtype,
            default_max_tokens=COMPLETION_TOKENS,
            version=reported.version,
            notes=tuple(notes),
            look=self._look if self._counted is not None and not self._has_steps else None,
        )

    async def well(self) -> None:
        """A health check. Raises EngineError for a status of 500 or more only, as not every kind has /health."""
        status, _ = await self._upstream.get("/health")
        if status >= 500:
            url = self._upstream.url
            raise EngineError(f"the engine at {url} is not healthy (/health answers {status})", status=503)

    async def cards(self) -> dict[str, Card]:
        """The models that it serves now: adapters come and go while it runs. Raises EngineError if it names none."""
        return await read_cards(self._upstream, timeout_s=SCRAPE_LIMIT_S)

    async def watch(self, report: Callable[[Report], None]) -> None:
        """Report steps and scrapes until cancelled. Raises EngineError when the engine is gone or was restarted."""
        if not self._reported.models:
            await self.connect()
        self._report = report
        with ExitStack() as stack:
            receiver = None
            if self._has_steps and self._options.stats is not None:
                try:
                    receiver = StepReceiver(
                        self._options.stats,
                        kv_blocks=self._reported.kv_blocks or 0,
                        boot=self._reported.boot,
                        secret=self._secret(),
                    )
                    stack.enter_context(receiver.listening(report))
                except (OSError, ValueError) as error:
                    raise EngineError(str(error), status=503) from error
                self.steps = receiver
            failures, received = 0, 0
            while True:
                try:
                    if not self._reported.metrics:  # whether it is there at all
                        await self._upstream.get_json("/v1/models", timeout_s=SCRAPE_LIMIT_S)
                        scraped = None
                    else:
                        scraped = await self._scraped(has_steps=receiver is not None)
                except _RestartedError:
                    raise
                except OwnLimitError:
                    pass
                except EngineError:
                    failures += 1
                    if failures == FAILURES:
                        raise
                else:
                    failures = 0
                    # While steps come in, they are newer than any scrape.
                    if scraped is not None and (receiver is None or receiver.received == received):
                        report(scraped)
                received = receiver.received if receiver is not None else 0
                await asyncio.sleep(self._options.scrape_s)

    async def _look(self) -> None:
        """Report a scrape now. What fails is left to `watch`, which notices it too."""
        if self._report is not None:
            with suppress(EngineError):
                self._report(await self._scraped(has_steps=False))

    async def _scraped(self, *, has_steps: bool) -> Report:
        """The state in the metrics. `has_steps`: step numbers come from the plug-in."""
        async with self._reading:
            return await self._read(has_steps=has_steps)

    async def _read(self, *, has_steps: bool) -> Report:
        reported, url = self._reported, self._upstream.url
        page = await metrics_page(self._upstream, timeout_s=SCRAPE_LIMIT_S)
        running, waiting = total(page, "vllm:num_requests_running"), total(page, "vllm:num_requests_waiting")
        if running is None or waiting is None:
            raise EngineError(f"the metrics of the engine at {url} no longer report what runs on it")
        if total(page, "process_start_time_seconds") != reported.started_s:
            raise _RestartedError(f"the engine at {url} was restarted")
        usage, iterations = total(page, "vllm:kv_cache_usage_perc"), total(page, "vllm:iteration_tokens_total_count")
        blocks = None
        if usage is not None and reported.kv_blocks is not None:
            blocks = round(min(1.0, usage / reported.engines) * reported.kv_blocks)
        generated, accepted = self._speculated(page)
        return Report(
            running=int(running),
            waiting=int(waiting),
            generated_tokens=generated,
            accepted_tokens=accepted,
            kv_blocks=blocks,
            prefix_hit_tokens=total(page, "vllm:prefix_cache_hits_total") if reported.prefix_caching else None,
            step=None if has_steps or not iterations else int(iterations) - 1,
        )

    def _speculated(self, page: bytes) -> tuple[int | None, int | None]:
        """Tokens generated and accepted of drafts since the last scrape; None: it does not speculate."""
        before, counted = self._counted, speculated_tokens(page)
        if counted is None:
            return None, None
        self._counted = counted
        if before is None or counted[0] < before[0] or counted[1] < before[1]:
            return None, None
        return counted[0] - before[0], counted[1] - before[1]

    def _secret(self) -> bytes | None:
        """The secret of step reports, if one is set. Raises ValueError."""
        return None if self._options.stats_secret is None else read_secret(self._options.stats_secret)

    def _why_no_steps(self, reported: ReportedCapacities) -> str | None:
        """Why steps will not come from the plug-in; None: they will."""
        stats = self._options.stats
        if stats is None:
            way = self._options.flags("stats")
            return f"progress is counted from streams and /metrics: give {way} and install the plug-in in vLLM"
        sends_to, address = reported.sends_to, parse_address(stats)[1]
        if sends_to is None or not same_address(sends_to, stats):
            state = "is not installed in the engine" if sends_to is None else f"sends to {sends_to!r}"
            set_to = f"{address}" if isinstance(address, str) else f"{stats} THROTTLLEM_STATS_SECRET=FILE"
            return f"stats = {stats!r}, but the plug-in {state}: start vLLM with THROTTLLEM_STATS={set_to}"
        if reported.boot is None:
            return (
                f"stats = {stats!r}, but the plug-in in the engine is older than this gateway: install the same version"
            )
        self._secret()
        if reported.engines > 1 or reported.api_servers > 1:
            return (
                f"stats: steps of {reported.engines} engines and {reported.api_servers} API servers cannot be put "
                "together: run one of each"
            )
        if self.steps is None or not self.steps.is_listening:
            try:
                check_address(stats)
            except OSError as error:
                taken = "; is another gateway on this engine?" if error.errno == errno.EADDRINUSE else ""
                return f"{error.strerror}{taken}"
        return None
