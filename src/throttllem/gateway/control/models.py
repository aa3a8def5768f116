"""All models behind one gateway: which driver serves a name, and how long a request waits until one can say.

Implements `ticket.Models`, what the HTTP side sees. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from throttllem.core.types import Request, Slo
from throttllem.engines.base import Connected, EngineError, LiveEngine, PromptCount
from throttllem.gateway.control import rejections as refusals
from throttllem.gateway.control.backend import Backend
from throttllem.gateway.control.loop import ControlLoop
from throttllem.gateway.control.session import Session
from throttllem.gateway.control.ticket import Health
from throttllem.gateway.telemetry.status import GatewayStatus
from throttllem.gateway.telemetry.view import engine_state, model_status
from throttllem.openai_api.requests import ParsedRequest

_LOOK_AGAIN_S = 0.05


@dataclass(slots=True)
class Served:
    """One driver and the names that clients may use; `names` empty: what its engines say."""

    driver: ControlLoop
    names: tuple[str, ...] = ()

    def all_names(self) -> tuple[str, ...]:
        """What it is called, as far as known."""
        said = [name for link in self.driver.links if link.connected for name in link.connected.models]
        return self.names or tuple(dict.fromkeys(said))


@dataclass(slots=True)
class AllModels:
    """Every model of the configuration."""

    served: tuple[Served, ...]
    version: str
    policy: str
    slo: Slo
    now: Callable[[], float]
    draining: bool = False
    uncontrolled: int = 0

    async def start(self) -> None:
        """Bring the engines up; does not wait for them."""
        for model in self.served:
            await model.driver.start()

    async def stop(self) -> None:
        """End what still runs and let go of the engines."""
        for model in self.served:
            await model.driver.stop()

    def names(self) -> tuple[str, ...]:
        """Names that clients may use."""
        return tuple(dict.fromkeys(name for model in self.served for name in model.all_names()))

    def most_sequences(self) -> int | None:
        """Answers side by side that the largest engine can run; None: not all have said yet."""
        connected = [link.connected for model in self.served for link in model.driver.links]
        most = [one.spec.max_batch for one in connected if one is not None]
        return max(most) if len(most) == len(connected) else None

    async def count(self, ask: ParsedRequest) -> PromptCount:
        """Tokens of a prompt. Raises ApiError (404 unknown model, 429 too many are counted, 502 to 504 engine)."""
        if self.draining:
            raise refusals.draining()
        driver = self._driver(ask.model)
        if driver.counting >= driver.controller.options.admission.queue_limit:
            raise refusals.queue_full(driver.retry_after_s())
        driver.counting += 1
        try:
            return await self._counted(ask)
        finally:
            driver.counting -= 1

    async def _counted(self, ask: ParsedRequest) -> PromptCount:
        link, _ = await self._reached(ask.model)
        try:
            async with link.counting:
                found = await link.engine.count(ask)
            if not found.exact:
                link.estimated(found.by)
            return found
        except EngineError as error:
            link.suspect()
            raise refusals.engine_failed(error) from error

    def ticket(self, ask: ParsedRequest, count: PromptCount, slo: Slo, caller: str, *, streams: bool) -> Session:
        """A ticket for a controlled request; `streams`: its tokens will be told as they come."""
        driver = self._driver(ask.model)
        connected = next((link.connected for link in _by_nearness(driver) if link.connected), None)
        if connected is None:
            raise refusals.no_engine(None)
        request = Request(
            id=driver.fresh_id(),
            arrival_s=driver.now(),
            prompt_tokens=max(1, count.tokens),
            max_tokens=_limit(ask, count, connected),
            slo=slo,
            sequences=ask.sequences,
            caller=caller,
            model=ask.model,
        )
        return Session(driver=driver, request=request, streams=streams, chat=ask.chat)

    def passage(self, model: str | None) -> LiveEngine:
        """The engine of a request without control (None: the first model). Raises ApiError (404, 503)."""
        driver = self.served[0].driver if model is None else self._driver(model)
        link = driver.link()
        if link is None:
            raise refusals.no_engine(next((other.trouble for other in driver.links if other.trouble), None))
        self.uncontrolled += 1
        return link.engine

    def health(self) -> Health:
        """How it is, told at next to no cost."""
        states = [engine_state(model.driver, link) for model in self.served for link in model.driver.links]
        return Health(
            up=sum(state == "up" for state, _ in states),
            engines=len(states),
            # An engine may be down because it is not needed; one that should be up has a trouble.
            ails=any(state == "stalled" or (state != "up" and trouble is not None) for state, trouble in states)
            or any(model.driver.recovery.doubtful for model in self.served),
            draining=self.draining,
            version=self.version,
        )

    def status(self) -> GatewayStatus:
        """Everything that may be shown."""
        return GatewayStatus(
            version=self.version,
            policy=self.policy,
            phase="draining" if self.draining else "serving",
            now_s=self.now(),
            slo=self.slo,
            models=tuple(model_status(model.driver, model.all_names()) for model in self.served),
            uncontrolled=self.uncontrolled,
        )

    def _driver(self, name: str) -> ControlLoop:
        """Who serves this name: who says so, else the one model whose engine has not said yet."""
        for model in self.served:
            if name in model.all_names():
                return model.driver
        unnamed = [model for model in self.served if not model.all_names()]
        if len(unnamed) == 1:
            return unnamed[0].driver
        raise refusals.unknown_model(name, self.names())

    async def _reached(self, name: str) -> tuple[Backend, Connected]:
        """An engine that can count this model's tokens, waiting for one for `limits.engine_wait_s`."""
        driver = self._driver(name)
        until_s = self.now() + driver.limits.engine_wait_s
        while True:
            for link in _by_nearness(driver):
                if link.connected and link.state == "up":
                    self._driver(name)  # its engine may have said by now that it serves another name
                    return link, link.connected
            if self.now() >= until_s:
                raise refusals.no_engine(next((link.trouble for link in driver.links if link.trouble), None))
            await asyncio.sleep(_LOOK_AGAIN_S)


def _by_nearness(driver: ControlLoop) -> list[Backend]:
    """The serving engine first."""
    serving = driver.link()
    return sorted(driver.links, key=lambda link: link is not serving)


def _limit(ask: ParsedRequest, count: PromptCount, connected: Connected) -> int:
    """The longest answer that the engine may give: what was asked, its default, or what the context leaves."""
    left = max(1, connected.spec.max_context_tokens - count.tokens)
    if ask.max_tokens is not None:
        return ask.max_tokens
    default = None if ask.chat else connected.default_max_tokens
    return left if default is None else min(default, left)
