"""One point of the law: seconds and watts of an iteration, and whether each is measured, calibrated or modelled."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from throttllem.physics.engine import EnginePhysics
from throttllem.physics.laws import Basis, MeasuredPoints

NEAR = 0.1
"""A figure is called measured if a measured point is this close in clock, batch and context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """An iteration without noise. `power_w` is of all GPUs of the engine.

    `basis`: of both figures "measured", "calibrated" or "modelled", a colon, and the reason.
    """

    iteration_s: float
    power_w: float
    basis: dict[str, str]

    def to_json(self) -> dict[str, object]:
        """The contract's object."""
        return asdict(self)


def estimate(
    physics: EnginePhysics, clock_mhz: int, batch: int, context_tokens: int, prefill_tokens: int = 0
) -> Estimate:
    """`batch` running requests of `context_tokens` each, and one whole prompt of `prefill_tokens` beside them.

    Raises ValueError (value and range) for a clock off the grid, and for tokens that the engine cannot hold.
    """
    _check_clock(physics, clock_mhz)
    _check_tokens(physics, batch, context_tokens, prefill_tokens)
    pairs = prefill_tokens**2 / 2
    iteration_s, power_w = physics.iteration(clock_mhz, batch, batch * context_tokens, prefill_tokens, pairs)
    basis = {
        "iteration_s": _basis(physics.gpu.time_basis, physics, clock_mhz, batch, context_tokens, prefill_tokens),
        "power_w": _basis(physics.gpu.power_basis, physics, clock_mhz, batch, context_tokens, prefill_tokens),
    }
    return Estimate(iteration_s=iteration_s, power_w=power_w, basis=basis)


def reach(physics: EnginePhysics, context_tokens: int) -> dict[str, dict[str, object]]:
    """The basis of a simulation of this engine, of "seconds" and "watts", for requests of about `context_tokens`.

    `kind` of the law at the top clock, `why` if it is modelled; `clocks_mhz` [from, to] of its range; `below_top`: the
    part of the clock's effect that is modelled within that range. `error`: held out of the fit, at clocks below the top
    where those were fitted apart (median, relative; None: not known).
    """
    bases = {"seconds": physics.gpu.time_basis, "watts": physics.gpu.power_basis}
    return {figure: _reach(basis, physics, context_tokens) for figure, basis in bases.items()}


def _reach(basis: Basis, physics: EnginePhysics, context_tokens: int) -> dict[str, object]:
    at_top = _outside(basis, physics, basis.clock_max_mhz, 1, context_tokens, 0)
    below = [part for part in _outside(basis, physics, basis.clock_min_mhz, 1, context_tokens, 0) if part not in at_top]
    return {
        "kind": "modelled" if at_top else basis.kind,
        "why": "; ".join(at_top),
        "clocks_mhz": [basis.clock_min_mhz, basis.clock_max_mhz],
        "below_top": "; ".join(below),
        "error": None if at_top else _median_error(basis, physics, basis.clock_min_mhz),
    }


def _check_clock(physics: EnginePhysics, clock_mhz: int) -> None:
    gpu = physics.gpu
    if clock_mhz not in gpu.clocks_mhz:
        raise ValueError(
            f"clock {clock_mhz} MHz: {gpu.name} can be set to {gpu.clock_min_mhz} to {gpu.clock_max_mhz} MHz "
            f"in steps of {gpu.clock_step_mhz}"
        )


def _check_tokens(physics: EnginePhysics, batch: int, context_tokens: int, prefill_tokens: int) -> None:
    longest, capacity = physics.model.max_context_tokens, physics.kv_capacity_tokens()
    if batch < 1:
        raise ValueError(f"batch {batch}: must be 1 or more")
    if not 1 <= context_tokens <= longest:
        raise ValueError(f"context {context_tokens} tokens: {physics.model.name} holds 1 to {longest} per request")
    if not 0 <= prefill_tokens <= longest:
        raise ValueError(f"prefill {prefill_tokens} tokens: {physics.model.name} holds 0 to {longest} per request")
    held = batch * context_tokens + prefill_tokens
    if held > capacity:
        raise ValueError(
            f"batch {batch} x context {context_tokens} + prefill {prefill_tokens} = {held} tokens: the KV cache of "
            f"{physics.model.name} on {physics.tp} x {physics.gpu.name} holds 0 to {capacity}"
        )


def _basis(
    basis: Basis, physics: EnginePhysics, clock_mhz: int, batch: int, context_tokens: int, prefill_tokens: int
) -> str:
    """Measured, if a measured point is near; else the law's own basis within its range; else modelled, and why."""
    if not prefill_tokens:
        for points in basis.measured:
            if _measured(points, physics, clock_mhz, batch, context_tokens):
                return (
                    f"measured: a source lies within {NEAR:.0%} of this point, the figure is the law's: {points.source}"
                )
    outside = _outside(basis, physics, clock_mhz, batch, context_tokens, prefill_tokens)
    if basis.kind == "modelled" or not outside:
        off = _median_error(basis, physics, clock_mhz)
        error = "" if off is None else f"; held out, it was {off:.1%} off (median)"
        return f"{basis.kind}: {basis.source}{error}"
    return f"modelled: {'; '.join(outside)} ({basis.kind} there: {basis.source})"


def _median_error(basis: Basis, physics: EnginePhysics, clock_mhz: int) -> float | None:
    """The largest of those that were found apart: below the top clock, and of models with parts."""
    found = [basis.median_error]
    if basis.below_top and clock_mhz < physics.gpu.clock_max_mhz:
        found = [basis.below_top.median_error]
    if basis.parts and physics.model.parts:
        found.append(basis.parts.median_error)
    return max((each for each in found if each is not None), default=None)


def _measured(points: MeasuredPoints, physics: EnginePhysics, clock_mhz: int, batch: int, context_tokens: int) -> bool:
    if physics.model.name not in points.models or physics.tp not in points.tp:
        return False
    asked = ((clock_mhz, points.clocks_mhz), (batch, points.batches), (context_tokens, points.contexts_tokens))
    return all(not known or any(abs(value / each - 1) <= NEAR for each in known) for value, known in asked)


def _outside(
    basis: Basis, physics: EnginePhysics, clock_mhz: int, batch: int, context_tokens: int, prefill_tokens: int
) -> list[str]:
    """The parts of a point outside the range to which the law was fitted."""
    outside, model = [], physics.model
    if not basis.clock_min_mhz <= clock_mhz <= basis.clock_max_mhz:
        outside.append(f"{clock_mhz} MHz is outside {basis.clock_min_mhz} to {basis.clock_max_mhz} MHz")
    if batch > basis.batch_max:
        outside.append(f"batch {batch} is above {basis.batch_max}")
    if physics.tp not in basis.tp:
        outside.append(f"tp {physics.tp} is not among {', '.join(map(str, basis.tp))}")
    if basis.models and model.name not in basis.models:
        outside.append(f"{model.name} is not {' or '.join(basis.models)}")
    fitted = basis.parts.names if basis.parts else ()
    if not basis.models and (strange := [part for part in model.parts if part not in fitted]):
        outside.append(f"{model.name} has {' and '.join(strange)}, which were not fitted")
    if basis.context_max_tokens and context_tokens > basis.context_max_tokens:
        outside.append(f"context {context_tokens} is above {basis.context_max_tokens}")
    if basis.prefill_max_tokens is not None and prefill_tokens > basis.prefill_max_tokens:
        outside.append(f"prefill of {prefill_tokens} tokens is above {basis.prefill_max_tokens}")
    below = basis.below_top
    if below and clock_mhz < physics.gpu.clock_max_mhz:
        if physics.tp not in below.tp:
            outside.append(f"the clock's effect at tp {physics.tp} (fitted at {', '.join(map(str, below.tp))})")
        if below.models and model.name not in below.models:
            outside.append(f"the clock's effect on {model.name} (fitted on {', '.join(below.models)})")
        if context_tokens > below.context_max_tokens:
            outside.append(f"the clock's effect at context {context_tokens} (fitted up to {below.context_max_tokens})")
    return outside
