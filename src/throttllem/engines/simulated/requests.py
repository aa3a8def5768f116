"""The API of the simulated engine: which answer a request gets, or which refusal. Knows nothing of when."""

from __future__ import annotations

import math
import random
import time
import zlib

from pydantic_core import from_json

from throttllem.core.types import EngineSpec
from throttllem.engines.base import Call, ParsedRequest, PromptCount, Reply, whole_reply
from throttllem.engines.paths import CHAT, COMPLETION_TOKENS, COMPLETIONS
from throttllem.engines.simulated.openai_chunks import BadBodyError, ParsedBody, dumped, prompt_tokens, read_wish
from throttllem.engines.simulated.replies import Speech
from throttllem.engines.simulated.text import Tape

STREAM_HEADERS = (("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache"))
_ANSWER_TOKENS, _ANSWER_SIGMA = 200, 0.9
"""Mean and spread (log-normal) of the answers of a chat."""


class FakeApi:
    """Reads calls. `room_tokens` of prompt and answer are what one request may have; words and lengths are seeded."""

    def __init__(self, spec: EngineSpec, *, name: str, seed: tuple[int, ...]) -> None:
        self.room_tokens = min(spec.max_context_tokens, spec.kv_blocks * spec.block_tokens)
        self.calls = 0
        self._name = name
        self._seed = seed
        self._tape = Tape(seed)

    def count(self, ask: ParsedRequest) -> PromptCount:
        """Tokens by its own tokenizer: exact, unless the prompt is far too long to be served."""
        prompts = [ask.body.get("messages")] if ask.messages else list(ask.prompts)
        counts = [prompt_tokens(prompt, most_tokens=self.room_tokens) for prompt in prompts]
        mean = math.ceil(sum(tokens for tokens, _ in counts) / max(1, len(counts)))
        exact = all(exact for _, exact in counts)
        return PromptCount(tokens=mean, by="the simulated engine's own tokenizer", exact=exact)

    def answer(self, call: Call) -> Speech | Reply:
        """The answer to come, or a reply without one."""
        path = call.path.partition("?")[0]
        if (call.method, path) == ("GET", "/v1/models"):
            return self._models()
        try:
            if path not in (CHAT, COMPLETIONS):
                raise BadBodyError(f"The simulated engine has no {path}.", status=404, code="not_found")
            if call.method != "POST":
                raise BadBodyError(f"{path} takes POST.", status=405)
            body = _read(call.body) if call.ask is None else call.ask.body
            return self._draw(call, read_wish(path, body, self._name))
        except BadBodyError as error:
            return json_reply(error.status, error.body())

    def _models(self) -> Reply:
        model = {"id": self._name, "object": "model", "created": 0, "owned_by": "throttllem"}
        return json_reply(200, dumped({"object": "list", "data": [{**model, "max_model_len": self.room_tokens}]}))

    def _draw(self, call: Call, wish: ParsedBody) -> Speech:
        """Where on the tape the answer begins, and how long it gets."""
        prompt, limit = self._fit(call, wish)
        self._refuse_stops(wish)
        self.calls += 1
        own = (wish.seed, zlib.crc32(repr(wish.prompt).encode())) if wish.fixed else self.calls
        rng = random.Random(f"{self._seed} {own}")
        drawn = round(rng.lognormvariate(math.log(_ANSWER_TOKENS) - _ANSWER_SIGMA**2 / 2, _ANSWER_SIGMA))
        return Speech(
            wish,
            self._tape,
            begin=self._tape.begin(rng),
            prompt_tokens=prompt,
            output_tokens=limit if wish.ignore_eos else min(limit, max(1, drawn, wish.min_tokens)),
            limit_tokens=limit,
            name=f"{'chatcmpl' if wish.chat else 'cmpl'}-{self.calls}",
            model=self._name,
            created_s=int(time.time()),
        )

    def _fit(self, call: Call, wish: ParsedBody) -> tuple[int, int]:
        """Tokens of the prompt, and the most of the answer. Raises BadBodyError if there is no room for them."""
        room = self.room_tokens
        prompt = call.prompt_tokens or prompt_tokens(wish.prompt, most_tokens=room)[0]
        default = call.max_tokens or (room - prompt if wish.chat else COMPLETION_TOKENS)
        limit = default if wish.max_tokens is None else wish.max_tokens
        if limit < 1 or prompt + limit > room:
            message = f"This model holds {room} tokens; the prompt has {prompt}, and {max(1, limit)} were asked for."
            raise BadBodyError(message, code="context_length_exceeded")
        return prompt, limit

    def _refuse_stops(self, wish: ParsedBody) -> None:
        """A stop that no answer ever holds changes nothing; another would have to end in the middle of a token."""
        for stop in wish.stops:
            if self._tape.holds(stop):
                raise BadBodyError(f"stop: the simulated engine cannot stop at {stop!r}", param="stop")


def json_reply(status: int, body: bytes) -> Reply:
    """A reply in one piece."""
    headers = (("content-type", "application/json"), ("content-length", str(len(body))))
    return whole_reply(status, headers, body)


def _read(body: bytes) -> dict[str, object]:
    try:
        found = from_json(body)
    except ValueError as error:
        raise BadBodyError(f"The body is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadBodyError("The body must be a JSON object.")
    return found
