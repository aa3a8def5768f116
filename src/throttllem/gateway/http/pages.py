"""What the gateway says of itself: health, metrics, the dashboard, and which models there are."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

from starlette.routing import Match, Route

from throttllem.gateway.control.rejections import MODEL_CHARACTERS
from throttllem.gateway.control.ticket import Models
from throttllem.gateway.http.errors import not_allowed, not_found
from throttllem.gateway.http.exchange import Exchange
from throttllem.gateway.telemetry.status import GatewayStatus
from throttllem.openai_api.errors import ApiError, ByteHeaders
from throttllem.openai_api.responses import model_entry, model_list

MetricsPage = Callable[[GatewayStatus], tuple[str, bytes]]
"""Content type and body of `/metrics`."""
MODELS = "/v1/models"
_JSON: ByteHeaders = ((b"content-type", b"application/json"),)


class Pages:
    """`/health`, `/metrics` and further routes, on whichever port they are wanted."""

    def __init__(self, models: Models, metrics_page: MetricsPage, extra_routes: Sequence[Route]) -> None:
        self._models = models
        self._metrics_page = metrics_page
        self._extra = tuple(extra_routes)
        self._since_s = int(time.time())

    async def health(self, exchange: Exchange, *, draining: bool) -> None:
        """200 while requests are welcome, else 503; tells no more than anybody may know."""
        _only(exchange, "GET, HEAD")
        seen = self._models.health()
        draining = draining or seen.draining
        word = "draining" if draining else "ok" if seen.up and not seen.ails else "degraded"
        body = {"status": word, "engines_up": seen.up, "engines": seen.engines, "version": seen.version}
        await exchange.answer(503 if draining or not seen.up else 200, _JSON, json.dumps(body).encode())

    async def show(self, exchange: Exchange, path: str) -> bool:
        """Serve `/metrics` or a further route; False if the path is none of them."""
        if path == "/metrics":
            _only(exchange, "GET, HEAD")
            kind, body = self._metrics_page(self._models.status())
            await exchange.answer(200, ((b"content-type", kind.encode()),), body)
            return True
        for route in self._extra:
            match, more = route.matches(exchange.scope)
            if match is Match.PARTIAL:
                raise not_allowed(exchange.method, path, ", ".join(sorted(route.methods or ())))
            if match is Match.FULL:
                await route.handle({**exchange.scope, **more}, exchange.receive, exchange.put)
                return True
        return False

    async def models(self, exchange: Exchange, path: str) -> None:
        """`/v1/models` and `/v1/models/NAME`."""
        _only(exchange, "GET")
        names, name = self._models.names(), path.removeprefix(MODELS + "/")
        if path == MODELS:
            body = model_list(names, self._since_s)
        elif name in names:
            body = json.dumps(model_entry(name, self._since_s)).encode()
        else:
            shown = name[:MODEL_CHARACTERS]
            raise ApiError(404, f"the model {shown!r} does not exist", param="model", code="model_not_found")
        await exchange.answer(200, _JSON, body)

    async def alone(self, exchange: Exchange, path: str, *, draining: bool) -> None:
        """Everything that a port of their own serves."""
        if path == "/health":
            await self.health(exchange, draining=draining)
        elif not await self.show(exchange, path):
            raise not_found(exchange.method, path)


def _only(exchange: Exchange, allow: str) -> None:
    if exchange.method not in allow.split(", "):
        raise not_allowed(exchange.method, exchange.scope["path"], allow)
