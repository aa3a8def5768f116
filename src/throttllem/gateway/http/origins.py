"""Which hosts and web pages a gateway without API keys serves, and what browsers get of it (CORS).

A page in a browser that reaches this machine can send requests here: across sites, where the browser hides the reply
but sends the request (a form, `text/plain`), or as the same site, under a name of its author that resolves to this
machine (DNS rebinding). The first carries a foreign `Origin`, the second a foreign `Host`.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from throttllem.config import ServerOptions
from throttllem.openai_api.errors import ApiError, invalid

_EXPOSED = ("x-request-id", "retry-after")
"""Headers of a reply that a page may read, beside those that it always may."""
_LABEL = re.compile(r"[a-z0-9_-]+")
_LOOPBACK = (".localhost",)
_PRIVATE = (".local", ".internal", ".home.arpa", ".intranet", ".private", ".corp", ".home", ".lan")
"""No name in the public DNS ends so (RFC 6761, 8375; RFC 6762, appendix G)."""
_REMEMBERED = 256
_SHOWN = 80


def with_cors(app: ASGIApp, origins: tuple[str, ...]) -> ASGIApp:
    """`app` with CORS for pages of these origins ("*": all), as vLLM has it."""
    return _Cors(
        app,
        allow_origins=origins,
        allow_methods=["*"],
        allow_headers=["*"],
        allow_private_network=True,
        expose_headers=_EXPOSED,
    )


class _Cors(CORSMiddleware):
    """Starlette's, with errors in the API's shape."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a browser that asks before it sends."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        origin, method = request_headers["origin"], request_headers["access-control-request-method"]
        error = invalid(f"no path here has the method {method[:_SHOWN]!r}", code="method_not_allowed")
        if not self.is_allowed_origin(origin):
            error = _refused(origin, response.status_code)
        kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        return Response(error.body, error.status, kept, "application/json")


class Guard:
    """Checks `Host` and `Origin` of every request to a gateway without keys.

    Known hosts are IP addresses, names without a dot, the machine's and the configured ones: the author of a page
    elsewhere can give none of them to this machine. Where the gateway does not listen on loopback, names of private
    networks are known too.
    """

    def __init__(self, server: ServerOptions) -> None:
        self._origins = frozenset(server.allowed_origins or ())
        named = {server.host, server.metrics_host, socket.gethostname(), *(server.allowed_hosts or ())}
        self._names = frozenset(name.lower().rstrip(".") for name in named)
        self._endings = tuple(name[1:] for name in self._names if name.startswith("*."))
        self._endings += _LOOPBACK if _is_loopback(server.host) else _LOOPBACK + _PRIVATE
        self._seen: set[str] = set()
        """Hosts that were found to be known."""

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises ApiError 403, which names the option that lets the request pass."""
        host, origin = headers.get("host"), headers.get("origin")
        if host is not None and host not in self._seen:
            if not self._is_known(host):
                raise ApiError(
                    403,
                    f"the host {host[:_SHOWN]!r} is not known here, and no API key is needed: name it in "
                    f"server.allowed_hosts (--set server.allowed_hosts={_name(host)[:_SHOWN]}), or set server.api_keys",
                    code="host_not_allowed",
                )
            if len(self._seen) < _REMEMBERED:
                self._seen.add(host)
        if origin is not None and not (origin in self._origins or "*" in self._origins or _is_same(origin, host)):
            raise _refused(origin, 403, ", and no API key is needed")

    def _is_known(self, host: str) -> bool:
        name = _name(host)
        if name in self._names or "*" in self._names or _LABEL.fullmatch(name) or name.endswith(self._endings):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _refused(origin: str, status: int, why: str = "") -> ApiError:
    return ApiError(
        status,
        f"pages of {origin[:_SHOWN]!r} may not call this gateway{why}: name the origin in server.allowed_origins "
        f"(--allowed-origins {origin[:_SHOWN]})",
        code="origin_not_allowed",
    )


def _name(host: str) -> str:
    """The host of a `Host` field, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower().rstrip(".")


def _is_same(origin: str, host: str | None) -> bool:
    """Whether a page of this origin was served under this host; the scheme may be that of a proxy in front."""
    return host is not None and origin.partition("://")[2].lower() == host.lower()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
