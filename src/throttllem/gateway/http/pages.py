"""Health, metrics, the dashboard, and the list of models."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from starlette.routing import Match, Route

from throttllem.gateway.control.models import Models
from throttllem.gateway.control.rejections import MODEL_CHARACTERS
from throttllem.gateway.http import openapi
from throttllem.gateway.http.errors import not_allowed, not_found
from throttllem.gateway.http.exchange import Exchange
from throttllem.gateway.telemetry.status import GatewayStatus, gateway_status
from throttllem.openai_api.errors import ApiError, ByteHeaders

MetricsPage = Callable[[GatewayStatus], tuple[str, bytes]]
"""Content type and body of `/metrics`."""
MODELS = "/v1/models"
OPENAPI = "/openapi.json"
_JSON: ByteHeaders = ((b"content-type", b"application/json"),)


class Pages:
    """`/health`, `/metrics` and further routes, on whichever port they are wanted."""

    def __init__(
        self,
        models: Models,
        metrics_page: MetricsPage,
        extra_routes: Sequence[Route],
        aliases: Mapping[str, str],
    ) -> None:
        self._models = models
        self._metrics_page = metrics_page
        self._extra = tuple(extra_routes)
        self._aliases = aliases
        self._since_s = int(time.time())

    async def health(self, exchange: Exchange, *, draining: bool) -> None:
        """200 while requests are served, else 503. Shows nothing confidential, as it needs no key."""
        _only(exchange, "GET, HEAD")
        seen = self._models.health()
        draining = draining or seen.draining
        state = "draining" if draining else "ok" if seen.up and not seen.degraded else "degraded"
        body = {"status": state, "engines_up": seen.up, "engines": seen.engines, "version": seen.version}
        await exchange.answer(503 if draining or not seen.up else 200, _JSON, json.dumps(body).encode())

    async def openapi(self, exchange: Exchange) -> None:
        """`/openapi.json`."""
        _only(exchange, "GET, HEAD")
        await exchange.answer(200, _JSON, openapi.body(self._models.health().version))

    def find(self, exchange: Exchange, path: str) -> Awaitable[None] | None:
        """What serves `/metrics` or a further route; None if the path is none of them."""
        if path == "/metrics":
            _only(exchange, "GET, HEAD")
            return self._metrics(exchange)
        for route in self._extra:
            match, more = route.matches(exchange.scope)
            if match is Match.PARTIAL:
                raise not_allowed(exchange.method, path, ", ".join(sorted(route.methods or ())))
            if match is Match.FULL:
                return route.handle({**exchange.scope, **more}, exchange.receive, exchange.put)
        return None

    async def _metrics(self, exchange: Exchange) -> None:
        kind, body = self._metrics_page(gateway_status(self._models))
        await exchange.answer(200, ((b"content-type", kind.encode()),), body)

    async def models(self, exchange: Exchange, path: str) -> None:
        """`/v1/models` and `/v1/models/NAME`."""
        _only(exchange, "GET")
        await self._models.read_names()
        cards, ours = self._models.cards(), {"object": "model", "created": self._since_s, "owned_by": "throttllem"}
        entries = [{"id": name, **ours, **cards[name]} for name in self._models.names() if name not in self._aliases]
        for alias, name in self._aliases.items():
            if name in cards:
                entries.append({**ours, **cards[name], "id": alias, "root": name})
        if path == MODELS:
            body: object = {"object": "list", "data": entries}
        else:
            name = path.removeprefix(MODELS + "/")
            body = next((entry for entry in entries if entry["id"] == name), None)
            if body is None:
                raise ApiError(
                    404, f"the model {name[:MODEL_CHARACTERS]!r} does not exist", param="model", code="model_not_found"
                )
        await exchange.answer(200, _JSON, json.dumps(body).encode())

    def alone(self, exchange: Exchange, path: str, *, draining: bool) -> Awaitable[None]:
        """Everything that a port of its own serves."""
        if path == "/health":
            return self.health(exchange, draining=draining)
        page = self.find(exchange, path)
        if page is None:
            raise not_found(exchange.method, path)
        return page


def _only(exchange: Exchange, allow: str) -> None:
    if exchange.method not in allow.split(", "):
        raise not_allowed(exchange.method, exchange.scope["path"], allow)
