"""TensorRT-LLM on Triton as a live engine: OpenAI's API by way of `generate_stream`, Triton's native paths unchanged.

Answers are always streamed from Triton, even those that a client gets in one piece, so that leaving early stops them
there. Capacities that Triton does not report come from the options or the catalogue's engine, and the notes name them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from urllib.parse import quote, urlsplit
from uuid import uuid4

from msgspec import Raw
from pydantic_core import from_json, to_json

from throttllem.core.types import EngineSpec
from throttllem.engines.base import (
    Call,
    Card,
    Connected,
    EngineError,
    OwnLimitError,
    PromptCount,
    RemoteOptions,
    Reply,
    Report,
    error_reply,
    whole_reply,
)
from throttllem.engines.http import Upstream
from throttllem.engines.tokens import TokenizerFile, mean_count
from throttllem.engines.triton.chat_template import Template, TemplateError, chat_template, plain, text_messages
from throttllem.engines.triton.facts import Metrics, ModelFacts, engine_spec, metrics, model_facts
from throttllem.engines.triton.translation import Generation, failure_text, prompt_text, triton_body
from throttllem.openai_api.errors import ApiError, error_event
from throttllem.openai_api.large_bodies import LARGE_BYTES
from throttllem.openai_api.requests import (
    CHAT,
    COMPLETION_TOKENS,
    COMPLETIONS,
    ParsedRequest,
    check_translated,
    parse_request,
    stop_texts,
)
from throttllem.openai_api.responses import JSON_HEADERS, STREAM_HEADERS, AnswerWriter, Usage

DEFAULT_MODEL = "ensemble"
SCHEDULER_MODEL = "tensorrt_llm"
"""The model of an ensemble that batches, by NVIDIA's names; its configuration has the scheduler's parameters."""
FAILURES = 3
"""Checks in a row that must fail before the engine counts as gone."""
CHECK_S = 2.0
CAPACITIES_S = 2.0
_PASSED_HEADERS = frozenset({"authorization", "x-request-id", "traceparent", "tracestate"})


class TritonEngine:
    """One model of one Triton server: `options.served_as`, by default "ensemble".

    A chat template beside `options.tokenizer` is used for chats. `options.metrics_url` is Triton's own metrics page.
    """

    def __init__(self, options: RemoteOptions, spec: EngineSpec) -> None:
        self._options = options
        self._spec = spec
        self._model = options.served_as or DEFAULT_MODEL
        self._base = f"/v2/models/{quote(self._model, safe='')}"
        self._upstream = Upstream(options.url, api_key=options.api_key)
        metrics_at = urlsplit(options.metrics_url or "")
        self._metrics = Upstream(f"{metrics_at.scheme}://{metrics_at.netloc}") if options.metrics_url else None
        self._metrics_path = metrics_at.path or "/metrics"
        self._tokenizer = TokenizerFile(options.tokenizer)
        self._template: Template = plain
        self._facts = ModelFacts()

    # ---- what it is ----------------------------------------------------------------------------------------------

    async def connect(self) -> Connected:
        """Read the model and its capacities. Raises EngineError while the model is not ready."""
        await self.well()
        await self._tokenizer.load()
        try:
            self._template, template_path = chat_template(self._tokenizer.path)
        except TemplateError as error:
            raise EngineError(str(error)) from error
        config = await self._object(f"{self._base}/config")
        scheduler = await self._object(f"/v2/models/{SCHEDULER_MODEL}/config")
        self._facts = model_facts(config or {})
        measured = await self._capacities()
        batching = model_facts(scheduler or config or {})
        spec, notes = engine_spec(self._spec, self._options, batching, measured or Metrics())
        if config is None:
            notes.append("Triton does not show the model's configuration: its inputs are assumed")
        if template_path is None:
            notes.append(
                "chats are written plainly (role: content); put the model's tokenizer_config.json beside its tokenizer"
            )
        else:
            notes.append(f"chats are written as text by the template {template_path}")
        if not self._tokenizer.exact:
            notes.append(f"prompts are counted as 4 bytes per token; give {self._options.flags('tokenizer')}")
        if measured is None:
            url = self._options.metrics_url
            why = (
                f"cannot be read at {url}" if url else f"are not configured: give {self._options.flags('metrics_url')}"
            )
            notes.append(f"what runs in the engine is known from the streams alone: Triton's metrics {why}")
        return Connected(
            spec=spec,
            models=(self._model,),
            default_max_tokens=COMPLETION_TOKENS,
            version=f"Triton {(await self._object('/v2') or {}).get('version', '')}".strip(),
            notes=tuple(notes),
        )

    async def well(self) -> None:
        """A health check of the model. Raises EngineError if it is not ready."""
        status, _ = await self._upstream.get(f"{self._base}/ready", timeout_s=CHECK_S)
        if status != 200:
            raise EngineError(f"{self._upstream.url}: the model {self._model!r} is not ready ({status})", status=503)

    async def cards(self) -> dict[str, Card]:
        """The one model that is configured."""
        return {self._model: {}}

    async def count(self, request: ParsedRequest) -> PromptCount:
        """Tokens of the prompt by the tokenizer.json, or an estimate from its bytes that is marked as one."""
        check_translated(request, "Triton")
        if len(request.body) > LARGE_BYTES:
            request = await asyncio.to_thread(request.whole)
        if request.is_conversation:
            try:
                text = self._chat_text(request)
            except ApiError:  # `open` answers it
                text = to_json(request.fields.get("messages")).decode()
            return await self._tokenizer.count(text, special=self._template is plain)
        return mean_count([await self._count(prompt) for prompt in request.prompts])

    async def _count(self, prompt: str | Raw | Sequence[int]) -> PromptCount:
        if isinstance(prompt, str):
            return await self._tokenizer.count(prompt)
        return PromptCount(tokens=len(prompt), by="its token ids", exact=True)

    async def watch(self, report: Callable[[Report], None]) -> None:
        """Check the model's health, and report TensorRT-LLM's own numbers where its metrics may be read."""
        failed = 0
        while True:
            try:
                await self.well()
                failed = 0
            except OwnLimitError:
                pass
            except EngineError:
                failed += 1
                if failed >= FAILURES:
                    raise
            found = None if failed else await self._scrape()
            if found is not None and found.scheduled is not None:
                waiting = max(0, (found.active or 0) - found.scheduled)
                report(Report(running=found.scheduled, waiting=waiting, kv_blocks=found.used_blocks))
            await asyncio.sleep(self._options.scrape_s)

    async def close(self) -> None:
        """Close every connection."""
        await self._upstream.close()
        if self._metrics is not None:
            await self._metrics.close()

    async def _object(self, path: str) -> Mapping[str, object] | None:
        """The JSON object at a path; None where Triton answers none."""
        status, body = await self._upstream.get(path)
        with suppress(ValueError):
            found = from_json(body) if status == 200 else None
            return found if isinstance(found, dict) else None
        return None

    async def _capacities(self) -> Metrics | None:
        """The metrics once they state the KV cache; what there is after CAPACITIES_S. None as for `_scrape`.

        A model is ready before its first numbers are on the page of metrics.
        """
        end_s = time.monotonic() + CAPACITIES_S
        measured = await self._scrape()
        while self._metrics is not None and not (measured and measured.kv_blocks) and time.monotonic() < end_s:
            await asyncio.sleep(0.1)
            measured = await self._scrape()
        return measured

    async def _scrape(self) -> Metrics | None:
        """The metrics; None where none are configured, or they cannot be read now."""
        if self._metrics is not None:
            with suppress(EngineError):
                status, page = await self._metrics.get(self._metrics_path, timeout_s=CHECK_S)
                return metrics(page) if status == 200 else None
        return None

    # ---- requests ------------------------------------------------------------------------------------------------

    def open(self, call: Call) -> AbstractAsyncContextManager[Reply]:
        """Translate OpenAI's paths, send all others as they are; leaving the block ends the request in Triton."""
        path = call.path.partition("?")[0]
        if call.method == "POST" and path in (COMPLETIONS, CHAT):
            return self._completion(call, path)
        if path.startswith("/v1/"):
            error = ApiError(404, f"{call.method} {path}: Triton serves no such path", code="not_found")
            return _answered(error_reply(error))
        return self._upstream.open(call)

    @asynccontextmanager
    async def _completion(self, call: Call, path: str) -> AsyncIterator[Reply]:
        """The answer to a completion or a chat."""
        try:
            if len(call.body) > LARGE_BYTES:
                request, prompt_tokens, limit, body = await asyncio.to_thread(self._translated, call, path)
            else:
                request, prompt_tokens, limit, body = self._translated(call, path)
        except ApiError as error:
            yield error_reply(error)
            return
        headers = JSON_HEADERS + tuple(pair for pair in call.headers if pair[0] in _PASSED_HEADERS)
        path = f"{self._base}/generate_stream"
        sent = Call(method="POST", path=path, headers=headers, body=body, request=request)
        writer = AnswerWriter(
            chat=request.is_conversation,
            name=uuid4().hex,
            model=request.model or self._model,
            created_s=int(time.time()),
        )
        generation = Generation(limit=limit, stops=stop_texts(request))
        async with self._upstream.open(sent) as reply:
            if reply.status != 200:
                status = reply.status if reply.status >= 400 else 502
                yield error_reply(ApiError(status, failure_text(await reply.body())))
            elif request.stream:
                events = self._events(reply, generation, writer, prompt_tokens if request.include_usage else None)
                async with aclosing(events):
                    yield Reply(status=200, headers=STREAM_HEADERS, read=lambda: anext(events, b""))
            else:
                texts: list[bytes] = []
                while not generation.over:
                    texts += await self._texts(reply, generation)
                if generation.failure is not None:
                    raise EngineError(f"the engine at {self._upstream.url} failed: {generation.failure}")
                usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=generation.tokens)
                body = writer.whole(b"".join(texts) + generation.rest(), generation.finish_reason, usage)
                yield whole_reply(200, JSON_HEADERS, body)

    def _translated(self, call: Call, path: str) -> tuple[ParsedRequest, int, int, bytes]:
        """The request, tokens of its prompt, the limit of the answer, and Triton's body. Raises ApiError."""
        request = (call.request or parse_request(path, call.body)).whole()
        text = self._chat_text(request) if request.is_conversation else prompt_text(request)
        prompt_tokens = call.prompt_tokens or self._tokenizer.tokens(text)
        room = (self._options.max_context_tokens or self._spec.max_context_tokens) - prompt_tokens
        limit = (
            request.max_tokens or call.max_tokens or (max(1, room) if request.is_conversation else COMPLETION_TOKENS)
        )
        native = triton_body(request, text=text, limit=limit, inputs=self._facts.inputs)
        return request, prompt_tokens, limit, to_json(native)

    def _chat_text(self, request: ParsedRequest) -> str:
        return self._template(text_messages(request.fields.get("messages")))

    async def _texts(self, reply: Reply, generation: Generation) -> list[bytes]:
        """The texts of the next read. Raises EngineError for what is no answer."""
        chunk = await reply.read()
        try:
            return generation.feed(chunk)
        except ValueError as error:
            raise EngineError(f"the answer of the engine at {self._upstream.url} cannot be read: {error}") from error

    async def _events(
        self, reply: Reply, generation: Generation, writer: AnswerWriter, prompt_tokens: int | None
    ) -> AsyncGenerator[bytes, None]:
        """The events of a streamed answer. `prompt_tokens`: for the usage chunk, None where none is wanted."""
        opening, closed = writer.opening(), False
        while not generation.over:
            texts = await self._texts(reply, generation)
            if closed:
                continue
            chunks = b""
            if generation.full and not generation.cut:
                # The reason goes with the last token: a chunk of its own would count as one more.
                *texts, last = texts or [b""]
                chunks, closed = writer.last(last + generation.rest(), generation.finish_reason), True
            chunks = (writer.chunks(texts) if texts else b"") + chunks
            if chunks:
                yield opening + chunks
                opening = b""
        if generation.failure is not None:
            yield error_event(ApiError(500, generation.failure), CHAT)
            return
        rest, reason = generation.rest(), generation.finish_reason
        if not closed:
            yield opening + (writer.last(rest, reason) if rest else writer.closing(reason))
        usage = None
        if prompt_tokens is not None:
            usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=generation.tokens)
        yield writer.end(usage)


@asynccontextmanager
async def _answered(reply: Reply) -> AsyncIterator[Reply]:
    yield reply
