"""Capacities of engines that are not vLLM, from the pages that each kind has: llama.cpp, SGLang, TGI, Ollama.

The field names are those of their documentation (2026). A page that is not there, or holds something else, reports
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from throttllem.engines.base import EngineError
from throttllem.engines.http import Upstream

MOST_BATCH = 1 << 16
MOST_TOKENS = 1 << 27
MOST_KV_BLOCKS = 1 << 40
"""The largest capacities that are taken for true: a larger one counts as not reported."""
_MOST = {"max_batch": MOST_BATCH, "kv_blocks": MOST_KV_BLOCKS}
Page = Mapping[str, object]


async def capacities_of_others(upstream: Upstream, model: str) -> dict[str, int]:
    """The capacities that an engine reports on the page of its kind, by the names of `EngineSpec`."""
    for path, read in _PAGES:
        try:
            page = await upstream.get_json(path)
        except EngineError:
            continue
        found = read(page, model) if isinstance(page, dict) else {}
        numbers = {name: number for name, value in found.items() if (number := capacity(name, value)) is not None}
        if numbers:
            return numbers
    return {}


def _llama_cpp(page: Page, _: str) -> dict[str, Any]:
    """`n_ctx` is that of one slot. Whether slots share one cache of that size or have their own is not reported."""
    settings = page.get("default_generation_settings")
    context = capacity("max_context_tokens", settings.get("n_ctx")) if isinstance(settings, dict) else None
    return {} if context is None else {"max_context_tokens": context, "max_batch": page.get("total_slots")}


def _sglang(page: Page, _: str) -> dict[str, Any]:
    block_tokens = capacity("block_tokens", page.get("page_size")) or 1
    tokens = capacity("kv_blocks", page.get("max_total_num_tokens"))
    return {
        "kv_blocks": tokens and tokens // block_tokens,
        "block_tokens": tokens and block_tokens,
        "max_context_tokens": page.get("context_length"),
        "max_batch": page.get("max_running_requests"),
    }


def _tgi(page: Page, _: str) -> dict[str, Any]:
    tokens = page.get("max_batch_total_tokens")
    return {
        "kv_blocks": tokens,
        "block_tokens": None if tokens is None else 1,
        "max_context_tokens": page.get("max_total_tokens"),
        "max_batch": page.get("max_batch_size"),
    }


def _ollama(page: Page, model: str) -> dict[str, Any]:
    listed = page.get("models")
    for each in listed if isinstance(listed, list) else ():
        if isinstance(each, dict) and model in (each.get("name"), each.get("model")):
            return {"max_context_tokens": each.get("context_length")}
    return {}


_PAGES: tuple[tuple[str, Callable[[Page, str], dict[str, Any]]], ...] = (
    ("/props", _llama_cpp),
    ("/get_server_info", _sglang),
    ("/info", _tgi),
    ("/api/ps", _ollama),
)


def capacity(name: str, value: object) -> int | None:
    """A capacity of this name in `EngineSpec`, as an engine sent it: a JSON number, or a text of digits; None: it is no
    such number, or a larger one than any engine has.
    """
    if isinstance(value, str) and value.isdecimal() and len(value) < 20:
        value = int(value)
    return value if type(value) is int and 0 < value <= _MOST.get(name, MOST_TOKENS) else None
