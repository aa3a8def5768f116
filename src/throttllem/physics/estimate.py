"""One point of the law, for people: seconds and watts of an iteration, and how far each is to be believed."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from throttllem.physics.engine import EnginePhysics
from throttllem.physics.laws import Basis


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """An iteration without noise. `power_w` is of all GPUs of the engine.

    `basis` says of both figures "measured", "calibrated" or "modelled", a colon, and why.
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
        "iteration_s": _basis(physics.gpu.time_basis, physics, clock_mhz, batch),
        "power_w": _basis(physics.gpu.power_basis, physics, clock_mhz, batch),
    }
    return Estimate(iteration_s=iteration_s, power_w=power_w, basis=basis)


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


def _basis(basis: Basis, physics: EnginePhysics, clock_mhz: int, batch: int) -> str:
    """The law's own basis inside the range that it was fitted in, "modelled" and the reason outside."""
    outside = []
    if not basis.clock_min_mhz <= clock_mhz <= basis.clock_max_mhz:
        outside.append(f"{clock_mhz} MHz is outside {basis.clock_min_mhz} to {basis.clock_max_mhz} MHz")
    if batch > basis.batch_max:
        outside.append(f"batch {batch} is above {basis.batch_max}")
    if physics.tp not in basis.tp:
        outside.append(f"tp {physics.tp} is not among {', '.join(map(str, basis.tp))}")
    if basis.models and physics.model.name not in basis.models:
        outside.append(f"{physics.model.name} is not {' or '.join(basis.models)}")
    if basis.kind == "modelled" or not outside:
        return f"{basis.kind}: {basis.source}"
    return f"modelled: {'; '.join(outside)} ({basis.kind} there: {basis.source})"
