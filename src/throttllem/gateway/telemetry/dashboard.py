"""The dashboard: one page that shows a running gateway, and the state that it polls once a second.

The page loads nothing but that state. Its script and style are allowed by their hashes, and no name that comes from an
engine is ever read as markup: the page's policy forbids it (trusted types).
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from throttllem.gateway.control.models import Models
from throttllem.gateway.control.slo_attainment import RECENT_S, SloCounts, added
from throttllem.gateway.energy.accounting import Energy
from throttllem.gateway.telemetry.history import KEPT_S, History
from throttllem.gateway.telemetry.status import GatewayStatus, gateway_status

_HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
}


def dashboard_routes(models: Models, history: History) -> list[Route]:
    """`/dashboard` and `/dashboard/state`. `history` has a past only while its `run` does, or a page is open."""
    page = files("throttllem.gateway.telemetry").joinpath("dashboard.html").read_text(encoding="utf-8")
    headers = _HEADERS | {"content-security-policy": policy(page)}

    async def show(request: Request) -> Response:
        return Response(page, headers=headers, media_type="text/html")

    async def send_state(request: Request) -> Response:
        status = gateway_status(models)
        history.note(status)
        query = request.query_params
        known_s = _seconds(query.get("since")) if query.get("run") == history.run_id else None
        return Response(state(status, history, known_s), headers=_HEADERS, media_type="application/json")

    return [Route("/dashboard", show), Route("/dashboard/state", send_state)]


def policy(page: str) -> str:
    """The page's security policy: its own script and style, its own state, nothing else."""
    hashes = {tag: _hash(re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)) for tag in ("script", "style")}
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _hash(parts: list[str]) -> str:
    digests = (hashlib.sha256(part.encode()).digest() for part in parts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over all models and engines. `saved` is over the engines that have an estimate, None if none has; so is
    `would_save`, over those in a dry run.

    `estimated` of `engines` have one. `joules_per_token`: all energy since the start over all generated tokens;
    `busy_joules_per_token`: idle energy left out. None: no token yet, an engine of unknown joules, or no request
    with an SLO.
    """

    queue: int
    watts: float | None
    total_j: float | None
    idle_j: float | None
    top_j: float | None
    saved: float | None
    would_save: float | None
    engines: int
    estimated: int
    joules_per_token: float | None
    busy_joules_per_token: float | None
    recent: SloCounts
    ever: SloCounts
    recent_attainment: float | None
    ever_attainment: float | None


def totals(status: GatewayStatus) -> Totals:
    """The gateway as a whole."""
    energies = [engine.energy for model in status.models for engine in model.engines]
    compared = [energy for energy in energies if energy.top_j]
    sums = Energy(
        total_j=_sum(energy.total_j for energy in compared),
        top_j=sum(energy.top_j or 0.0 for energy in compared) or None,
    )
    dry_runs = [energy for energy in energies if energy.advised_j is not None]
    advised = Energy(
        total_j=_sum(energy.total_j for energy in dry_runs),
        advised_j=sum(energy.advised_j or 0.0 for energy in dry_runs) if dry_runs else None,
    )
    total_j, idle_j = _sum(energy.total_j for energy in energies), _sum(energy.idle_j for energy in energies)
    # Joules of some engines over the tokens of all would be too few.
    whole_j = total_j if all(energy.total_j is not None for energy in energies) else None
    tokens = sum(model.generated_tokens for model in status.models)
    recent, ever = SloCounts(), SloCounts()
    for model in status.models:
        recent, ever = added(recent, model.recent), added(ever, model.ever)
    return Totals(
        queue=sum(model.queue for model in status.models),
        watts=_sum(energy.watts for energy in energies),
        total_j=total_j,
        idle_j=idle_j,
        top_j=sums.top_j,
        saved=sums.saved,
        would_save=advised.would_save,
        engines=len(energies),
        estimated=len(compared),
        joules_per_token=None if whole_j is None or not tokens else whole_j / tokens,
        busy_joules_per_token=None if whole_j is None or not tokens else (whole_j - (idle_j or 0.0)) / tokens,
        recent=recent,
        ever=ever,
        recent_attainment=recent.attainment,
        ever_attainment=ever.attainment,
    )


def _sum(values: Iterable[float | None]) -> float | None:
    """Of the values that are known; None: none is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def state(status: GatewayStatus, history: History, known_s: float | None = None) -> bytes:
    """What the page polls: the status, its totals, and the samples that it does not know yet."""
    found = {
        "run": history.run_id,
        "kept_s": KEPT_S,
        "recent_s": RECENT_S,
        "status": status,
        "titles": [model.title for model in status.models],
        "saved": {engine.name: engine.energy.saved for model in status.models for engine in model.engines},
        "totals": totals(status),
        "samples": history.since(known_s),
    }
    return json.dumps(_plain(found), allow_nan=False, separators=(",", ":")).encode()


def _plain(value: object) -> object:
    """Values that JSON can hold; numbers that are not finite become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    return value


def _seconds(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
