"""How real engines batch when they are started without options: the presets of the simulated engine.

Some defaults depend on the GPU's memory. Knows nothing of models, nor of how an iteration is composed (`batcher`).
"""

# Sources, read on 2026-11-30.
# - vLLM 0.32, `vllm serve`: `EngineArgs.get_batch_defaults` (tokens and sequences by the GPU's memory, A100 apart),
#   `CacheConfig` (blocks), chunked prefill on; preemption by recomputation.
# - TensorRT-LLM 1.2, `trtllm-serve` with the PyTorch backend: `LlmArgs` (batch, tokens, no chunked prefill),
#   `KvCacheConfig` (blocks), GUARANTEED_NO_EVICT.
# - SGLang 0.5: `ServerArgs` (chunk by the GPU's memory, page of one token; running requests follow from the KV pool, at
#   least 2,048). Its iterations hold prompts or decoding requests, not both; the simulated engine mixes them, as with
#   SGLang's --enable-mixed-chunk.

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from throttllem.config import BatchingOptions
from throttllem.physics.catalogue import Gpu

_GIB = 2.0**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """The batching of one engine. `name`: the engine and the version whose defaults these are; `changed`: the options
    that were set instead. The other fields are those of `BatchingOptions`.
    """

    name: str
    block_tokens: int
    max_batch: int
    prefill_budget_tokens: int
    chunked: bool
    no_evict: bool = False
    changed: tuple[str, ...] = ()

    @property
    def described(self) -> str:
        """A phrase for people."""
        parts = [
            "chunked prefill" if self.chunked else "whole prompts",
            f"{self.prefill_budget_tokens:,} tokens an iteration",
            f"{self.max_batch:,} sequences",
            f"KV blocks of {self.block_tokens} token{'s' if self.block_tokens > 1 else ''}",
            "prompt + max_tokens reserved" if self.no_evict else "preemption when blocks run out",
        ]
        own = f"; set: {', '.join(self.changed)}" if self.changed else ""
        return f"{self.name} ({', '.join(parts)}{own})"


def batching(options: BatchingOptions, gpu: Gpu) -> Batching:
    """The preset of `options.engine` on this GPU, with the options that were set."""
    found = _PRESETS[options.engine](gpu)
    names = [item.name for item in fields(Batching) if item.name not in ("name", "changed")]
    chosen = {name: value for name in names if (value := getattr(options, name)) is not None}
    changed = tuple(name for name, value in chosen.items() if value != getattr(found, name))
    return replace(found, **chosen, changed=changed)


def _vllm(gpu: Gpu) -> Batching:
    tokens, sequences = 2048, 256
    if gpu.memory_bytes >= 160 * _GIB:
        tokens, sequences = 16384, 1024
    elif gpu.memory_bytes >= 70 * _GIB and "a100" not in gpu.name.lower():
        tokens, sequences = 8192, 1024
    return Batching(name="vLLM 0.32", block_tokens=16, max_batch=sequences, prefill_budget_tokens=tokens, chunked=True)


def _tensorrt_llm(_: Gpu) -> Batching:
    return Batching(
        name="TensorRT-LLM 1.2",
        block_tokens=32,
        max_batch=2048,
        prefill_budget_tokens=8192,
        chunked=False,
        no_evict=True,
    )


def _sglang(gpu: Gpu) -> Batching:
    limits = ((35, 2048), (60, 4096), (160, 8192))
    chunk = next((tokens for gib, tokens in limits if gpu.memory_bytes < gib * _GIB), 16384)
    return Batching(name="SGLang 0.5", block_tokens=1, max_batch=2048, prefill_budget_tokens=chunk, chunked=True)


_PRESETS = {"vllm": _vllm, "tensorrt-llm": _tensorrt_llm, "sglang": _sglang}
