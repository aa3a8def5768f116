"""One answer of the simulated engine under way: its bytes, made from templates, and who waits for them.

Knows nothing of batching; the engine counts the tokens up.
"""

from __future__ import annotations

import asyncio

from throttllem.engines.base import EngineError
from throttllem.engines.simulated.openai_chunks import ParsedBody, dumped
from throttllem.engines.simulated.text import Tape


class Speech:
    """One answer as bytes: `output_tokens` tokens of the tape from `begin` on."""

    def __init__(
        self,
        wish: ParsedBody,
        tape: Tape,
        *,
        begin: int,
        prompt_tokens: int,
        output_tokens: int,
        limit_tokens: int,
        name: str,
        model: str,
        created_s: int,
    ) -> None:
        prompt, answer = prompt_tokens, output_tokens
        self.wish = wish
        self.prompt_tokens = prompt
        self.output_tokens = answer
        self.limit_tokens = limit_tokens
        self._tape = tape
        self._begin = begin
        self._finish = "length" if answer >= limit_tokens else "stop"
        self._usage = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
        self._base = {"id": name, "object": "", "created": created_s, "model": model}
        self._head, self._tail, self._last = self._templates()

    def events(self, first: int, last: int) -> bytes:
        """The server-sent events of tokens `first` up to `last` (without), and all that belongs before and after."""
        head, tail = self._head, self._tail
        pieces = self._tape.take(self._begin, first, last)
        if first > 0 and last < self.output_tokens:
            return head + (tail + head).join(pieces) + tail
        parts = [self._role()] if first == 0 and self.wish.chat else []
        parts += [head + piece + tail for piece in pieces[:-1]]
        parts.append(head + pieces[-1] + (tail if last < self.output_tokens else self._last))
        if last == self.output_tokens:
            if self.wish.include_usage:
                parts.append(_event({**self._chunk(), "choices": [], "usage": self._usage}))
            parts.append(b"data: [DONE]\n\n")
        return b"".join(parts)

    def whole(self) -> bytes:
        """The answer in one piece."""
        text = b"".join(self._tape.take(self._begin, 0, self.output_tokens)).decode()
        said: dict[str, object] = {"text": text}
        kind = "text_completion"
        if self.wish.chat:
            kind, said = "chat.completion", {"message": {"role": "assistant", "content": text}}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": self._finish}
        return dumped({**self._base, "object": kind, "choices": [choice], "usage": self._usage})

    def _chunk(self) -> dict[str, object]:
        return {**self._base, "object": "chat.completion.chunk" if self.wish.chat else "text_completion"}

    def _role(self) -> bytes:
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return _event({**self._chunk(), "choices": [choice]})

    def _templates(self) -> tuple[bytes, bytes, bytes]:
        """What stands before and after a token's text, and after the last one's."""
        place = "\0"
        said: dict[str, object] = {"delta": {"content": place}} if self.wish.chat else {"text": place}
        found = []
        for reason in (None, self._finish):
            choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
            found.append(_event({**self._chunk(), "choices": [choice]}).split(b"\\u0000"))
        # A model's name may hold the place mark too; the token's place is the last one.
        head = b"\\u0000".join(found[0][:-1])
        return head, found[0][-1], found[1][-1]


def _event(value: object) -> bytes:
    return b"data: " + dumped(value) + b"\n\n"


class Row:
    """One answer under way: `tokens` are out; whoever waits is woken at `wanted`, or by `broken`."""

    __slots__ = ("broken", "tokens", "waiter", "wanted")

    def __init__(self) -> None:
        self.tokens = 0
        self.wanted = 0
        self.waiter: asyncio.Future[None] | None = None
        self.broken: str | None = None

    async def reach(self, tokens: int) -> None:
        """Wait until so many tokens are out. Raises EngineError if they never will be."""
        while self.tokens < tokens:
            if self.broken is not None:
                raise EngineError(self.broken)
            self.wanted = tokens
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter

    def wake(self) -> None:
        """Let whoever waits look again."""
        waiter, self.waiter = self.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class Stream:
    """The events of one answer, as many at once as are out since the last look: a slow reader costs no memory."""

    __slots__ = ("_row", "_sent", "_speech")

    def __init__(self, row: Row, speech: Speech) -> None:
        self._row = row
        self._speech = speech
        self._sent = 0

    async def read(self) -> bytes:
        """The events that are out since the last call, waiting for one; nothing at the end."""
        row, first = self._row, self._sent
        if first == self._speech.output_tokens:
            return b""
        if row.tokens == first:
            await row.reach(first + 1)
        self._sent = row.tokens
        return self._speech.events(first, row.tokens)
