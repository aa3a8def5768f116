"""What a vLLM-like engine says of its capacities, over whatever it offers, and what has to be assumed in its place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from throttllem.engines.base import EngineError
from throttllem.engines.http import Upstream
from throttllem.engines.prometheus import samples, total

ASSUMED_BATCH = 256
ASSUMED_BUDGET_TOKENS = 2048
ASSUMED_BLOCK_TOKENS = 16
"""vLLM's own defaults on most GPUs."""
PLUGIN_INFO = "throttllem_engine_info"
"""What the plug-in adds to the engine's metrics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """What the engine said; None: it did not. `engines` (data parallel) and `api_servers` behind the address;
    `sends_to` is where the plug-in sends its steps (None: there is no plug-in).
    """

    models: tuple[str, ...] = ()
    version: str = ""
    max_context_tokens: int | None = None
    kv_blocks: int | None = None
    block_tokens: int | None = None
    max_batch: int | None = None
    prefill_budget_tokens: int | None = None
    chunked: bool = True
    sends_to: str | None = None
    engines: int = 1
    api_servers: int = 1
    metrics: bool = False
    started_s: float | None = None


@dataclass(slots=True)
class Capacities:
    """The numbers of an EngineSpec, settled one by one; `notes` tell people what did not come from the engine."""

    notes: list[str] = field(default_factory=list)

    def capped(self, name: str, told: int | None, configured: int | None) -> int | None:
        """The engine's word; a smaller configured number caps it, a larger one is not believed. None: nobody knows."""
        if told is None or configured is None or told == configured:
            return configured if told is None else told
        why = "is taken as a cap" if configured < told else "is not used"
        self.notes.append(f"{name} = {configured} of the configuration {why}: the engine says {told}")
        return min(told, configured)

    def assumed(self, name: str, value: int) -> int:
        """A default that a note owns up to."""
        self.notes.append(f"the engine does not tell {name}: {value} is assumed")
        return value


async def ask_capacities(upstream: Upstream, *, need_batch: bool) -> Reported:
    """Ask all that can be asked. `need_batch`: look further for the batch size, as nobody has set it."""
    status, _ = await upstream.get("/health")
    if status >= 500:
        raise EngineError(f"the engine at {upstream.url} says it is not well (/health answers {status})", status=503)
    names, context = _models(upstream.url, await upstream.get_json("/v1/models"))
    page = await metrics_page(upstream)
    told = {**_cache(page), **_plugin(page)}
    if need_batch and "max_batch" not in told:
        told |= await _server_info(upstream)
    return Reported(
        models=names,
        version=await _version(upstream),
        max_context_tokens=context,
        metrics=total(page, "vllm:num_requests_running") is not None,
        started_s=total(page, "process_start_time_seconds"),
        **told,
    )


async def metrics_page(upstream: Upstream, *, timeout_s: float = 5.0) -> bytes:
    """The engine's metrics; empty where there are none."""
    status, page = await upstream.get("/metrics", timeout_s=timeout_s)
    if status >= 500:
        raise EngineError(f"the engine at {upstream.url} says it is not well (/metrics answers {status})", status=503)
    return page if status == 200 else b""


def _models(url: str, answer: object) -> tuple[tuple[str, ...], int | None]:
    """Names, and the least context among them that say."""
    listed = answer.get("data") if isinstance(answer, dict) else None
    models = [model for model in listed if isinstance(model, dict)] if isinstance(listed, list) else []
    names = tuple(name for model in models if isinstance(name := model.get("id"), str))
    if not names:
        raise EngineError(f"the engine at {url} names no model in /v1/models", status=503)
    contexts = [length for model in models if isinstance(length := model.get("max_model_len"), int) and length > 0]
    return names, min(contexts, default=None)


def _cache(page: bytes) -> dict[str, Any]:
    """Blocks of all engines behind the address, without the one that vLLM keeps for padding in each."""
    labels = [sample.labels for sample in samples(page, "vllm:cache_config_info")]
    counts = [int(each["num_gpu_blocks"]) for each in labels if each.get("num_gpu_blocks", "").isdecimal()]
    if not counts or not labels[0].get("block_size", "").isdecimal():
        return {}
    block_tokens, size = int(labels[0]["block_size"]), labels[0].get("kv_cache_size_tokens", "")
    if size.isdecimal():
        # Of a model with several kinds of layers, a token takes blocks of each kind.
        block_tokens = min(block_tokens, max(1, int(size) // counts[0]))
    return {"kv_blocks": sum(counts) - len(counts), "block_tokens": block_tokens, "engines": len(counts)}


def _plugin(page: bytes) -> dict[str, Any]:
    labels = next((sample.labels for sample in samples(page, PLUGIN_INFO)), None)
    # A gateway in front of the engine has an information of that name too.
    if labels is None or "max_num_seqs" not in labels:
        return {}
    engines = int(labels.get("engines", "1"))
    return {
        "sends_to": labels.get("stats", ""),
        "max_batch": int(labels["max_num_seqs"]) * engines,
        "prefill_budget_tokens": int(labels["max_num_batched_tokens"]),
        "chunked": labels.get("chunked_prefill") == "1",
        "engines": engines,
        "api_servers": int(labels.get("api_servers", "1")),
    }


async def _server_info(upstream: Upstream) -> dict[str, Any]:
    """vLLM's whole configuration, where it runs in development mode."""
    try:
        info = await upstream.get_json("/server_info?config_format=json", timeout_s=10.0)
    except EngineError:
        return {}
    config = info.get("vllm_config") if isinstance(info, dict) else None
    scheduler = config.get("scheduler_config") if isinstance(config, dict) else None
    if not isinstance(scheduler, dict) or not isinstance(scheduler.get("max_num_seqs"), int):
        return {}
    budget = scheduler.get("max_num_batched_tokens")
    return {
        "max_batch": scheduler["max_num_seqs"],
        "prefill_budget_tokens": budget if isinstance(budget, int) else None,
        "chunked": scheduler.get("enable_chunked_prefill") is not False,
    }


async def _version(upstream: Upstream) -> str:
    try:
        answer = await upstream.get_json("/version")
    except EngineError:
        return ""
    version = answer.get("version") if isinstance(answer, dict) else None
    return version if isinstance(version, str) else ""
