"""Triton's stream of tokens, written as OpenAI's API answers: events apart, stop words cut off, chunks put together.

Bytes in, bytes out; knows no connection and no clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from json import dumps

from pydantic_core import from_json

from throttllem.engines.sse import Splitter, data_of

DONE = b"data: [DONE]\n\n"


class Events:
    """Server-sent events out of bytes that may be cut anywhere: the JSON object that each has as its data."""

    def __init__(self) -> None:
        self._events = Splitter()

    def feed(self, chunk: bytes) -> Iterator[dict[str, object]]:
        """The events that `chunk` completes. Raises ValueError for data that is no JSON object."""
        for event in self._events.feed(chunk):
            data = event[5:] if event.startswith(b"data:") else data_of(event)
            if data is not None:
                found = from_json(data)
                if not isinstance(found, dict):
                    raise ValueError("an event is no JSON object")
                yield found


class Stops:
    """Cuts an answer off before the first stop word; keeps back what could be the beginning of one."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self._words = words
        self._held = ""
        self.reached = False

    def feed(self, text: str) -> str:
        """What may be shown now; nothing any more once a stop word is `reached`."""
        if not self._words:
            return text
        if self.reached:
            return ""
        text = self._held + text
        found = [at for word in self._words if (at := text.find(word)) >= 0]
        if found:
            self.reached, self._held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, word) for word in self._words)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was kept back, when the answer is over."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, word: str) -> int:
    """Characters at the end of `text` that are the beginning of `word`."""
    return next((size for size in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:size])), 0)


class Answer:
    """One answer as Triton streams it: its texts, its tokens, why it ended, or the `failure` that Triton tells.

    Each event is a token; empty ones at the end are how Triton says that it is over. Empty events in between are
    tokens too: pieces of a character that came whole with a later one.
    """

    def __init__(self, *, limit: int, stops: tuple[str, ...] = ()) -> None:
        self._limit = limit
        self._events = Events()
        self._stops = Stops(stops)
        self._empty = 0
        self._said: str | None = None
        self.begun = False
        self.tokens = 0
        self.failure: str | None = None

    def feed(self, chunk: bytes) -> list[str]:
        """The texts to show now. Raises ValueError for bytes that are no answer of Triton's."""
        texts = []
        for event in self._events.feed(chunk):
            if self.over:
                break
            if "error" in event:
                self.failure = str(event["error"])
                break
            shown = self._stops.feed(self._text(event))
            if shown:
                texts.append(shown)
        return texts

    def rest(self) -> str:
        """What was kept back for fear of a stop word, when the answer is over."""
        return self._stops.rest()

    @property
    def over(self) -> bool:
        """Nothing that comes now belongs to the answer."""
        return self._stops.reached or self.failure is not None

    @property
    def full(self) -> bool:
        """It has as many tokens as it may: no text comes any more."""
        return self.tokens >= self._limit

    @property
    def reason(self) -> str:
        """OpenAI's finish_reason: what the model said, else "length" for an answer as long as it may be."""
        if self._stops.reached:
            return "stop"
        return self._said or ("length" if self.full else "stop")

    def _text(self, event: dict[str, object]) -> str:
        text = event.get("text_output")
        if not isinstance(text, str):
            raise ValueError("an event has no text_output")
        if event.get("finish_reason") in ("stop", "length"):
            self._said = str(event["finish_reason"])
        self.begun = True
        if text:
            self.tokens = min(self.tokens + self._empty + 1, self._limit)
            self._empty = 0
        else:
            self._empty += 1
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int

    def json(self) -> str:
        """As OpenAI's API writes it."""
        total = self.prompt_tokens + self.completion_tokens
        return (
            f'{{"prompt_tokens":{self.prompt_tokens},"completion_tokens":{self.completion_tokens},'
            f'"total_tokens":{total}}}'
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """What every chunk of one answer says of itself."""

    id: str
    created: int
    model: str
    chat: bool

    def head(self, kind: str) -> str:
        """The beginning of its JSON, up to its choices."""
        name, model = dumps(self.id), dumps(self.model)
        return f'{{"id":{name},"object":"{kind}","created":{self.created},"model":{model},"choices":['


class Chunks:
    """The events of one streamed answer. Built from templates: a chunk costs little more than its text."""

    def __init__(self, named: Named) -> None:
        chat = self._chat = named.chat
        head = self._head = "data: " + named.head("chat.completion.chunk" if chat else "text_completion")
        if chat:
            self._open, self._close = f'{head}{{"index":0,"delta":{{"content":', "},"
        else:
            self._open, self._close = f'{head}{{"index":0,"text":', ","
        self._close += '"logprobs":null,"finish_reason":'
        self._more = self._close + "null}]}\n\n"

    def role(self) -> bytes:
        """The first chunk of a chat, nothing for a completion."""
        if not self._chat:
            return b""
        delta = '{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
        return (self._head + delta).encode()

    def text(self, text: str) -> bytes:
        """A chunk of the answer."""
        return (self._open + dumps(text, ensure_ascii=False) + self._more).encode("utf-8", "replace")

    def last(self, text: str, reason: str) -> bytes:
        """The chunk that also says why the answer ended."""
        written = dumps(text, ensure_ascii=False)
        return f'{self._open}{written}{self._close}"{reason}"}}]}}\n\n'.encode("utf-8", "replace")

    def closed(self, reason: str) -> bytes:
        """Why the answer ended, where its last text is out already."""
        body = '"delta":{}' if self._chat else '"text":""'
        return f'{self._head}{{"index":0,{body},"logprobs":null,"finish_reason":"{reason}"}}]}}\n\n'.encode()

    def end(self, usage: Usage | None) -> bytes:
        """The usage if it is wanted, and the end of the stream."""
        return DONE if usage is None else f'{self._head}],"usage":{usage.json()}}}\n\n'.encode() + DONE


def whole(text: str, reason: str, usage: Usage, named: Named) -> bytes:
    """One answer that is not streamed."""
    written = dumps(text, ensure_ascii=False)
    said = f'"message":{{"role":"assistant","content":{written}}}' if named.chat else f'"text":{written}'
    return (
        f"{named.head('chat.completion' if named.chat else 'text_completion')}"
        f'{{"index":0,{said},"logprobs":null,"finish_reason":"{reason}"}}],"usage":{usage.json()}}}'
    ).encode("utf-8", "replace")
