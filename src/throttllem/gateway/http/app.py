"""The gateway's ASGI application: what serves each path, which key it needs, and how every error is answered.

Plain ASGI: a streamed chunk costs one `send`. Knows no sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import unquote

from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from throttllem.config import Options
from throttllem.engines.base import Call, EngineError, Headers
from throttllem.gateway.bounds.connections import too_many_connections
from throttllem.gateway.bounds.held_bytes import HeldBytes
from throttllem.gateway.control.models import Models
from throttllem.gateway.http import relay
from throttllem.gateway.http.auth import KEY_HEADERS, Access
from throttllem.gateway.http.errors import (
    check_framing,
    check_repeated,
    headers_too_large,
    moved,
    not_allowed,
    not_found,
    unavailable,
)
from throttllem.gateway.http.exchange import Cause, Exchange, GoneError
from throttllem.gateway.http.origins import Guard, with_cors
from throttllem.gateway.http.pages import MODELS, OPENAPI, MetricsPage, Pages
from throttllem.gateway.http.protocol import CROWDED
from throttllem.gateway.http.slo_headers import CLASS_HEADER, METRICS_HEADER, read_slo
from throttllem.gateway.http.uncontrolled import Use, methods, use_of
from throttllem.openai_api.errors import ApiError, as_api_error, invalid
from throttllem.openai_api.large_bodies import LARGE_BYTES, OFF_LOOP_BYTES, with_model
from throttllem.openai_api.requests import PATHS, check_sequences, is_controlled, model_of, parse_request

_log = logging.getLogger("throttllem.gateway")
_NATIVE_MODEL = re.compile(r"/v2/models/([^/]+)(?:/.*)?")
_REDIRECTED = ("/v1/", "/v2/", "/health", "/metrics", "/dashboard", OPENAPI)
_ODD = re.compile("[\\\\?#\ufffd]")


class Gateway:
    """One ASGI application; `private` is another, for the metrics port. `watch` must run beside them."""

    def __init__(self, models: Models, options: Options, pages: Pages, on_response: Callable[[int], None]) -> None:
        self.draining = False
        self._models = models
        self._options = options
        self._limits = options.limits
        origins, guarded = options.server.allowed_origins, bool(options.server.api_keys)
        self._guard = None if guarded else Guard(options.server)
        self._with_cors = None if origins is None else with_cors(self._public, origins)
        self._access = Access(options.server.api_keys or ())
        self._aliases = options.aliases
        self._admin = Access(options.server.admin_keys or (), "server.admin_keys")
        self._pages = pages
        self._on_response = on_response
        self._open: set[Exchange] = set()
        self._budget = HeldBytes(options.limits.held_bytes)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve one request on the port of the API."""
        if self._with_cors is not None:
            return self._with_cors(scope, receive, send)
        return self._serve(scope, receive, send, self._route)

    def _public(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        return self._serve(scope, receive, send, self._route)

    def private(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve one request on the metrics port, where no key is needed."""
        return self._serve(scope, receive, send, self._route_private)

    # ---- from outside ----------------------------------------------------------------------------------------

    def drain(self) -> None:
        """No new requests from here on."""
        self.draining = True

    async def idle(self) -> None:
        """Wait until nothing is being served."""
        while self._open:
            await asyncio.sleep(0.01)

    def cut(self) -> None:
        """End everything that is being served with an error."""
        for exchange in tuple(self._open):
            exchange.cut(Cause.DRAINED)

    async def watch(self) -> None:
        """Cut off clients that take, or give, nothing for `limits.slow_reader_s`, or whose body is slower than
        `limits.body_bytes_per_s`; runs until it is cancelled.
        """
        seen: dict[Exchange, tuple[int, float]] = {}
        bodies: dict[Exchange, tuple[int, float]] = {}
        window_s = self._limits.slow_reader_s
        least_bytes = self._limits.body_bytes_per_s * window_s
        while True:
            now_s = time.monotonic()
            stuck = {exchange: exchange.moves for exchange in self._open if exchange.blocked}
            seen = {
                exchange: before if (before := seen.get(exchange, (-1, 0.0)))[0] == moves else (moves, now_s)
                for exchange, moves in stuck.items()
            }
            for exchange, (_, since_s) in seen.items():
                if now_s - since_s >= self._limits.slow_reader_s:
                    exchange.cut(Cause.SLOW)
            bodies = {one: bodies.get(one, (one.received_bytes, now_s)) for one in self._open if one.reading}
            for exchange, (received, since_s) in bodies.items():
                if now_s - since_s >= window_s:
                    if exchange.received_bytes - received < least_bytes:
                        exchange.cut(Cause.SLOW)
                    bodies[exchange] = (exchange.received_bytes, now_s)
            await asyncio.sleep(min(1.0, self._limits.slow_reader_s / 4))

    # ---- every request ---------------------------------------------------------------------------------------

    async def _serve(
        self, scope: Scope, receive: Receive, send: Send, route: Callable[[Exchange], Awaitable[None]]
    ) -> None:
        """One exchange from its head to its end, whatever happens in between."""
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send, self._budget)
        self._open.add(exchange)
        try:
            try:
                self._check_head(exchange)
                await route(exchange)
            except (GoneError, asyncio.CancelledError):
                raise
            except Exception as error:
                seen = as_api_error(error)
                if seen.status == 500 and not isinstance(error, ApiError):
                    _log.exception("request %s: %s %s", exchange.request_id, exchange.method, scope["path"])
                elif seen.status > 500:
                    _log.warning("request %s: %d %s", exchange.request_id, seen.status, error)
                _let_go(error)
                await exchange.fail(seen)
                del seen
        except asyncio.CancelledError:
            if exchange.cause is None:
                raise
            exchange.resume()
            with contextlib.suppress(GoneError):
                await self._cut_short(exchange, exchange.cause)
        except GoneError:
            pass
        finally:
            exchange.release()
            self._open.discard(exchange)
            if exchange.status is not None:
                self._on_response(exchange.status)

    async def _cut_short(self, exchange: Exchange, cause: Cause) -> None:
        match cause:
            case Cause.GONE:
                return
            case Cause.SLOW if exchange.started:
                _log.warning("request %s: %s; cut off", exchange.request_id, cause.value)
                await exchange.abort()
            case Cause.SLOW:
                headers = ((b"connection", b"close"),)
                await exchange.fail(ApiError(408, "the request's body did not come in time", headers=headers))
            case Cause.DRAINED:
                await exchange.fail(self._drained())

    def _check_head(self, exchange: Exchange) -> None:
        scope = exchange.scope
        if exchange.head_bytes > self._limits.header_bytes:
            raise headers_too_large(self._limits.header_bytes)
        if CROWDED in scope.get("extensions", {}) and scope["path"] != "/health":
            raise too_many_connections()
        transfer_encoding = exchange.headers.get("transfer-encoding")
        if transfer_encoding is not None or scope["http_version"] != "1.1":
            check_framing(scope["http_version"], transfer_encoding)
        if len(exchange.headers) != len(exchange.fields):
            check_repeated(exchange.fields)
        if self._guard is not None and scope["path"] != "/health":
            self._guard.check(exchange.headers)

    def _drained(self) -> ApiError:
        retry_after_s = max(1, math.ceil(self._limits.drain_s))
        return unavailable("the gateway is shutting down", code="draining", retry_after_s=retry_after_s)

    # ---- where it goes ---------------------------------------------------------------------------------------

    def _route_private(self, exchange: Exchange) -> Awaitable[None]:
        return self._pages.alone(exchange, _path(exchange), draining=self.draining)

    def _route(self, exchange: Exchange) -> Awaitable[None]:
        """What serves this path; the key is checked first, except for `/health`."""
        path, method = _path(exchange), exchange.method
        if path == "/health":
            return self._pages.health(exchange, draining=self.draining)
        is_generation = is_controlled(path)
        use = None if is_generation else use_of(method, path)
        if use is Use.ADMIN:
            self._admin.check_admin(exchange.headers)
        key_name = self._access.check(exchange.headers) if self._access.guarded and use is not Use.ADMIN else None
        if is_generation:
            if method != "POST":
                raise not_allowed(method, path, "POST")
            return self._generate(exchange, path, key_name)
        if path == MODELS or path.startswith(MODELS + "/"):
            return self._pages.models(exchange, path)
        if path == OPENAPI:
            return self._pages.openapi(exchange)
        if self._options.server.metrics_port is None and (page := self._pages.find(exchange, path)) is not None:
            return page
        if use is None:
            if allow := methods(path):
                raise not_allowed(method, path, ", ".join(allow))
            raise not_found(method, path)
        return self._pass_on(exchange, path, use)

    async def _generate(self, exchange: Exchange, path: str, key_name: str | None) -> None:
        """A request under control: read, counted, admitted by the core, sent to its engine, the reply relayed."""
        if self.draining:
            raise self._drained()
        slo, slo_class, metrics = self._options.slo, "", False
        if exchange.own:
            slo = read_slo(exchange.own, slo, self._options.classes)
            slo_class = exchange.own.get(CLASS_HEADER, "")
            metrics = exchange.own.get(METRICS_HEADER, "").strip() == "1"
        body = await exchange.read(self._limits.body_bytes)
        if len(body) <= OFF_LOOP_BYTES:
            parsed = parse_request(path, body, key_name=key_name, metrics=metrics)
        else:
            parsed = await asyncio.to_thread(parse_request, path, body, key_name=key_name, metrics=metrics)
        if (name := self._aliases.get(parsed.model)) is not None:
            parsed = await asyncio.to_thread(parsed.named, name) if len(body) > OFF_LOOP_BYTES else parsed.named(name)
        tier, classes = parsed.service_tier, self._options.classes
        if tier is not None and tier in classes and not slo_class:
            slo, slo_class = read_slo(exchange.own, classes[tier], classes), tier
        if len(body) > LARGE_BYTES:
            await exchange.hold_soon(2 * len(body))  # what is built of it, until it is counted
        del body
        check_sequences(parsed, self._models.max_sequences())
        exchange.attend()
        if parsed.stream and (every_s := self._options.server.keep_alive_s) is not None:
            exchange.keep_alive(every_s)
        count = await self._models.count(parsed)
        parsed = parsed.counted()
        if len(parsed.body) > LARGE_BYTES:
            exchange.hold(len(parsed.body))
        async with self._models.session(parsed, count, slo, slo_class, repeatable=parsed.repeatable) as session:
            while True:
                try:
                    backend = await session.placed()
                    call = Call(
                        method="POST",
                        path=_target(exchange),
                        headers=self._headers(exchange),
                        body=parsed.body,
                        request_id=session.request.id,
                        request=parsed,
                        prompt_tokens=count.tokens,
                        max_tokens=parsed.max_tokens,
                    )
                    async with backend.engine.open(call) as reply:
                        return await relay.relay(
                            exchange,
                            reply,
                            session,
                            api=parsed.api,
                            echo=parsed.echo,
                            metrics=parsed.metrics,
                            held_bytes=self._limits.body_bytes,
                        )
                except (EngineError, asyncio.CancelledError) as error:
                    if not session.goes_again(error):
                        raise

    async def _pass_on(self, exchange: Exchange, path: str, use: Use) -> None:
        """Without control: the engine that serves the model, the bytes as they are."""
        if self.draining:
            raise self._drained()
        if exchange.own:
            name = next(iter(exchange.own))
            message = f"{name[:80]}: {path} runs without control, so that no SLO can be met and no metrics be given"
            raise invalid(message, name[:80])
        body = await exchange.read(self._limits.body_bytes)
        native = _NATIVE_MODEL.fullmatch(path)
        if native is not None:
            model: str | None = native[1]
        elif len(body) > OFF_LOOP_BYTES:
            model = await asyncio.to_thread(model_of, body, exchange.headers.get("content-type", ""))
        else:
            model = model_of(body, exchange.headers.get("content-type", ""))
        if model is not None and native is None and (own := self._aliases.get(model)) is not None:
            if exchange.headers.get("content-type", "")[:10].lower() == "multipart/":
                raise invalid(f"model: {model} is an alias, which is not replaced in a form: send {own}", "model")
            model = own
            body = await asyncio.to_thread(with_model, body, own)
        backend = await self._models.uncontrolled_backend(model)
        exchange.attend()
        call = Call(method=exchange.method, path=_target(exchange), headers=self._headers(exchange), body=body)
        works = use is Use.WORK
        # What computes may be silent for long: a recording of an hour is one reply at its end.
        silence_s = self._limits.request_s if works else self._limits.silence_s
        async with contextlib.AsyncExitStack() as stack:
            if works:
                stack.enter_context(backend.uncontrolled())
            try:
                async with asyncio.timeout(silence_s):
                    reply = await stack.enter_async_context(backend.engine.open(call))
            except TimeoutError as error:
                raise relay.silent(silence_s, works) from error
            await relay.forward(exchange, reply, silence_s, works=works)

    def _headers(self, exchange: Exchange) -> Headers:
        """The client's headers, without a key that was meant for the gateway, with the request's id."""
        guarded = self._access.guarded or self._admin.guarded
        kept = []
        for name, value in exchange.fields:
            if name != "x-request-id" and not (guarded and name in KEY_HEADERS):
                kept.append((name, value))
        kept.append(("x-request-id", exchange.request_id))
        return tuple(kept)


def build_app(
    models: Models,
    options: Options,
    *,
    metrics_page: MetricsPage,
    extra_routes: Sequence[Route] = (),
    on_response: Callable[[int], None] = lambda _: None,
) -> Gateway:
    """The gateway in front of `models`; `extra_routes` are served where `/metrics` is; `on_response`: each status."""
    return Gateway(models, options, Pages(models, metrics_page, extra_routes, options.aliases), on_response)


def build_private_app(gateway: Gateway) -> ASGIApp:
    """Health, metrics and the further routes of a gateway, for a port of their own."""
    return gateway.private


def _let_go(error: BaseException | None) -> None:
    """Forget where an error came from: its frames hold bodies, and it is on its way to the client for a while."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _path(exchange: Exchange) -> str:
    """The path, decoded once. Raises ApiError 404 for one that an engine might take for another than we do, and 307, as
    vLLM does, for one with a slash at its end: an engine would redirect the client to its own address.
    """
    raw: str = exchange.scope["raw_path"].decode("latin-1")
    if raw in PATHS:  # most are one of these
        return raw
    path = unquote(raw, errors="replace")
    segments = path.split("/")
    joined = raw.count("/") + 1 != len(segments) and not raw.startswith(MODELS + "/")  # a name may have a slash
    odd = joined or "." in segments or ".." in segments or "" in segments[1:-1] or _ODD.search(path) is not None
    if odd or not path.startswith("/") or not path.isprintable():
        raise not_found(exchange.method, raw)
    if raw.endswith("/") and (path[:-1].startswith(_REDIRECTED) or methods(path[:-1])):
        query = exchange.scope["query_string"].decode("latin-1")
        raise moved(raw[:-1] + (f"?{query}" if query else ""))
    return path


def _target(exchange: Exchange) -> str:
    """Path and query as the client sent them."""
    query = exchange.scope["query_string"]
    target: bytes = exchange.scope["raw_path"] + (b"?" + query if query else b"")
    return target.decode("latin-1")
