"""What a Triton server says of a TensorRT-LLM model: its configuration and its metrics, read into plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from throttllem.core.types import EngineSpec
from throttllem.engines.prometheus import samples
from throttllem.engines.triton.api import ENSEMBLE

BLOCKS, REQUESTS = "nv_trt_llm_kv_cache_block_metrics", "nv_trt_llm_request_metrics"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A model's configuration. None: it does not say. `inputs` are the names that a request may carry."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a user says of an engine that cannot tell; None: nothing."""

    max_batch: int | None = None
    max_context_tokens: int | None = None
    kv_blocks: int | None = None
    block_tokens: int | None = None
    no_evict: bool | None = None


def model_facts(config: Mapping[str, object]) -> ModelFacts:
    """From what `/v2/models/{model}/config` answers."""
    inputs = config.get("input")
    names = [entry.get("name") for entry in inputs if isinstance(entry, dict)] if isinstance(inputs, list) else []
    batch = config.get("max_batch_size")
    policy = _parameter(config, "batch_scheduler_policy")
    chunked = _parameter(config, "enable_chunked_context")
    return ModelFacts(
        inputs=frozenset(name for name in names if isinstance(name, str)) or ENSEMBLE,
        max_batch=batch if isinstance(batch, int) and batch > 0 else None,
        # A template that nobody filled in stands for the backend's default, which this is not the place to know.
        no_evict={"guaranteed_no_evict": True, "max_utilization": False}.get(policy),
        chunked={"true": True, "false": False}.get(chunked),
    )


def metrics(page: bytes) -> Metrics:
    """From a page of Triton's metrics. One TensorRT-LLM model per server is read: the first."""
    blocks, requests = _values(page, BLOCKS, "kv_cache_block_type"), _values(page, REQUESTS, "request_type")
    return Metrics(
        kv_blocks=blocks.get("max"),
        block_tokens=blocks.get("tokens_per"),
        used_blocks=blocks.get("used"),
        active=requests.get("active"),
        scheduled=requests.get("scheduled"),
        max_requests=requests.get("max"),
    )


def capacities(spec: EngineSpec, given: Given, facts: ModelFacts, measured: Metrics) -> tuple[EngineSpec, list[str]]:
    """The engine as the core must know it, and notes on what was assumed.

    What the engine measures goes before what a user gave, which goes before what its configuration says (Triton's
    max_batch_size is not TensorRT-LLM's, only near it), which goes before `spec`, the catalogue's engine.
    """
    notes = []
    max_batch = measured.max_requests or given.max_batch or facts.max_batch
    if max_batch is None:
        notes.append(f"the batch is taken to hold {spec.max_batch}: set engines.max_batch")
    elif max_batch == facts.max_batch and not measured.max_requests and not given.max_batch:
        notes.append(f"the batch is taken to hold max_batch_size = {max_batch}: set engines.max_batch if it differs")
    block_tokens = measured.block_tokens or given.block_tokens or spec.block_tokens
    kv_blocks = measured.kv_blocks or given.kv_blocks
    if kv_blocks is None:
        kv_blocks = spec.kv_blocks * spec.block_tokens // block_tokens
        notes.append(
            f"the KV cache is taken to hold {kv_blocks} blocks of {block_tokens} tokens: set engines.kv_blocks"
        )
    if given.max_context_tokens is None:
        notes.append(f"the context is taken to hold {spec.max_context_tokens} tokens: set engines.max_context_tokens")
    no_evict = facts.no_evict if given.no_evict is None else given.no_evict
    known = replace(
        spec,
        kv_blocks=kv_blocks,
        block_tokens=block_tokens,
        max_batch=max_batch or spec.max_batch,
        max_context_tokens=given.max_context_tokens or spec.max_context_tokens,
        chunked=bool(facts.chunked),
        no_evict=bool(no_evict),
    )
    return known, notes


def _values(page: bytes, name: str, label: str) -> dict[str, int]:
    values: dict[str, int] = {}
    for sample in samples(page, name):
        if label in sample.labels:
            values.setdefault(sample.labels[label], round(sample.value))
    return values


def _parameter(config: Mapping[str, object], name: str) -> str:
    parameters = config.get("parameters")
    entry = parameters.get(name) if isinstance(parameters, dict) else None
    return str(entry.get("string_value", "")).lower() if isinstance(entry, dict) else ""
