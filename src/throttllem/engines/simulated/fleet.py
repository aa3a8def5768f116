"""The engines of one model on one kind of GPU, by size: specs and physics. Knows nothing of traces or policies."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from throttllem.config import BatchingOptions
from throttllem.core.types import EngineSpec
from throttllem.engines.simulated.presets import batching
from throttllem.physics.catalogue import Catalogue
from throttllem.physics.engine import EnginePhysics


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """One model on one kind of GPU, in several sizes (tensor parallel degrees)."""

    gpu: str
    model: str
    specs: dict[int, EngineSpec]
    physics: dict[int, EnginePhysics]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Ascending."""
        return tuple(sorted(self.specs))

    @property
    def clocks_mhz(self) -> tuple[int, ...]:
        """The clocks of every engine, ascending."""
        return self.specs[self.sizes[0]].clocks_mhz

    def fingerprint(self) -> str:
        """A hash of what these engines do: their specs, and the physics at sample points."""
        probes = [
            self.physics[tp].iteration(mhz, batch, batch * 500, prefill, prefill**2 / 2)
            for tp in self.sizes
            for mhz in (self.clocks_mhz[0], self.clocks_mhz[len(self.clocks_mhz) // 2], self.clocks_mhz[-1])
            for batch in (1, 16, 64)
            for prefill in (0, 1000)
        ]
        text = json.dumps([[asdict(self.specs[tp]) for tp in self.sizes], probes])
        return hashlib.sha256(text.encode()).hexdigest()


UNKNOWN = "unknown"
"""The name of a model that is neither configured nor recognised."""


def fleet_without_model(catalogue: Catalogue, gpu: str, sizes: tuple[int, ...], options: BatchingOptions) -> Fleet:
    """Engines of a model that is not known: without physics, and with capacities that bound nothing until the engine
    has reported its own.
    """
    the_gpu, rules = catalogue.gpu(gpu), batching(options, catalogue.gpu(gpu))
    specs = {
        tp: EngineSpec(
            gpu=gpu,
            model=UNKNOWN,
            tp=tp,
            kv_blocks=int(the_gpu.memory_bytes * tp),
            block_tokens=rules.block_tokens,
            max_batch=rules.max_batch,
            max_context_tokens=int(the_gpu.memory_bytes * tp),
            prefill_budget_tokens=rules.prefill_budget_tokens,
            chunked=rules.chunked,
            no_evict=rules.no_evict,
            clocks_mhz=the_gpu.clocks_mhz,
            idle_w=the_gpu.power.idle_w * tp,
            startup_s=the_gpu.startup_s,
        )
        for tp in sorted(set(sizes))
    }
    return Fleet(gpu=gpu, model=UNKNOWN, specs=specs, physics={})


def build_fleet(catalogue: Catalogue, gpu: str, model: str, sizes: tuple[int, ...], options: BatchingOptions) -> Fleet:
    """Engines of these sizes. Raises ValueError for unknown names, bad sizes, and a model that does not fit."""
    the_gpu, the_model = catalogue.gpu(gpu), catalogue.model(model).with_cache(options.kv_cache_dtype)
    physics = {tp: EnginePhysics(the_gpu, the_model, tp) for tp in sorted(set(sizes))}
    rules, specs = batching(options, the_gpu), {}
    for tp, engine in physics.items():
        specs[tp] = EngineSpec(
            gpu=gpu,
            model=model,
            tp=tp,
            kv_blocks=engine.kv_capacity_tokens() // rules.block_tokens,
            block_tokens=rules.block_tokens,
            max_batch=rules.max_batch,
            max_context_tokens=the_model.max_context_tokens,
            prefill_budget_tokens=rules.prefill_budget_tokens,
            chunked=rules.chunked,
            no_evict=rules.no_evict,
            clocks_mhz=the_gpu.clocks_mhz,
            idle_w=engine.idle_w(),
            startup_s=the_gpu.startup_s,
        )
    return Fleet(gpu=gpu, model=model, specs=specs, physics=physics)
