"""An engine that runs somewhere else, from what a user says of it: address, kind, and what it does not tell itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from throttllem.core.types import EngineSpec
from throttllem.engines.openai import OpenaiEngine
from throttllem.engines.triton.engine import TritonEngine
from throttllem.engines.triton.facts import Given

Kind = Literal["openai", "triton"]
KINDS: tuple[Kind, ...] = ("openai", "triton")


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """Where an engine is and how it is spoken to. The numbers stand in for what it does not tell.

    `served_as`: the model's name there (Triton). `stats`: where vLLM's plug-in sends its steps. `scrape_s`: how often
    an OpenAI engine's `/metrics` is looked at.
    """

    url: str
    kind: Kind
    served_as: str | None = None
    stats: str | None = None
    tokenizer: Path | None = None
    metrics_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    max_batch: int | None = None
    max_context_tokens: int | None = None
    kv_blocks: int | None = None
    block_tokens: int | None = None
    scrape_s: float = 0.5

    def engine(self, spec: EngineSpec) -> OpenaiEngine | TritonEngine:
        """The engine, not reached yet; `spec` says what it is taken for."""
        tokenizer = self.tokenizer.expanduser() if self.tokenizer else None
        if self.kind == "triton":
            return TritonEngine(
                self.url,
                spec,
                model=self.served_as,
                given=Given(
                    max_batch=self.max_batch,
                    max_context_tokens=self.max_context_tokens,
                    kv_blocks=self.kv_blocks,
                    block_tokens=self.block_tokens,
                ),
                tokenizer=tokenizer,
                metrics_url=self.metrics_url,
                api_key=self.api_key,
            )
        return OpenaiEngine(
            url=self.url,
            gpu=spec.gpu,
            model=spec.model,
            tp=spec.tp,
            clocks_mhz=spec.clocks_mhz,
            idle_w=spec.idle_w,
            max_batch=self.max_batch,
            max_context_tokens=self.max_context_tokens,
            kv_blocks=self.kv_blocks,
            block_tokens=self.block_tokens,
            tokenizer=tokenizer,
            stats=self.stats,
            api_key=self.api_key,
            scrape_s=self.scrape_s,
        )
