"""The answers of the simulated engine: which one a request gets, or which error, and its bytes.

Lengths and texts are seeded. Knows nothing of time or batching: the real-time engine counts the tokens up.
"""

from __future__ import annotations

import math
import random
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from msgspec import Raw

from throttllem.core.types import EngineSpec
from throttllem.engines.base import Call, PromptCount, Reply, whole_reply
from throttllem.engines.simulated.text import Tape, estimate_tokens
from throttllem.openai_api.errors import ApiError, invalid
from throttllem.openai_api.large_bodies import read_value
from throttllem.openai_api.lax import truth, whole_number
from throttllem.openai_api.requests import COMPLETION_TOKENS, ParsedRequest, check_translated, parse_request, stop_texts
from throttllem.openai_api.responses import JSON_HEADERS, AnswerWriter, Usage, model_list

_ANSWER_TOKENS, _ANSWER_SIGMA = 200, 0.9
"""Mean and spread (log-normal) of the answers of a chat."""
_MESSAGE_TOKENS = 4
"""What a chat template puts around each message."""
_UNSUPPORTED = ("logprobs", "top_logprobs", "echo", "suffix", "audio", "guided_json", "structured_outputs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer: `output_tokens` tokens of the tape from `begin` on, of at most `limit_tokens`."""

    request: ParsedRequest
    prompt_tokens: int
    output_tokens: int
    limit_tokens: int
    begin: int
    tape: Tape = field(repr=False)
    writer: AnswerWriter = field(repr=False)

    @property
    def usage(self) -> Usage:
        """Tokens of prompt and answer."""
        return Usage(prompt_tokens=self.prompt_tokens, completion_tokens=self.output_tokens)

    @property
    def finish_reason(self) -> str:
        """Whether the answer ended by itself or at the limit."""
        return "length" if self.output_tokens >= self.limit_tokens else "stop"

    def events(self, first: int, last: int) -> bytes:
        """The events of tokens `first` up to `last` (without), and those that open and end the stream."""
        pieces, writer = self.tape.take(self.begin, first, last), self.writer
        events = writer.opening() if first == 0 else b""
        if last < self.output_tokens:
            return events + writer.chunks(pieces)
        if len(pieces) > 1:
            events += writer.chunks(pieces[:-1])
        usage = self.usage if self.request.include_usage else None
        return events + writer.last(pieces[-1], self.finish_reason) + writer.end(usage)

    def whole(self) -> Reply:
        """The answer in one piece."""
        text = b"".join(self.tape.take(self.begin, 0, self.output_tokens))
        body = self.writer.whole(text, self.finish_reason, self.usage)
        return whole_reply(200, (*JSON_HEADERS, ("content-length", str(len(body)))), body)


class SimulatedApi:
    """Decides answers. `room_tokens`: the most tokens of prompt and answer of one request."""

    def __init__(self, spec: EngineSpec, *, name: str, seed: tuple[int, ...]) -> None:
        self.room_tokens = min(spec.max_context_tokens, spec.kv_blocks * spec.block_tokens)
        self.answers = 0
        self._name = name
        self._seed = seed
        self._tape = Tape(seed)

    def count(self, request: ParsedRequest) -> PromptCount:
        """Tokens by the engine's own tokenizer: exact, unless the prompt is far too long to be served."""
        check_translated(request, "the simulated engine")
        if request.is_conversation:
            counts = [self._count(text or "") for text in map(_text, request.whole().fields["messages"])]
            tokens = sum(tokens + _MESSAGE_TOKENS for tokens, _ in counts)
        else:
            counts = [self._count(prompt) for prompt in request.prompts]
            tokens = math.ceil(sum(tokens for tokens, _ in counts) / max(1, len(counts)))
        exact = all(exact for _, exact in counts)
        return PromptCount(tokens=max(1, tokens), by="the simulated engine's own tokenizer", exact=exact)

    def _count(self, prompt: str | Raw | Sequence[int]) -> tuple[int, bool]:
        if isinstance(prompt, Raw):
            prompt = str(read_value("prompt", prompt))
        if not isinstance(prompt, str):
            return len(prompt), True
        return estimate_tokens(prompt, most_tokens=self.room_tokens)

    def models(self) -> Reply:
        """The answer of `/v1/models`."""
        return whole_reply(200, JSON_HEADERS, model_list([self._name], 0, max_model_len=self.room_tokens))

    def answer(self, call: Call) -> Answer:
        """The answer to a completion or a chat. Raises ApiError for what is wrong, or beyond this engine."""
        request = (call.request or parse_request(call.path.partition("?")[0], call.body)).whole()
        if request.model not in ("", self._name):
            message = f"The model `{request.model[:80]}` does not exist; this engine serves `{self._name}`."
            raise ApiError(404, message, param="model", code="model_not_found")
        _check_supported(request)
        for stop in stop_texts(request):
            # A stop that no answer ever holds changes nothing; another would end an answer within a token.
            if self._tape.holds(stop):
                raise invalid(f"stop: the simulated engine cannot stop at {stop!r}", "stop")
        seed, least_tokens = _number(request.fields, "seed"), _number(request.fields, "min_tokens", least=0) or 0
        prompt_tokens, limit = self._fit(call, request)
        self.answers += 1
        rng = random.Random(f"{self._seed} {self._own_seed(request, seed)}")
        drawn = round(rng.lognormvariate(math.log(_ANSWER_TOKENS) - _ANSWER_SIGMA**2 / 2, _ANSWER_SIGMA))
        return Answer(
            request=request,
            prompt_tokens=prompt_tokens,
            output_tokens=limit if _flag(request.fields, "ignore_eos") else min(limit, max(1, drawn, least_tokens)),
            limit_tokens=limit,
            begin=self._tape.begin(rng),
            tape=self._tape,
            writer=AnswerWriter(
                chat=request.is_conversation, name=str(self.answers), model=self._name, created_s=int(time.time())
            ),
        )

    def _fit(self, call: Call, request: ParsedRequest) -> tuple[int, int]:
        """Tokens of the prompt, and the limit of the answer. Raises ApiError if there is no room for them."""
        room = self.room_tokens
        prompt = call.prompt_tokens or self.count(request).tokens
        limit = (
            request.max_tokens or call.max_tokens or (room - prompt if request.is_conversation else COMPLETION_TOKENS)
        )
        if limit < 1 or prompt + limit > room:
            message = f"This model holds {room} tokens; the prompt has {prompt}, and {max(1, limit)} were requested."
            raise invalid(message, code="context_length_exceeded")
        return prompt, limit

    def _own_seed(self, request: ParsedRequest, seed: int | None) -> object:
        """With a seed, or at temperature 0, equal requests get equal answers."""
        if seed is None and request.fields.get("temperature") != 0:
            return self.answers
        prompt = request.fields["messages" if request.is_conversation else "prompt"]
        return seed, zlib.crc32(repr(prompt).encode())


def _check_supported(request: ParsedRequest) -> None:
    """Refuse what would change the answer and is beyond this engine."""
    fields = request.fields
    for name in ("n", "best_of"):
        if fields.get(name) not in (None, 1):
            raise invalid(f"{name}: the simulated engine gives one answer to a prompt", name)
    if len(request.prompts) > 1:
        raise invalid("prompt: the simulated engine takes one prompt a request", "prompt")
    for name in _UNSUPPORTED:
        if fields.get(name) not in (None, False, ""):
            raise invalid(f"{name}: the simulated engine cannot do this", name)
    if fields.get("tool_choice") not in (None, "none", "auto"):
        raise invalid("tool_choice: the simulated engine calls no tools", "tool_choice")
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict):
        raise invalid("stream_options must be an object", "stream_options")
    _flag(options, "include_usage")
    form = fields.get("response_format")
    if form is not None and not (isinstance(form, dict) and form.get("type") == "text"):
        raise invalid("response_format: the simulated engine writes plain text only", "response_format")
    if request.is_conversation and any(text is None for text in map(_text, fields["messages"])):
        raise invalid("messages: the simulated engine reads text parts only", "messages")


def _text(message: Mapping[str, object]) -> str | None:
    """The text of a message, "" if it has none; None if its content is not all text."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return "".join(texts) if len(texts) == len(parts) else None


def _number(fields: Mapping[str, object], name: str, *, least: int | None = None) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    number = whole_number(value)
    if number is None or (least is not None and number < least):
        raise invalid(f"{name} must be a whole number" + ("" if least is None else f" of at least {least}"), name)
    return number


def _flag(fields: Mapping[str, object], name: str) -> bool:
    value = fields.get(name)
    if value is None:
        return False
    if (flag := truth(value)) is None:
        raise invalid(f"{name} must be true or false", name)
    return flag
