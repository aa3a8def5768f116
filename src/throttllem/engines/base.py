"""A live engine as the gateway sees it: what it is, what it holds, bytes in and bytes out, and what it says of itself.

Knows nothing of promises, clocks or the control core. Implementations: `realtime` (simulated), `openai`, `triton`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from throttllem.core.types import EngineSpec

Headers = tuple[tuple[str, str], ...]
"""Names in lower case, in order, repeated ones kept."""


_TOLD = {
    502: "the engine failed",
    503: "the engine is not ready",
    504: "the engine did not answer in time",
}


class EngineError(Exception):
    """An engine that did not do what was asked. `status` is what a client should see: 502, 503 or 504; `told` are the
    words for it, without the addresses that the message may name.
    """

    def __init__(self, message: str, *, status: int = 502, told: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.told = told or _TOLD.get(status, _TOLD[502])

    @property
    def nobody_there(self) -> bool:
        """Whether the connection was refused or reset: whoever looks again at once finds the same."""
        error: BaseException | None = self
        while error is not None and not isinstance(error, ConnectionError):
            error = error.__cause__
        return error is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """What the gateway read in the body of a controlled request; the body itself goes on as it came.

    `prompts` are texts or token ids, one or more; `messages` is a chat (`prompts` empty then), with `body` at hand for
    what a chat template needs besides. `max_tokens` None: the client named no limit. `choices`: answers per prompt.
    """

    path: str
    model: str
    body: dict[str, object] = field(repr=False)
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: bool = False
    max_tokens: int | None = None
    choices: int = 1
    stream: bool = False

    @property
    def sequences(self) -> int:
        """Answers that the engine generates side by side."""
        return max(1, len(self.prompts)) * self.choices


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One HTTP request for an engine. `request_id` and `ask` are those of a controlled one, None otherwise."""

    method: str
    path: str
    headers: Headers
    body: bytes = field(repr=False)
    request_id: int | None = None
    ask: ParsedRequest | None = None
    prompt_tokens: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An engine's reply. `read` returns the bytes that came since the last call and waits for the first of them; it
    returns b"" at the end of the body and raises EngineError if the body breaks off.
    """

    status: int
    headers: Headers
    read: Callable[[], Awaitable[bytes]] = field(repr=False)

    async def body(self) -> bytes:
        """The whole body."""
        parts = []
        while part := await self.read():
            parts.append(part)
        return b"".join(parts)


def whole_reply(status: int, headers: Headers, body: bytes) -> Reply:
    """A reply whose body is known already."""
    parts = [body]

    async def read() -> bytes:
        return parts.pop() if parts else b""

    return Reply(status=status, headers=headers, read=read)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """What an engine says of itself when it is reached. `models` are the names that it serves; `default_max_tokens` is
    what it takes where a completion names no limit (None: as much as its context holds). `exact` says that `watch` will
    report every step, `named` that its reports name who started and finished in it. `notes` are for people: what was
    assumed, what is missing and what that costs.
    """

    spec: EngineSpec
    models: tuple[str, ...]
    default_max_tokens: int | None = None
    exact: bool = False
    named: bool = False
    version: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCount:
    """Tokens of each prompt, mean if they are several. `by` says who counted; `exact` False: an estimate."""

    tokens: int
    by: str
    exact: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What an engine says of itself, at the end of a step or when it was asked.

    `running`, `waiting` requests and `kv_blocks` in use (None: it does not say). A report of a step (`step` is its
    number, from 0, since the engine started; None: of no step in particular) may name its `seconds`, its prompt and
    generated tokens, and who started, finished and was preempted in it (None: it does not say who). `prefills` are
    (request id, prompt tokens). `joules` only where the engine is simulated.
    """

    running: int
    waiting: int
    kv_blocks: int | None = None
    step: int | None = None
    seconds: float | None = None
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    started: tuple[int, ...] | None = None
    finished: tuple[int, ...] | None = None
    preempted: tuple[int, ...] = ()
    prefills: tuple[tuple[int, int], ...] = ()
    prefill_pairs: float = 0.0
    decode_sequences: int | None = None
    kv_tokens: int | None = None
    joules: float | None = None


class LiveEngine(Protocol):
    """One engine. All methods belong to one event loop; constructors only assign."""

    async def connect(self) -> Connected:
        """Reach it and ask what it is. Raises EngineError while it is not well."""

    async def well(self) -> None:
        """One light look that changes nothing. Raises EngineError if it is not well."""

    async def count(self, ask: ParsedRequest) -> PromptCount:
        """Tokens of a prompt, by the engine's own tokenizer where there is one."""

    def open(self, call: Call) -> AbstractAsyncContextManager[Reply]:
        """Send a request; leaving the block ends it, in the engine too. Raises EngineError if it cannot be reached."""

    async def watch(self, tell: Callable[[Report], None]) -> None:
        """Tell what the engine says of itself until cancelled. Raises EngineError when it is gone."""
