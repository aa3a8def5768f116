"""Makes the engine that fits the options of a remote one: the kinds, and the class of each."""

from __future__ import annotations

from typing import get_args

from throttllem.core.types import EngineSpec
from throttllem.engines.base import Kind, RemoteOptions
from throttllem.engines.openai import OpenaiEngine
from throttllem.engines.triton.engine import TritonEngine

KINDS: tuple[Kind, ...] = get_args(Kind)


def remote_engine(options: RemoteOptions, spec: EngineSpec) -> OpenaiEngine | TritonEngine:
    """The engine, not reached yet. `spec` is the catalogue's: its GPU, model, size and clocks, and defaults."""
    return TritonEngine(options, spec) if options.kind == "triton" else OpenaiEngine(options, spec)
