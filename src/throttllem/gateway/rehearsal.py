"""A rehearsal before the gateway is ready: the core's compiled loops run once, so that no request waits for a compiler.

Loops that were compiled before are loaded from disk. Knows nothing of the gateway's own controller.
"""

from __future__ import annotations

from dataclasses import replace

from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.controller import Controller
from throttllem.core.lengths.prediction import Oracle
from throttllem.core.options import ControllerOptions
from throttllem.core.types import Arrived, EngineReady, EngineSpec, Event, Request, Slo, Stepped, Timer

_MOST_TOKENS = 400
_AT_A_TIME = 4
_E2E_S = tuple(600.0 / 2**halvings for halvings in range(12))
"""On any engine from loose ones over one that binds the clock to one that is late; enough requests to know the load."""


def rehearse(options: ControllerOptions) -> None:
    """Decide on some requests with the tables of `options`, in a controller that is thrown away."""
    throttle = replace(options.throttle, policy=ClockPolicy.LEAST_ENERGY)
    alone = replace(options, throttle=throttle, slo_aware=True, autoscale=None, predictor=Oracle())
    for tp in options.tables.keys() & options.specs.keys():
        _decide(Controller(alone), options.specs[tp])


def _decide(controller: Controller, spec: EngineSpec) -> None:
    """Requests come and begin, one a second, each with half the deadline of the one before; four run at a time."""
    now_s = 1.0
    fits = min(spec.max_context_tokens, spec.kv_blocks * spec.block_tokens) // (4 * _AT_A_TIME)
    tokens = max(1, min(_MOST_TOKENS, fits))

    def handle(event: Event) -> None:
        controller.handle(event, now_s)
        controller.handle(Timer(), now_s)

    handle(EngineReady(engine=0, spec=spec))
    for index, e2e_s in enumerate(_E2E_S):
        request = Request(
            id=index,
            arrival_s=now_s,
            prompt_tokens=tokens,
            max_tokens=tokens,
            output_tokens=tokens,
            slo=Slo(e2e_s=e2e_s, tbt_s=60.0, ttft_s=60.0),
        )
        handle(Arrived(request=request))
        now_s += 1.0
        ended = (index - _AT_A_TIME,) if index >= _AT_A_TIME else ()
        handle(Stepped(engine=0, iteration=index, started=(index,), finished=ended))
