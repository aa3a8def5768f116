"""The capacities of an engine with an OpenAI API: read from the pages that its kind has, completed by options.

What is neither reported nor set is unknown (`EngineSpec.unknown`): such an engine is served without checks of it.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass, field, replace
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from throttllem.core.types import EngineSpec
from throttllem.engines.base import Card, EngineError, OwnLimitError, RemoteOptions
from throttllem.engines.http import Upstream
from throttllem.engines.kinds import MOST_BATCH, MOST_KV_BLOCKS, capacities_of_others, capacity

ASSUMED_BATCH = 256
ASSUMED_BUDGET_TOKENS = 2048
ASSUMED_BLOCK_TOKENS = 16
"""vLLM's own defaults on most GPUs."""
MOST_CONTEXT_TOKENS = 1 << 20
"""More than most engines have, for a context that is unknown."""
MOST_COUNT = 1 << 53
MOST_SAMPLES = 1024
LONGEST_SAMPLE = 16 * 1024
"""Bytes of a line, and lines of one name, that are read of an engine's metrics; others are left out."""
MOST_NAMES = 4096
LONGEST_NAME = 512
"""Characters; longer names of models, and those with control characters, are left out."""
CARD_CHARACTERS = 16 * 1024
"""What an engine says of one model; of a longer card only the name is kept."""
PLUGIN_INFO = "throttllem_engine_info"
"""The metric that the plug-in adds to the engine's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedCapacities:
    """What the engine reports of itself; None: it does not. `engines` (data parallel) and `api_servers` are those
    behind the address; `sends_to` is where the plug-in sends its steps (None: no plug-in), `boot` the start of the
    engine that they are of. `speculated_tokens`: the counters of an engine that speculates when it was reached.
    """

    models: dict[str, Card] = field(default_factory=dict)
    roots: tuple[str, ...] = ()
    kv_cache_dtype: str = "auto"
    version: str = ""
    max_context_tokens: int | None = None
    kv_blocks: int | None = None
    block_tokens: int | None = None
    max_batch: int | None = None
    prefill_budget_tokens: int | None = None
    chunked: bool = True
    prefix_caching: bool = False
    sends_to: str | None = None
    boot: int | None = None
    engines: int = 1
    api_servers: int = 1
    metrics: bool = False
    started_s: float | None = None
    speculated_tokens: tuple[int, int] | None = None


async def read_capacities(upstream: Upstream, *, need_batch: bool) -> ReportedCapacities:
    """Read all that the engine offers. `need_batch`: no option sets the batch size, so search further for it.

    Raises EngineError while the engine is not ready.
    """
    status, _ = await upstream.get("/health")
    if status >= 500:
        raise EngineError(f"the engine at {upstream.url} is not healthy (/health answers {status})", status=503)
    cards, roots, context = _models(upstream.url, await upstream.get_json("/v1/models"))
    page = await metrics_page(upstream)
    numbers = {**_cache(page), **_plugin(page)}
    if need_batch and "max_batch" not in numbers:
        numbers |= await _server_info(upstream)
    if "kv_blocks" not in numbers:
        others = await capacities_of_others(upstream, next(iter(cards)))
        context = context or others.pop("max_context_tokens", None)
        others.pop("max_context_tokens", None)
        numbers |= others
    return ReportedCapacities(
        models=cards,
        roots=roots,
        version=await _version(upstream),
        max_context_tokens=context,
        metrics=total(page, "vllm:num_requests_running") is not None,
        started_s=total(page, "process_start_time_seconds"),
        speculated_tokens=speculated_tokens(page),
        **numbers,
    )


async def read_cards(upstream: Upstream, *, timeout_s: float) -> dict[str, Card]:
    """The models in `/v1/models`. Raises EngineError if there is none."""
    return _models(upstream.url, await upstream.get_json("/v1/models", timeout_s=timeout_s))[0]


def engine_spec(reported: ReportedCapacities, options: RemoteOptions, spec: EngineSpec) -> tuple[EngineSpec, list[str]]:
    """The catalogue's `spec` with this engine's capacities, and notes on what the engine did not report.

    Without the KV cache or the context the engine is none of vLLM's kin: no default of theirs is assumed then.
    """
    notes: list[str] = []

    def capped(name: str, found: int | None, configured: int | None) -> int | None:
        """The reported number; a smaller configured one caps it, a larger one is not used."""
        if found is None or configured is None or found == configured:
            return configured if found is None else found
        why = "is taken as a cap" if configured < found else "is not used"
        notes.append(f"{name} = {configured} of the configuration {why}: the engine reports {found}")
        return min(found, configured)

    def assumed(name: str, value: int) -> int:
        notes.append(f"the engine does not report {name}: {value} is assumed")
        return value

    batch = capped("max_batch", reported.max_batch, options.max_batch)
    blocks = capped("kv_blocks", reported.kv_blocks, options.kv_blocks)
    block_tokens = reported.block_tokens or options.block_tokens
    context = capped("max_context_tokens", reported.max_context_tokens, options.max_context_tokens)
    capacities = {"kv_blocks": blocks, "max_context_tokens": context, "max_batch": batch}
    unknown = tuple(name for name, value in capacities.items() if value is None)
    if blocks is None or context is None:
        notes.append(
            f"the engine does not report {', '.join(unknown)}: requests are admitted without checks of that, and the "
            f"clock stays at the maximum; give {options.flags(*unknown)}"
        )
    else:
        batch, unknown = batch or assumed("max_batch", ASSUMED_BATCH), ()
    if unknown:
        return (
            replace(
                spec,
                kv_blocks=blocks or MOST_KV_BLOCKS,
                block_tokens=block_tokens or 1,
                max_batch=batch or MOST_BATCH,
                max_context_tokens=context or MOST_CONTEXT_TOKENS,
                prefill_budget_tokens=reported.prefill_budget_tokens or MOST_CONTEXT_TOKENS,
                chunked=reported.chunked,
                no_evict=False,
                startup_s=0.0,
                unknown=unknown,
            ),
            notes,
        )
    assert blocks is not None and context is not None and batch is not None
    budget = reported.prefill_budget_tokens
    found = replace(
        spec,
        kv_blocks=blocks,
        block_tokens=block_tokens or assumed("block_tokens", ASSUMED_BLOCK_TOKENS),
        max_batch=batch,
        max_context_tokens=context,
        prefill_budget_tokens=budget or assumed("its tokens per step", max(ASSUMED_BUDGET_TOKENS, batch)),
        chunked=reported.chunked,
        prefix_caching=reported.prefix_caching,
        no_evict=False,
        startup_s=0.0,
    )
    return found, notes


# ---- pages of the engine -----------------------------------------------------------------------------------------


async def metrics_page(upstream: Upstream, *, timeout_s: float = 5.0) -> bytes:
    """The engine's metrics; empty where there are none."""
    status, page = await upstream.get("/metrics", timeout_s=timeout_s)
    if status >= 500:
        raise EngineError(f"the engine at {upstream.url} is not healthy (/metrics answers {status})", status=503)
    return page if status == 200 else b""


def samples(page: bytes, name: str) -> list[Sample]:
    """The samples of exactly this name, in order; of those with the same labels the last. Only their lines are parsed,
    as pages are long and read often.
    """
    found: dict[frozenset[tuple[str, str]], Sample] = {}
    line_of = rb"^%s[{ \t].{0,%d}$" % (re.escape(name.encode()), LONGEST_SAMPLE)
    for match in itertools.islice(re.finditer(line_of, page, re.MULTILINE), MOST_SAMPLES):
        try:
            (family,) = text_string_to_metric_families(match[0].decode(errors="replace"))
        except (ValueError, LookupError):  # not a sample
            continue
        for sample in family.samples:
            found[frozenset(sample.labels.items())] = sample
    return list(found.values())


def total(page: bytes, name: str) -> float | None:
    """The sum over all samples of this name (one per engine behind an address); None: there is none. Raises EngineError
    for what is no count, nor a share or a time.
    """
    values = [float(sample.value) for sample in samples(page, name)]
    if not all(0 <= value <= MOST_COUNT for value in values):
        raise EngineError(f"/metrics: {name} holds a value that is no number from 0 to 2^53")
    return sum(values) if values else None


def speculated_tokens(page: bytes) -> tuple[int, int] | None:
    """Tokens generated and accepted of drafts, since the engine started; None: it does not speculate."""
    generated = total(page, "vllm:generation_tokens_total")
    accepted = total(page, "vllm:spec_decode_num_accepted_tokens_total")
    if generated is None or accepted is None or accepted > generated:
        return None
    return int(generated), int(accepted)


def _models(url: str, answer: object) -> tuple[dict[str, Card], tuple[str, ...], int | None]:
    """Cards by name, the checkpoints behind them (adapters left out), and the least context of those that have one."""
    listed = answer.get("data") if isinstance(answer, dict) else None
    models = [model for model in listed if isinstance(model, dict)] if isinstance(listed, list) else []
    found = ((name, model) for model in models if isinstance(name := model.get("id"), str) and _is_name(name))
    cards = {name: _card(model) for name, model in itertools.islice(found, MOST_NAMES)}
    if not cards:
        raise EngineError(f"the engine at {url} names no model in /v1/models", status=503)
    roots = (model.get("root") for model in models if not model.get("parent"))
    loaded = dict.fromkeys(root for root in roots if isinstance(root, str) and _is_name(root))
    lengths = (capacity("max_context_tokens", model.get("max_model_len")) for model in models)
    contexts = [length for length in lengths if length is not None]
    return cards, tuple(loaded)[:MOST_NAMES], min(contexts, default=None)


def _card(model: dict[str, object]) -> Card:
    """The card as it came; nothing of one that is too large, or no JSON."""
    try:
        return model if len(json.dumps(model, allow_nan=False)) <= CARD_CHARACTERS else {}
    except (ValueError, RecursionError):
        return {}


def _is_name(text: str) -> bool:
    return text.isprintable() and 0 < len(text) <= LONGEST_NAME


def _cache(page: bytes) -> dict[str, Any]:
    """Blocks of all engines behind the address, without the one that vLLM keeps for padding in each."""
    labels = [sample.labels for sample in samples(page, "vllm:cache_config_info")]
    reported = [capacity("kv_blocks", each.get("num_gpu_blocks")) for each in labels]
    counts = [count for count in reported if count is not None and count > 1]
    blocks = capacity("kv_blocks", sum(counts) - len(counts))
    block_tokens = capacity("block_tokens", labels[0].get("block_size")) if labels else None
    if blocks is None or block_tokens is None:
        return {}
    size_tokens = capacity("kv_blocks", labels[0].get("kv_cache_size_tokens"))
    if size_tokens is not None:
        # A model with several kinds of layers takes blocks of each kind for a token.
        block_tokens = min(block_tokens, max(1, size_tokens // counts[0]))
    return {
        "kv_blocks": blocks,
        "block_tokens": block_tokens,
        "engines": len(counts),
        # Of several engines behind one address it is not known which has a prompt's blocks.
        "prefix_caching": len(counts) == 1 and labels[0].get("enable_prefix_caching") == "True",
        "kv_cache_dtype": "fp8" if labels[0].get("cache_dtype", "").startswith("fp8") else "auto",
    }


def _plugin(page: bytes) -> dict[str, Any]:
    labels = next((sample.labels for sample in samples(page, PLUGIN_INFO)), None)
    # A gateway in front of the engine has a metric of that name too.
    if labels is None or "max_num_seqs" not in labels:
        return {}
    engines = capacity("max_batch", labels.get("engines")) or 1
    batch = capacity("max_batch", labels["max_num_seqs"])
    return {
        "sends_to": labels.get("stats", ""),
        "boot": int(boot) if (boot := labels.get("boot", "")).isdecimal() and len(boot) < 20 else None,
        "max_batch": capacity("max_batch", batch and batch * engines),
        "prefill_budget_tokens": capacity("prefill_budget_tokens", labels.get("max_num_batched_tokens")),
        "chunked": labels.get("chunked_prefill") == "1",
        "engines": engines,
        "api_servers": capacity("max_batch", labels.get("api_servers")) or 1,
    }


async def _server_info(upstream: Upstream) -> dict[str, Any]:
    """vLLM's whole configuration, where it runs in development mode."""
    try:
        info = await upstream.get_json("/server_info?config_format=json", timeout_s=10.0)
    except OwnLimitError:
        raise
    except EngineError:
        return {}
    config = info.get("vllm_config") if isinstance(info, dict) else None
    scheduler = config.get("scheduler_config") if isinstance(config, dict) else None
    batch = capacity("max_batch", scheduler.get("max_num_seqs")) if isinstance(scheduler, dict) else None
    if batch is None or not isinstance(scheduler, dict):
        return {}
    return {
        "max_batch": batch,
        "prefill_budget_tokens": capacity("prefill_budget_tokens", scheduler.get("max_num_batched_tokens")),
        "chunked": scheduler.get("enable_chunked_prefill") is not False,
    }


async def _version(upstream: Upstream) -> str:
    try:
        answer = await upstream.get_json("/version")
    except EngineError:
        return ""
    version = answer.get("version") if isinstance(answer, dict) else None
    return version if isinstance(version, str) and _is_name(version) else ""
