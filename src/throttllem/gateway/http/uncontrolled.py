"""The paths that go on to an engine without control: which there are, and what each of them means for the engine.

vLLM's, and what others have in common with it. A path under `/v1` that is not known is taken for work of the engine.
"""

from __future__ import annotations

import re
from enum import Enum, auto


class Use(Enum):
    """What a request that goes on without control does to its engine."""

    WORK = auto()
    """It computes on the GPU: load that has no SLO."""
    NONE = auto()
    """It reads, or counts."""
    ADMIN = auto()
    """It changes what the engine is or does for all clients."""


_WORK = ("/rerank", "/v2/rerank", "/score", "/pooling", "/classify", "/inference/v1/generate")
_LIGHT_ELSEWHERE = ("/tokenize", "/detokenize")
ELSEWHERE = (*_WORK, *_LIGHT_ELSEWHERE)
"""Paths beside `/v1` that take a POST."""
_LIGHT = re.compile(r"/v1/messages/count_tokens|/v1/(?:chat/)?completions/render|/v1/responses/[^/]+/cancel")
_ADMIN = re.compile(
    # Loading and unloading, under whatever name other engines have for it (TabbyAPI, text-generation-webui).
    r"/v1/(?:.*/)?(?:un)?load(?:_\w+)?(?:[^\w-].*)?|/v1/(?:internal|admin)/.*|/pause|/resume|/sleep|/wake_up|/reset_(?:prefix|mm|encoder)_cache"
    r"|/(?:start|stop)_profile|/v2/repository/models/[^/]+/(?:un)?load",
    re.IGNORECASE,
)


def use_of(method: str, path: str) -> Use | None:
    """What a request with this path (no query) does to the engine; None: it does not go on to one."""
    if method == "POST":
        if _ADMIN.fullmatch(path):
            return Use.ADMIN
        if path in _LIGHT_ELSEWHERE or _LIGHT.fullmatch(path):
            return Use.NONE
        return Use.WORK if path in _WORK or _is_v1(path) else None
    if method == "DELETE":
        return Use.NONE if _is_v1(path) else None
    reads = method == "GET" and (_is_v1(path) or (path.startswith("/v2/") and path not in _WORK))
    return Use.NONE if reads else None


def methods(path: str) -> tuple[str, ...]:
    """The methods with which this path goes on to an engine."""
    return tuple(method for method in ("GET", "POST", "DELETE") if use_of(method, path) is not None)


def _is_v1(path: str) -> bool:
    return path.startswith("/v1/") and path != "/v1/"
