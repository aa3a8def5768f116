"""The facts of a TensorRT-LLM model on Triton, from its configuration and metrics, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from throttllem.core.types import EngineSpec
from throttllem.engines.base import RemoteOptions
from throttllem.engines.capacity import MOST_CONTEXT_TOKENS, MOST_COUNT, samples
from throttllem.engines.kinds import MOST_BATCH, MOST_KV_BLOCKS
from throttllem.engines.simulated.fleet import UNKNOWN

ENSEMBLE = frozenset(
    {"text_input", "max_tokens", "stream", "bad_words", "stop_words", "end_id", "pad_id", "top_k", "top_p", "seed"}
    | {"temperature", "length_penalty", "repetition_penalty", "min_tokens", "presence_penalty", "frequency_penalty"}
)
"""The inputs of the `ensemble` of NVIDIA's tensorrtllm_backend, assumed where Triton shows no configuration."""
_BLOCKS, _REQUESTS = "nv_trt_llm_kv_cache_block_metrics", "nv_trt_llm_request_metrics"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A model's configuration. None: not in it. `inputs` are the names that a request may carry."""

    inputs: frozenset[str] = ENSEMBLE
    max_batch: int | None = None
    no_evict: bool | None = None
    chunked: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """TensorRT-LLM's metrics. None: not on the page. `max_requests` is the largest batch."""

    kv_blocks: int | None = None
    block_tokens: int | None = None
    used_blocks: int | None = None
    active: int | None = None
    scheduled: int | None = None
    max_requests: int | None = None


def model_facts(config: Mapping[str, object]) -> ModelFacts:
    """The facts in what `/v2/models/{model}/config` answers."""
    inputs, batch = config.get("input"), config.get("max_batch_size")
    names = [entry.get("name") for entry in inputs if isinstance(entry, dict)] if isinstance(inputs, list) else []
    # A placeholder that was not filled in stands for the backend's default, which is not known here: None.
    policy, chunked = _parameter(config, "batch_scheduler_policy"), _parameter(config, "enable_chunked_context")
    return ModelFacts(
        inputs=frozenset(name for name in names if isinstance(name, str)) or ENSEMBLE,
        max_batch=batch if isinstance(batch, int) and batch > 0 else None,
        no_evict={"guaranteed_no_evict": True, "max_utilization": False}.get(policy),
        chunked={"true": True, "false": False}.get(chunked),
    )


def metrics(page: bytes) -> Metrics:
    """The numbers on a page of Triton's metrics, of its first TensorRT-LLM model."""
    blocks, requests = _values(page, _BLOCKS, "kv_cache_block_type"), _values(page, _REQUESTS, "request_type")
    return Metrics(
        kv_blocks=blocks.get("max"),
        block_tokens=blocks.get("tokens_per"),
        used_blocks=blocks.get("used"),
        active=requests.get("active"),
        scheduled=requests.get("scheduled"),
        max_requests=requests.get("max"),
    )


def engine_spec(
    spec: EngineSpec, options: RemoteOptions, facts: ModelFacts, measured: Metrics
) -> tuple[EngineSpec, list[str]]:
    """The engine as the core needs it, and notes on what was assumed.

    Metrics go before options, which go before the configuration (Triton's max_batch_size is near TensorRT-LLM's, but
    not the same), which goes before `spec`, the catalogue's engine. Where nothing gives the KV cache, it is unknown.
    """
    notes = []
    unknown, kv_blocks = spec.model == UNKNOWN, measured.kv_blocks or options.kv_blocks
    if unknown and kv_blocks is None:
        metrics_url, model, blocks = (options.flags(key) for key in ("metrics_url", "model", "kv_blocks"))
        notes.append(
            f"the server reports neither its model nor its KV cache: requests are admitted without checks of that, and "
            f"the clock stays at the maximum; give {metrics_url}, {model}, or {blocks}"
        )
        context, batch = options.max_context_tokens, measured.max_requests or options.max_batch or facts.max_batch
        capacities = {"kv_blocks": None, "max_context_tokens": context, "max_batch": batch}
        return (
            replace(
                spec,
                kv_blocks=MOST_KV_BLOCKS,
                block_tokens=1,
                max_batch=batch or MOST_BATCH,
                max_context_tokens=context or MOST_CONTEXT_TOKENS,
                chunked=bool(facts.chunked),
                no_evict=False,
                unknown=tuple(name for name, value in capacities.items() if value is None),
            ),
            notes,
        )
    max_batch = measured.max_requests or options.max_batch or facts.max_batch
    if max_batch is None:
        notes.append(f"a batch of {spec.max_batch} is assumed: give {options.flags('max_batch')}")
    elif not measured.max_requests and not options.max_batch:
        notes.append(f"a batch of max_batch_size = {max_batch} is assumed; if it differs: {options.flags('max_batch')}")
    block_tokens = measured.block_tokens or options.block_tokens or spec.block_tokens
    if kv_blocks is None:
        kv_blocks = spec.kv_blocks * spec.block_tokens // block_tokens
        notes.append(
            f"a KV cache of {kv_blocks} blocks of {block_tokens} tokens is assumed: give {options.flags('kv_blocks')}"
        )
    # The model's own limit is not known without the model; Triton refuses what is longer itself.
    context = options.max_context_tokens or (kv_blocks * block_tokens if unknown else spec.max_context_tokens)
    if options.max_context_tokens is None:
        notes.append(f"a context of {context} tokens is assumed: give {options.flags('max_context_tokens')}")
    known = replace(
        spec,
        kv_blocks=kv_blocks,
        block_tokens=block_tokens,
        max_batch=max_batch or spec.max_batch,
        max_context_tokens=context,
        chunked=bool(facts.chunked),
        no_evict=bool(facts.no_evict),
    )
    return known, notes


def _values(page: bytes, name: str, label: str) -> dict[str, int]:
    values: dict[str, int] = {}
    for sample in samples(page, name):
        if label in sample.labels and 0 <= sample.value <= MOST_COUNT:
            values.setdefault(sample.labels[label], round(sample.value))
    return values


def _parameter(config: Mapping[str, object], name: str) -> str:
    parameters = config.get("parameters")
    entry = parameters.get(name) if isinstance(parameters, dict) else None
    return str(entry.get("string_value", "")).lower() if isinstance(entry, dict) else ""
