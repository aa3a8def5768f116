"""The model that one engine serves: configured, or what the engine reports when it is reached; and its physics.

The physics models the watts of GPUs that are not named. Where the model is not known there is none, and no figure.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from throttllem.engines.base import Connected
from throttllem.gpu.device import Work
from throttllem.physics.catalogue import Catalogue
from throttllem.physics.engine import EnginePhysics, ModelDoesNotFit
from throttllem.physics.huggingface import ConfigError
from throttllem.physics.model import Model

log = logging.getLogger("throttllem.gateway")


@dataclass(slots=True, kw_only=True)
class EngineModel:
    """`configured` None: the engine is asked. `name` and `physics` None: not known (yet). `notes` are for people.

    One writer: the backend, each time that it has reached the engine.
    """

    catalogue: Catalogue
    gpu: str
    tp: int
    configured: str | None = None
    name: str | None = None
    physics: EnginePhysics | None = None
    profiled: Model | None = None
    """That of the engine's table, where clocks are set by it."""
    notes: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        """Whether watts can be modelled."""
        return self.physics is not None

    def watts(self, mhz: int, work: Work) -> float:
        """Watts of all GPUs during that work; 0 while the model is not known, which `known` tells."""
        if self.physics is None:
            return 0.0
        load = (work.decode_sequences, work.kv_tokens, work.prefill_tokens, work.prefill_pairs)
        return self.physics.iteration(mhz, *load)[1]

    def refused(self, connected: Connected) -> str | None:
        """Why no clock may be set for an engine that reports this: its table is of another model; None: it may."""
        if self.profiled is None or self.configured is not None:
            return None
        try:
            found = self.catalogue.reported((*connected.roots, *connected.models))
        except ConfigError:  # `reached` tells it
            return None
        difference = found and of_another_model(self.profiled, found)
        return f"its performance table {difference}; until then, --clocks dry-run or off" if difference else None

    def reached(self, connected: Connected) -> None:
        """The engine has reported what it is."""
        served = ", ".join(dict.fromkeys((*connected.roots, *connected.models)))
        try:
            found = self.catalogue.reported((*connected.roots, *connected.models))
            if self.configured is not None:
                own = self.catalogue.model(self.configured)
                if found is not None and found.name != own.name and not found.same_figures(own):
                    self._say(f"the engine serves {served}, and engines.model says {self.configured}: correct it")
                else:
                    self.notes = ()
                return
            if found is None:
                self._unknown(f"the engine serves {served}, whose figures are not known")
                return
            model = found.with_cache(connected.kv_cache_dtype)
            self.physics = EnginePhysics(self.catalogue.gpu(self.gpu), model, self.tp)
            self.name, self.notes = found.name, ()
        except (ConfigError, ModelDoesNotFit) as error:
            self._unknown(f"the engine serves {served}: {error}")

    def _unknown(self, why: str) -> None:
        self.name = self.physics = None
        self._say(f"{why}: watts and joules of GPUs that are not named are unknown; set engines.N.model (--model)")

    def _say(self, note: str) -> None:
        if self.notes != (note,):
            log.warning("%s", note)
        self.notes = (note,)


def of_another_model(profiled: Model, model: Model) -> str | None:
    """What is wrong with a table of `profiled` for an engine of `model`; None: nothing. Variants of one model that
    differ in number formats, vocabulary or context alone pass: an engine's name often hides them.
    """
    if profiled.same_architecture(model):
        return None
    return (
        f"was learned with {profiled.name} ({profiled.described}), and the engine's model is {model.name} "
        f"({model.described}): profile and train with {model.name}"
    )
