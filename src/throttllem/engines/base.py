"""The interface between the gateway and a live engine: calls, replies, reports, and what an engine is.

Implementations: `simulated.realtime`, `openai`, `triton.engine`. Knows nothing of SLOs, clocks or the control core.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Protocol

from throttllem.core.types import EngineSpec
from throttllem.openai_api.errors import SERVER_ERROR, ApiError
from throttllem.printable import printable

if TYPE_CHECKING:
    from throttllem.openai_api.requests import ParsedRequest

Card = Mapping[str, object]
"""What an engine says of one model in `/v1/models`, as it is; empty: nothing."""
Headers = tuple[tuple[str, str], ...]
"""Names in lower case, in order; a name may be repeated."""

_OWN_LIMIT_RETRY_S = 1
_MESSAGES = {
    502: "the engine failed",
    503: "the engine is not ready",
    504: "the engine did not answer in time",
}


class EngineError(ApiError):
    """A failure of an engine. `detail` is for the log and may name addresses; the client sees `message` and `status`,
    which is 502, 503 or 504.
    """

    def __init__(self, detail: str, *, status: int = 502, message: str | None = None) -> None:
        message = message or _MESSAGES.get(status, _MESSAGES[502])
        kind = "engine_error"
        super().__init__(status, printable(message), kind=kind, code=kind, detail=printable(detail))

    @property
    def unreachable(self) -> bool:
        """Whether the connection was refused or reset: a second try at once would end the same way."""
        error: BaseException | None = self
        while error is not None and not isinstance(error, ConnectionError):
            error = error.__cause__
        return error is not None


class OwnLimitError(EngineError):
    """503: this machine has no descriptor, memory or port left for a connection. No evidence against the engine."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail, status=503, message="the gateway has no room for another connection to an engine")
        self.kind, self.code = SERVER_ERROR, "own_limit"
        self.retry_after_s = _OWN_LIMIT_RETRY_S
        self.headers = ((b"retry-after", str(_OWN_LIMIT_RETRY_S).encode()),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One HTTP request for an engine. The optional fields are those of a request under control."""

    method: str
    path: str
    headers: Headers
    body: bytes = field(repr=False)
    request_id: int | None = None
    request: ParsedRequest | None = None
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


def error_reply(error: ApiError) -> Reply:
    """The reply of an engine that answers with an error itself."""
    return whole_reply(error.status, (("content-type", "application/json"),), error.body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """What an engine reports when it is reached. `models` are the names that it serves, `cards` what it says of them;
    `default_max_tokens` is its
    limit where a completion names none (None: what the context leaves). `roots` are the checkpoints that it loaded
    (OWNER/NAME, or a folder), as far as it names them; `kv_cache_dtype` is "fp8" where it says so. `exact`: `watch`
    will report every step; `named`: its reports name the requests that started and finished in it. `notes` are for
    people: what is assumed, what is missing and what that costs. `look` reports the counters of an engine that
    speculates at once, between two looks of `watch` (None: its reports do not depend on when they are read).
    """

    spec: EngineSpec
    models: tuple[str, ...]
    cards: Mapping[str, Card] = field(default_factory=dict)
    default_max_tokens: int | None = None
    exact: bool = False
    named: bool = False
    roots: tuple[str, ...] = ()
    kv_cache_dtype: str = "auto"
    version: str = ""
    notes: tuple[str, ...] = ()
    look: Callable[[], Awaitable[None]] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCount:
    """Tokens of each prompt, their mean if there are several. `by` names the counter; `exact` False: an estimate.

    `blocks` are the prompt's full KV blocks (engines/prefix_cache.py), none if the engine does not cache them. `parts`
    of it are no text (pictures, sound), and their tokens not counted.
    """

    tokens: int
    by: str
    exact: bool
    blocks: tuple[int, ...] = ()
    parts: int = 0


NO_COUNT = PromptCount(tokens=0, by="nothing", exact=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The state that an engine reports, at the end of a step or in between.

    `running` and `waiting` requests, and the `kv_blocks` in use (None: not reported). A report of a step (`step` is its
    number, from 0, since the engine started; None: of no step in particular) may name its `seconds`, its prompt and
    generated tokens, the prompt tokens looked up in the prefix cache (`prefix_queries`) and those found there
    (`prefix_hits`), the tokens that speculation drafted and those accepted, and the requests that started, finished and
    were preempted in it (None: not reported). `prefills` are (request id, prompt tokens). `prefix_hit_tokens`: prompt
    tokens that its prefix cache has had so far. `joules` only where the engine is simulated.
    """

    running: int
    waiting: int
    kv_blocks: int | None = None
    step: int | None = None
    seconds: float | None = None
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    prefix_queries: int | None = None
    prefix_hits: int | None = None
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None
    started: tuple[int, ...] | None = None
    finished: tuple[int, ...] | None = None
    preempted: tuple[int, ...] = ()
    prefills: tuple[tuple[int, int], ...] = ()
    prefill_pairs: float = 0.0
    decode_sequences: int | None = None
    kv_tokens: int | None = None
    prefix_hit_tokens: float | None = None
    joules: float | None = None


class LiveEngine(Protocol):
    """One engine. All methods belong to one event loop; constructors only assign."""

    async def connect(self) -> Connected:
        """Reach it and read what it is. Raises EngineError while it is not ready."""

    async def well(self) -> None:
        """A health check that changes nothing. Raises EngineError if it fails."""

    async def cards(self) -> Mapping[str, Card]:
        """The models that it serves now by name, adapters included. Raises EngineError if it does not say."""

    async def count(self, request: ParsedRequest) -> PromptCount:
        """Tokens of a prompt, by the engine's own tokenizer where there is one."""

    def open(self, call: Call) -> AbstractAsyncContextManager[Reply]:
        """Send a request; leaving the block ends it, in the engine too. Raises EngineError if it cannot be reached."""

    async def watch(self, report: Callable[[Report], None]) -> None:
        """Call `report` with the engine's state until cancelled. Raises EngineError when the engine is gone."""


Kind = Literal["openai", "triton"]
_VALUES = MappingProxyType(
    {"stats": "SOCKET", "stats_secret": "FILE", "tokenizer": "FILE", "metrics_url": "URL", "model": "NAME"}
)


def in_configuration(*keys: str, number: int = 0) -> str:
    """How options of the engine of this number are set: on the command line, and in a TOML file."""
    flags = " ".join(f"--set engines.{number}.{key}={_VALUES.get(key, 'N')}" for key in keys)
    return f"{flags} (in TOML: {' and '.join(keys)} of [[engines]])"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteOptions:
    """Where an engine runs and how it is reached. The numbers stand in for what it does not report itself.

    `served_as`: the model's name there (Triton). `stats`: where vLLM's plug-in sends its steps, over UDP with the
    secret in `stats_secret`. `tokenizer`: the model's tokenizer.json. `scrape_s`: seconds between two looks at the
    engine's metrics. `flags`: how the command that was called sets the options of these keys, for errors and notes.
    """

    url: str
    kind: Kind
    served_as: str | None = None
    stats: str | None = None
    stats_secret: Path | None = field(default=None, repr=False)
    tokenizer: Path | None = None
    metrics_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    max_batch: int | None = None
    max_context_tokens: int | None = None
    kv_blocks: int | None = None
    block_tokens: int | None = None
    scrape_s: float = 0.5
    flags: Callable[..., str] = in_configuration
