"""Writes answers of OpenAI's API: the events of a stream, and answers in one piece.

A chunk of a stream is a template with the text in it, so that a token costs a concatenation. Texts are passed as the
content of a JSON string (`escaped`), which an engine may have ready. Knows nothing of tokens, time or connections.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

JSON_HEADERS = (("content-type", "application/json"),)
STREAM_HEADERS = (("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache"))
DONE = b"data: [DONE]\n\n"
"""The event that ends every stream."""


def escaped(text: str) -> bytes:
    """The text as it stands inside a JSON string; what UTF-8 cannot hold (a lone surrogate) becomes a question mark."""
    return json.dumps(text, ensure_ascii=False)[1:-1].encode("utf-8", "replace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int

    def json(self) -> bytes:
        """The `usage` object."""
        counts = (self.prompt_tokens, self.completion_tokens, self.prompt_tokens + self.completion_tokens)
        return b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % counts


class AnswerWriter:
    """Writes one answer to a completion or a chat. `name` makes its id unique, `created_s` is Unix time.

    A stream is `opening`, `chunks` of any number, then `last` (the final text with the reason) or `closing` (the reason
    without a text), and `end`; an answer in one piece is `whole`. `reason` is OpenAI's `finish_reason`.
    """

    def __init__(self, *, chat: bool, name: str, model: str, created_s: int) -> None:
        self._chat = chat
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{name}"
        self._model = model
        self._created_s = created_s
        self._head = b"data: " + self._base("chat.completion.chunk" if chat else "text_completion")
        self._before = self._head + (b'{"index":0,"delta":{"content":"' if chat else b'{"index":0,"text":"')
        self._after = (b'"}' if chat else b'"') + b',"logprobs":null,"finish_reason":'
        self._between = self._after + b"null}]}\n\n" + self._before

    def _base(self, kind: str) -> bytes:
        """An answer's JSON up to its first choice."""
        return (
            f'{{"id":{json.dumps(self._id)},"object":"{kind}","created":{self._created_s},'
            f'"model":{json.dumps(self._model)},"choices":['
        ).encode()

    def opening(self) -> bytes:
        """The chunk that begins a chat with its role; nothing for a completion."""
        delta = b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
        return self._head + delta if self._chat else b""

    def chunks(self, texts: Sequence[bytes]) -> bytes:
        """One chunk per text, at least one."""
        return self._before + self._between.join(texts) + self._after + b"null}]}\n\n"

    def last(self, text: bytes, reason: str) -> bytes:
        """The chunk with the last text."""
        return self._before + text + self._after + b'"%s"}]}\n\n' % reason.encode()

    def closing(self, reason: str) -> bytes:
        """The last chunk where the last text has been sent already."""
        nothing = b'"delta":{}' if self._chat else b'"text":""'
        return self._head + b'{"index":0,%s,"logprobs":null,"finish_reason":"%s"}]}\n\n' % (nothing, reason.encode())

    def end(self, usage: Usage | None) -> bytes:
        """The end of the stream, after a chunk with the usage if there is one."""
        return DONE if usage is None else self._head + b'],"usage":' + usage.json() + b"}\n\n" + DONE

    def whole(self, text: bytes, reason: str, usage: Usage) -> bytes:
        """The answer in one piece."""
        content = b'"message":{"role":"assistant","content":"%s"}' if self._chat else b'"text":"%s"'
        return b'%s{"index":0,%s,"logprobs":null,"finish_reason":"%s"}],"usage":%s}' % (
            self._base("chat.completion" if self._chat else "text_completion"),
            content % text,
            reason.encode(),
            usage.json(),
        )


def model_list(names: Sequence[str], created_s: int, **more: object) -> bytes:
    """The answer of `/v1/models`; `more` are further fields of every model."""
    return json.dumps({"object": "list", "data": [model_entry(name, created_s, **more) for name in names]}).encode()


def model_entry(name: str, created_s: int, **more: object) -> dict[str, object]:
    """The entry of one model in it."""
    return {"id": name, "object": "model", "created": created_s, "owned_by": "throttllem", **more}
