"""TensorRT-LLM on Triton as an engine: OpenAI's completions and chats out of `generate_stream`, Triton's own paths on.

Answers are always streamed from Triton, also those that a client gets whole, so that leaving early stops them there.
What Triton does not say of itself comes from `spec`, the catalogue's engine, and is told in the notes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import quote, urlsplit

from pydantic_core import from_json, to_json

from throttllem.core.types import EngineSpec
from throttllem.engines.base import Call, Connected, EngineError, ParsedRequest, PromptCount, Reply, Report
from throttllem.engines.http import Upstream
from throttllem.engines.paths import CHAT, COMPLETION_TOKENS, COMPLETIONS
from throttllem.engines.tokenizer_file import TokenizerFile
from throttllem.engines.triton.api import UnsupportedError, error_reply, prompt_text, token_limit
from throttllem.engines.triton.chat_template import ChatError, Template, chat_template, checked, plain
from throttllem.engines.triton.facts import Given, Metrics, ModelFacts, capacities, metrics, model_facts
from throttllem.engines.triton.job import Job, body_of, new_job, serve

DEFAULT_MODEL = "ensemble"
SCHEDULER_MODEL = "tensorrt_llm"
"""The part of an ensemble that batches, where NVIDIA's names were kept; its configuration tells the scheduler's."""
FAILURES = 3
"""Checks in a row that must fail before the engine counts as gone."""
CHECK_S = 2.0
OFF_LOOP_CHARACTERS = 16384
"""Longer texts are counted in a thread, so that they do not hold up every other request."""


class TritonEngine:
    """A `LiveEngine` over one model of one Triton server. `metrics_url`: Triton's own metrics page, if it may be read.

    `tokenizer` is the model's tokenizer.json; a chat template beside it is used for chats.
    """

    def __init__(
        self,
        url: str,
        spec: EngineSpec,
        *,
        model: str | None = None,
        given: Given | None = None,
        tokenizer: Path | None = None,
        metrics_url: str | None = None,
        api_key: str | None = None,
        poll_s: float = 1.0,
    ) -> None:
        self._model = model or DEFAULT_MODEL
        self._base = f"/v2/models/{quote(self._model, safe='')}"
        self._upstream = Upstream(url, api_key=api_key)
        self._spec, self._given = spec, given or Given()
        self._tokenizer_path, self._tokenizer = tokenizer, TokenizerFile(tokenizer)
        self._metrics_url = metrics_url
        self._metrics = None if metrics_url is None else Upstream(_origin(metrics_url))
        self._poll_s = poll_s
        self._facts = ModelFacts()
        self._template: Template = plain
        self._max_context_tokens = self._given.max_context_tokens or spec.max_context_tokens

    # ---- what it is ----------------------------------------------------------------------------------------------

    async def connect(self) -> Connected:
        """Ask for the model and its capacities. Raises EngineError while the model is not ready."""
        await self._ready()
        try:
            await asyncio.to_thread(self._tokenizer.load)
            self._template, origin = chat_template(self._tokenizer_path)
        except ChatError as error:
            raise EngineError(str(error)) from error
        config = await self._object(f"{self._base}/config")
        scheduler = await self._object(f"/v2/models/{SCHEDULER_MODEL}/config") or config
        self._facts = ModelFacts() if config is None else model_facts(config)
        batching = self._facts if scheduler is None else model_facts(scheduler)
        measured = await self._scrape()
        spec, notes = capacities(self._spec, self._given, batching, measured or Metrics())
        notes += (
            [] if config is not None else ["Triton does not show the model's configuration: its inputs are assumed"]
        )
        notes += self._assumed(measured, origin)
        return Connected(
            spec=spec,
            models=(self._model,),
            default_max_tokens=COMPLETION_TOKENS,
            version=f"Triton {(await self._object('/v2') or {}).get('version', '')}".strip(),
            notes=tuple(notes),
        )

    async def well(self) -> None:
        """Ask whether the model is ready. Raises EngineError if it is not."""
        await self._ready()

    async def count(self, ask: ParsedRequest) -> PromptCount:
        """Tokens of the prompt by the tokenizer.json, or an estimate from its bytes that says so."""
        if not ask.messages and ask.prompts and all(isinstance(prompt, tuple) for prompt in ask.prompts):
            return PromptCount(tokens=_mean([len(prompt) for prompt in ask.prompts]), by="its token ids", exact=True)
        if ask.messages:
            tokens = await self._chat_tokens(ask.body)
        else:
            each = [await self._tokens(text) if isinstance(text, str) else len(text) for text in ask.prompts]
            tokens = _mean(each)
        return PromptCount(tokens=tokens, by=self._tokenizer.name, exact=self._tokenizer.exact)

    async def watch(self, tell: Callable[[Report], None]) -> None:
        """Look after the model, and tell TensorRT-LLM's own numbers where its metrics may be read."""
        failed = 0
        while True:
            try:
                await self._ready()
                failed = 0
            except EngineError:
                failed += 1
                if failed >= FAILURES:
                    raise
            found = None if failed else await self._scrape()
            if found is not None and found.scheduled is not None:
                waiting = max(0, (found.active or 0) - found.scheduled)
                tell(Report(running=found.scheduled, waiting=waiting, kv_blocks=found.used_blocks))
            await asyncio.sleep(self._poll_s)

    async def close(self) -> None:
        """Close every connection."""
        await self._upstream.close()
        if self._metrics is not None:
            await self._metrics.close()

    async def _ready(self) -> None:
        status, _ = await self._upstream.get(f"{self._base}/ready", timeout_s=CHECK_S)
        if status != 200:
            raise EngineError(f"{self._upstream.url}: the model {self._model!r} is not ready ({status})", status=503)

    async def _object(self, path: str) -> Mapping[str, object] | None:
        """The JSON object at a path; None where Triton gives none."""
        status, body = await self._upstream.get(path)
        with suppress(ValueError):
            found = from_json(body) if status == 200 else None
            return found if isinstance(found, dict) else None
        return None

    async def _scrape(self) -> Metrics | None:
        """The metrics; None where none are configured, or they cannot be read now."""
        if self._metrics is None or self._metrics_url is None:
            return None
        with suppress(EngineError):
            status, page = await self._metrics.get(urlsplit(self._metrics_url).path or "/metrics", timeout_s=CHECK_S)
            return metrics(page) if status == 200 else None
        return None

    def _assumed(self, measured: Metrics | None, origin: str) -> list[str]:
        notes = [f"chats are written as text by the template {origin}"]
        if origin == "plain":
            notes[0] = (
                "chats are written plainly (role: content); put the model's tokenizer_config.json beside its tokenizer"
            )
        if not self._tokenizer.exact:
            notes.append("prompts are counted as 4 bytes per token; engines.tokenizer names a tokenizer.json")
        if measured is None:
            why = (
                "not configured (engines.metrics_url)"
                if self._metrics is None
                else f"not to be read at {self._metrics_url}"
            )
            notes.append(f"Triton's metrics are {why}: what runs in the engine is known from the streams alone")
        return notes

    async def _chat_tokens(self, body: Mapping[str, object]) -> int:
        try:
            text = self._chat_text(body)
        except UnsupportedError:
            # `open` answers it with what is wrong.
            return await self._tokens(to_json(body.get("messages"), fallback=str).decode())
        return await self._tokens(text, special=self._template is plain)

    async def _tokens(self, text: str, *, special: bool = True) -> int:
        if len(text) > OFF_LOOP_CHARACTERS:
            return await asyncio.to_thread(self._tokenizer.count, text, special=special)
        return self._tokenizer.count(text, special=special)

    # ---- requests ------------------------------------------------------------------------------------------------

    def open(self, call: Call) -> AbstractAsyncContextManager[Reply]:
        """OpenAI's paths are translated, all others go on as they are; leaving the block ends the request in Triton."""
        path = call.path.partition("?")[0]
        if call.method == "POST" and path in (COMPLETIONS, CHAT):
            try:
                return serve(self._upstream, self._job(call, chat=path == CHAT))
            except UnsupportedError as error:
                return _answered(error_reply(str(error), 400, param=error.param))
        if path.startswith("/v1/"):
            return _answered(error_reply(f"{call.method} {path}: Triton serves no such path", 404, code="not_found"))
        return self._upstream.open(call)

    def _job(self, call: Call, *, chat: bool) -> Job:
        body = body_of(call)
        text = self._chat_text(body) if chat else prompt_text(body)
        prompt_tokens = call.prompt_tokens or self._tokenizer.count(text)
        room = max(1, self._max_context_tokens - prompt_tokens) if chat else COMPLETION_TOKENS
        return new_job(
            call,
            body,
            base=self._base,
            model=self._model,
            chat=chat,
            text=text,
            prompt_tokens=prompt_tokens,
            limit=token_limit(body, chat=chat) or call.max_tokens or room,
            inputs=self._facts.inputs,
        )

    def _chat_text(self, body: Mapping[str, object]) -> str:
        try:
            return self._template(checked(body.get("messages")))
        except ChatError as error:
            raise UnsupportedError("messages", str(error)) from error


@asynccontextmanager
async def _answered(reply: Reply) -> AsyncIterator[Reply]:
    yield reply


def _mean(counts: Sequence[int]) -> int:
    return max(1, round(sum(counts) / max(1, len(counts))))


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
