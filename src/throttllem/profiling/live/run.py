"""One run of `profile --url`: reach the engine, go on where it ended, keep what was measured whatever happens.

Knows nothing of the command line; `say` gets sentences for people.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from throttllem.engines.base import Connected, EngineError, LiveEngine
from throttllem.gpu.device import ClockError
from throttllem.profiling.live.checkpoint import Checkpoint, open_checkpoint
from throttllem.profiling.live.frame import described, frame_of
from throttllem.profiling.live.plan import LivePlan
from throttllem.profiling.live.rig import ForeignError
from throttllem.profiling.live.rows import STEPS
from throttllem.profiling.live.run_profile import Device, LiveProfiler, Progress
from throttllem.profiling.profile import write_profile
from throttllem.profiling.train import FEWEST_ROWS

Say = Callable[[str], None]

CLOCKS = 8


class LiveProfileError(ValueError):
    """A run that ended early, and how to go on."""


def chosen_clocks(there: Sequence[int], wanted: Sequence[int] | None) -> tuple[int, ...]:
    """The clocks to profile: those wanted, else some spread over all. Raises ValueError for what cannot be used."""
    ladder = sorted(there)
    if wanted is None:
        steps = min(CLOCKS, len(ladder)) - 1
        places = {round(step * (len(ladder) - 1) / max(1, steps)) for step in range(steps + 1)} | {len(ladder) - 1}
        return tuple(ladder[place] for place in sorted(places))
    for clock in wanted:
        if clock not in ladder:
            nearest = min(ladder, key=lambda each: abs(each - clock))
            raise ValueError(f"--clocks {clock}: this GPU has no such clock; the nearest is {nearest}")
    if ladder[-1] not in wanted:
        raise ValueError(
            f"--clocks {','.join(str(clock) for clock in wanted)}: the top clock, {ladder[-1]}, must be among them: it "
            "is where the controller goes when in doubt, and no table can be made without it"
        )
    return tuple(sorted(set(wanted)))


async def profile_live(
    engine: LiveEngine,
    device: Device,
    plan: LivePlan,
    out: Path,
    *,
    resume: bool = False,
    served_as: str | None = None,
    say: Say = lambda _: None,
    progress: Progress = lambda *_: None,
) -> int:
    """Profile into `out`; returns its rows. Raises LiveProfileError if it ended early, CheckpointError, EngineError.

    Whatever ends it, what was measured is in `out` and in the checkpoint beside it.
    """
    connected = await engine.connect()
    _greet(connected, device, say)
    checkpoint = open_checkpoint(out, described(connected, device, plan), resume=resume)
    if checkpoint.points:
        say(f"going on: {len(checkpoint.points)} points are measured already")
    profiler = LiveProfiler(engine, connected, device, plan, served_as=served_as)
    try:
        await profiler.run(checkpoint, progress)
    except (EngineError, ForeignError, ClockError) as error:
        raise LiveProfileError(f"{error}; {_kept(checkpoint)}") from error
    except asyncio.CancelledError:
        say(_kept(checkpoint))
        raise
    finally:
        rows = _write(checkpoint, connected, device, out)
        if not checkpoint.points:  # nothing to go on with: the next try must not be told that there is
            checkpoint.done()
    _sum_up(profiler, say)
    measured = rows // len(device.clocks_mhz) if device.modelled is not None else rows
    if 0 < measured < FEWEST_ROWS:
        say(f"only {measured} measured rows; `train` takes {FEWEST_ROWS} at least: measure anew for longer")
    if not rows:
        raise LiveProfileError("no point gave a row: were answers ended early, or the engine used by others?")
    checkpoint.done()
    return rows


def _greet(connected: Connected, device: Device, say: Say) -> None:
    spec, version = connected.spec, f" ({connected.version})" if connected.version else ""
    cache = f"{spec.kv_blocks} KV blocks of {spec.block_tokens} tokens, context {spec.max_context_tokens}"
    limits = f"batch {spec.max_batch}, {spec.prefill_budget_tokens} tokens a step"
    say(f"{', '.join(connected.models)}{version}: {limits}, {cache}")
    for note in connected.notes:
        say(f"note: {note}")
    if device.modelled is not None:
        say(
            f"watts modelled: the GPU is a simulated {spec.gpu} with {spec.model}, whose clock does not change this "
            f"engine's speed; seconds are measured once and stand for all of {_listed(device.clocks_mhz)} MHz, so no "
            "clock can be chosen by them: to set or advise clocks, profile with --gpus"
        )


def _sum_up(profiler: LiveProfiler, say: Say) -> None:
    told = profiler.told
    for note in told.notes:
        say(f"note: {note}")
    say(
        "seconds are those of the engine's own steps"
        if told.by == STEPS
        else "seconds are from the arrival of tokens: the engine tells no steps (for vLLM: install the plug-in)"
    )
    if told.thrown_away:
        say(f"points thrown away, as somebody else used the engine meanwhile: {told.thrown_away}")
    if told.empty:
        say(f"points that gave no row, as answers ended before all had begun: {told.empty}")


def _write(checkpoint: Checkpoint, connected: Connected, device: Device, out: Path) -> int:
    frame = frame_of(checkpoint.points, connected.spec, device)
    if frame.height:
        write_profile(frame, out)
    return frame.height


def _kept(checkpoint: Checkpoint) -> str:
    if not checkpoint.points:
        return "nothing was measured"
    return f"{len(checkpoint.points)} points are kept in {checkpoint.path}: the same command with --resume goes on"


def _listed(clocks: Sequence[int]) -> str:
    return ", ".join(str(clock) for clock in clocks)
