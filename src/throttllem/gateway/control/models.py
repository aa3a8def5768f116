"""All models behind one gateway: which control loop serves a name, and how many tokens a prompt has.

What the HTTP side sees of the control side. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from throttllem.core.types import EnginePrefix, Request, ShuttingDown, Slo
from throttllem.engines.base import Card, Connected, EngineError, OwnLimitError, PromptCount
from throttllem.gateway.control import rejections
from throttllem.gateway.control.backend import Backend
from throttllem.gateway.control.loop import ControlLoop
from throttllem.gateway.control.session import Session
from throttllem.openai_api.errors import ApiError
from throttllem.openai_api.large_bodies import LARGE_BYTES
from throttllem.openai_api.requests import ParsedRequest

_LOOK_AGAIN_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Engines that are up, all there are, and whether one that should be up is not well."""

    up: int
    engines: int
    degraded: bool
    draining: bool
    version: str


@dataclass(slots=True)
class ServedModel:
    """One control loop and the names that clients may use; `names` empty: those that its engines report."""

    loop: ControlLoop
    names: tuple[str, ...] = ()

    def all_names(self) -> tuple[str, ...]:
        """Its names, as far as they are known."""
        if self.names:
            return self.names
        found: dict[str, None] = {}
        for backend in self.loop.backends:
            if backend.connected:
                found.update(dict.fromkeys(backend.connected.models))
        return tuple(found)

    def card(self, name: str) -> Card:
        """What its engines say of one of its names, the one that serves first."""
        for backend in (self.loop.serving(), *self.loop.backends):
            if backend is not None and backend.connected and (card := backend.connected.cards.get(name)):
                return card
        return {}


@dataclass(slots=True)
class Models:
    """Every model of the configuration. `now` is the control loops' time line, `started_s` when the gateway began."""

    served: tuple[ServedModel, ...]
    version: str
    policy: str
    slo: Slo
    now: Callable[[], float]
    started_s: float = 0.0
    draining: bool = False
    uncontrolled: int = 0

    async def start(self) -> None:
        """Start to connect to the engines; does not wait for them."""
        for model in self.served:
            await model.loop.start()

    async def stop(self) -> None:
        """End what still runs and disconnect from the engines."""
        for model in self.served:
            await model.loop.stop()

    def drain(self) -> None:
        """The gateway shuts down: no request is taken any more, and none is held."""
        self.draining = True
        for model in self.served:
            model.loop.handle(ShuttingDown())

    def names(self) -> tuple[str, ...]:
        """Names that clients may use."""
        return tuple(dict.fromkeys(name for model in self.served for name in model.all_names()))

    def cards(self) -> dict[str, Card]:
        """What engines say of each of these names."""
        return {name: model.card(name) for model in reversed(self.served) for name in model.all_names()}

    async def read_names(self) -> None:
        """Ask the engines which models they serve now; one that was asked just before is not asked again."""
        backends = [backend for model in self.served if not model.names for backend in model.loop.backends]
        await asyncio.gather(*(backend.read_names() for backend in backends))

    def max_sequences(self) -> int | None:
        """Sequences side by side that the largest engine can run; None: not all engines have reported it."""
        most = 0
        for model in self.served:
            for backend in model.loop.backends:
                if backend.connected is None or "max_batch" in backend.connected.spec.unknown:
                    return None
                most = max(most, backend.connected.spec.max_batch)
        return most

    async def count(self, parsed: ParsedRequest) -> PromptCount:
        """Tokens of a prompt. Raises ApiError (404 unknown model, 429 too many are counted, 502 to 504 engine)."""
        if self.draining:
            raise rejections.draining()
        loop = await self._loop_now(parsed.model)
        if loop.counting >= loop.controller.options.admission.queue_limit:
            raise rejections.queue_full(loop.retry_after_s())
        loop.counting += 1
        backend = loop.serving()
        try:
            if backend is None or backend.connected is None or backend.state != "up":
                backend = await self._connected(parsed.model)
            backend.calls += 1
            try:
                async with backend.counting_large if len(parsed.body) > LARGE_BYTES else backend.counting:
                    found = await backend.engine.count(parsed)
            finally:
                backend.calls -= 1
        except OwnLimitError:
            raise
        except EngineError as error:
            if backend is not None:
                backend.suspect()
            raise rejections.engine_failed(error) from error
        finally:
            loop.counting -= 1
        if not found.exact:
            backend.estimated(found.by)
        return found

    def session(
        self, parsed: ParsedRequest, count: PromptCount, slo: Slo, slo_class: str = "", *, repeatable: bool = False
    ) -> Session:
        """The session of a controlled request, not yet handed to the core; `repeatable`: it may be sent to an engine
        twice, and the caller waits for a place again when it `goes_again`. Raises ApiError (404, 503)."""
        loop = self._loop(parsed.model)
        serving = loop.serving()
        connected = serving.connected if serving is not None else None
        if connected is None:
            connected = next((backend.connected for backend in loop.backends if backend.connected), None)
        if connected is None:
            raise rejections.no_engine(None)
        counted = count
        if count.parts and serving is not None:
            count = replace(count, tokens=count.tokens + round(count.parts * serving.part_tokens))
        max_tokens = parsed.max_tokens or _default_max_tokens(parsed, count, connected)
        prompt_tokens = count.tokens
        if not count.exact:  # whether it fits is the engine's to say
            spec = connected.spec
            room = min(spec.max_context_tokens, spec.kv_blocks // parsed.sequences * spec.block_tokens)
            prompt_tokens = min(prompt_tokens, room - max_tokens)
        prompt_tokens, prompts = max(1, prompt_tokens), max(1, len(parsed.prompts))
        copies = parsed.sequences > prompts
        found = tuple(one for each in loop.all_serving() if (one := _prefix(each, count, prompt_tokens, copies)))
        sole = found[0] if found and loop.controller.serves_alone() else EnginePrefix(engine=0)
        request = Request(
            id=loop.fresh_id(),
            arrival_s=loop.now(),
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            slo=slo,
            slo_class=slo_class,
            sequences=parsed.sequences,
            prompts=prompts,
            cached_prompt_tokens=sole.cached_prompt_tokens,
            common_prompt_tokens=sole.common_prompt_tokens,
            prefix_of=sole.prefix_of,
            prefix_tokens=sole.prefix_tokens,
            prefixes=() if loop.controller.serves_alone() else found,
            caller=parsed.caller,
            model=parsed.model or connected.models[0],
        )
        return Session(
            loop=loop,
            request=request,
            streams=parsed.stream,
            chat=parsed.is_conversation,
            count=counted,
            repeatable=repeatable,
        )

    async def uncontrolled_backend(self, model: str | None) -> Backend:
        """The backend of a request without control (None: the first model). Raises ApiError (404, 503)."""
        loop = self.served[0].loop if model is None else await self._loop_now(model)
        backend = loop.serving()
        if backend is None:
            raise rejections.no_engine(next((other.trouble for other in loop.backends if other.trouble), None))
        self.uncontrolled += 1
        return backend

    def health(self) -> Health:
        """The state of all engines, at next to no cost."""
        states = [
            backend.health(model.loop.limits.silence_s) for model in self.served for backend in model.loop.backends
        ]
        # An engine may be down because it is not needed; one that should be up has a trouble.
        troubled = any(state == "stalled" or (state != "up" and trouble is not None) for state, trouble in states)
        return Health(
            up=sum(state == "up" for state, _ in states),
            engines=len(states),
            degraded=troubled or any(model.loop.doubtful for model in self.served),
            draining=self.draining,
            version=self.version,
        )

    async def _loop_now(self, name: str) -> ControlLoop:
        """As `_loop`; the engines are asked before a name counts as unknown, as adapters are loaded at any time."""
        try:
            return self._loop(name)
        except ApiError as error:
            if error.status != 404:
                raise
        await self.read_names()
        return self._loop(name)

    def _loop(self, name: str) -> ControlLoop:
        """The loop that serves this name, else that of the one model whose engine has not reported a name yet. A client
        that names no model ("") gets the only one.
        """
        if not name and len(self.served) == 1:
            return self.served[0].loop
        unnamed = []
        for model in self.served:
            names = model.all_names()
            if name in names:
                return model.loop
            if not names:
                unnamed.append(model)
        if len(unnamed) == 1:
            return unnamed[0].loop
        if not name:
            raise rejections.no_model_named(self.names())
        raise rejections.unknown_model(name, self.names())

    async def _connected(self, name: str) -> Backend:
        """A backend that can count this model's tokens, waiting for one for `limits.engine_wait_s`."""
        loop = self._loop(name)
        until_s = self.now() + loop.limits.engine_wait_s
        while True:
            serving = loop.serving()
            for backend in (serving, *loop.backends):
                if backend is not None and backend.connected and backend.state == "up":
                    self._loop(name)  # its engine may have reported by now that it serves another name
                    return backend
            if self.now() >= until_s:
                raise rejections.no_engine(next((other.trouble for other in loop.backends if other.trouble), None))
            await asyncio.sleep(_LOOK_AGAIN_S)


def _prefix(backend: Backend, count: PromptCount, prompt_tokens: int, copies: bool) -> EnginePrefix | None:
    """What an engine has of a prompt, and what several sequences of it (`copies`) share; None: nothing."""
    prefixes, key = backend.prefixes, backend.key
    if prefixes is None or key is None:
        return None
    prefix = prefixes.find(count.blocks, prompt_tokens)
    common_tokens = prefixes.shared_tokens(prompt_tokens) if copies else 0
    if not prefix.cached_tokens and not common_tokens and prefix.of is None:
        return None
    return EnginePrefix(
        engine=key,
        cached_prompt_tokens=prefix.cached_tokens,
        common_prompt_tokens=common_tokens,
        prefix_of=prefix.of,
        prefix_tokens=prefix.tokens,
    )


def _default_max_tokens(parsed: ParsedRequest, count: PromptCount, connected: Connected) -> int:
    """The longest output where the client set no limit: the engine's default, or what the context leaves."""
    left = max(1, connected.spec.max_context_tokens - count.tokens)
    default = None if parsed.is_conversation else connected.default_max_tokens
    return left if default is None else min(default, left)
