"""One run of `profile --url`: devices, the checkpoint, and the profile file that is written however the run ends.

Knows nothing of the command line; `say` receives sentences for the user.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl

from throttllem.core.types import EngineSpec
from throttllem.engines.base import Connected, EngineError, LiveEngine
from throttllem.engines.simulated.fleet import Fleet
from throttllem.files import ensure_writable_dir
from throttllem.gpu.boards.users import Place
from throttllem.gpu.device import ClockError, Work
from throttllem.gpu.hardware import HardwareGpu, Mode
from throttllem.gpu.setters import clock_setter
from throttllem.gpu.simulated import SimulatedGpu
from throttllem.physics.catalogue import Gpu
from throttllem.profiling.live.iterations import STEPS
from throttllem.profiling.live.load import ExternalLoadError
from throttllem.profiling.live.plan import POINTS, LivePlan
from throttllem.profiling.live.profiler import SWITCHES, Device, LiveProfiler, Progress, Rows, Summary
from throttllem.profiling.profile import COLUMNS, LIVE, OPTIONAL, capacities_of, write_profile
from throttllem.profiling.score import splits_of
from throttllem.profiling.train import FEWEST_ROWS

Say = Callable[[str], None]

CLOCKS = 8
QUICK_CLOCKS, QUICK_LOW, QUICK_APART = 4, 0.35, 0.12
"""Clocks of a quick profile; the lowest, and how far apart at least, as fractions of the top one."""
SCRAPE_S = 0.2
"""A live profile reads the engine's `/metrics` more often than a gateway does."""
MODELLED, COUNTED = "modelled", "counted"
SUFFIX = ".partial"


class LiveProfileError(ValueError):
    """A run that ended early; the message says how to continue."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be continued; the message says why and what to do."""


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

    However it ends, all measured points are in `out` and in the checkpoint beside it.
    """
    connected = await engine.connect()
    if connected.spec.unknown:
        raise EngineError(next(iter(connected.notes), "the engine's capacities are not known"), status=503)
    _introduce(connected, device, say)
    checkpoint = open_checkpoint(out, _identity(connected, device, plan), resume=resume)
    if checkpoint.points:
        say(f"continuing: {len(checkpoint.points)} points are measured already")
    profiler = LiveProfiler(engine, connected, device, plan, served_as=served_as)
    try:
        await profiler.run(checkpoint.points, checkpoint.add, progress)
    except (EngineError, ExternalLoadError, ClockError) as error:
        raise LiveProfileError(f"{error}; {_how_to_continue(checkpoint)}") from error
    except asyncio.CancelledError:
        say(_how_to_continue(checkpoint))
        raise
    finally:
        frame = _frame(checkpoint.points, connected.spec, device, quick=plan.quick)
        if frame.height:
            write_profile(frame, out)
        if not checkpoint.points:
            checkpoint.remove()
    _conclude(profiler.summary, say)
    measured = frame.height // len(device.clocks_mhz) if device.modelled is not None else frame.height
    if 0 < measured < FEWEST_ROWS and not plan.quick:
        say(f"only {measured} measured rows; `train` needs at least {FEWEST_ROWS}: measure again for longer")
    elif measured and not plan.quick and not splits_of(frame, seed=0):
        say(
            f"only {measured} measured rows: too few for `train` to hold any out, so nothing will show how far its "
            f"table is off; measure again for longer ({POINTS} points by default, a few minutes)"
        )
    if not frame.height:
        raise LiveProfileError("no point gave a row: did outputs end early, or do other clients use the engine?")
    checkpoint.remove()
    return frame.height


def _introduce(connected: Connected, device: Device, say: Say) -> None:
    spec, version = connected.spec, f" ({connected.version})" if connected.version else ""
    cache = f"{spec.kv_blocks} KV blocks of {spec.block_tokens} tokens, context {spec.max_context_tokens}"
    limits = f"batch {spec.max_batch}, {spec.prefill_budget_tokens} tokens a step"
    say(f"{', '.join(connected.models)}{version}: {limits}, {cache}")
    for note in connected.notes:
        say(f"note: {note}")
    if isinstance(device.gpu, HardwareGpu) and (found := device.gpu.placement) is not None:
        if found.place is Place.WRONG:
            raise LiveProfileError(f"--gpus: {found.text}; nothing was measured")
        if found.place is Place.UNKNOWN:
            say(f"note: {found.text}")
    if device.modelled is not None:
        say(
            f"watts modelled: the GPU is a simulated {spec.gpu} with {spec.model}, whose clock does not affect this "
            f"engine; seconds are measured once and stand for {', '.join(map(str, device.clocks_mhz))} MHz alike, so "
            "no clock can be chosen by them: to set clocks, or in a dry run, profile with --gpus"
        )


def _conclude(summary: Summary, say: Say) -> None:
    for note in summary.notes:
        say(f"note: {note}")
    say(
        "seconds are those of the engine's own steps"
        if summary.by == STEPS
        else "seconds are from the arrival of tokens: the engine reports no steps (for vLLM: install the plug-in)"
    )
    if summary.switches:
        count, within_s = (
            sum(each.count for each in summary.switches),
            max(each.within_s for each in summary.switches),
        )
        say(f"switches of clocks: {count} timed, nearly all within {1000 * within_s:.0f} ms")
    if summary.repeated:
        say(f"points measured again, because another client used the engine: {summary.repeated}")
    if summary.empty:
        say(f"points without a row, because outputs ended before all had begun: {summary.empty}")


# ---- devices and clocks ------------------------------------------------------------------------------------------


def live_device(
    fleet: Fleet, clocks_mhz: tuple[int, ...], gpus: tuple[str, ...] | None, keeper: Path, url: str
) -> Device:
    """The named GPUs, their clocks set through the keeper and their watts counted; without names simulated ones of the
    catalogue, whose watts are modelled.
    """
    if gpus is not None:
        setter = clock_setter(keeper=keeper)
        hardware = HardwareGpu(gpus, mode=Mode.ON, setter=setter, clocks_mhz=clocks_mhz, url=url)
        return Device(gpu=hardware, clocks_mhz=clocks_mhz)
    spec = engine_spec(fleet)
    physics = fleet.physics[spec.tp]

    def watts(mhz: int, work: Work) -> float:
        load = (work.decode_sequences, work.kv_tokens, work.prefill_tokens, work.prefill_pairs)
        return physics.iteration(mhz, *load)[1]

    gpu = SimulatedGpu(spec.clocks_mhz, switch_latency_s=0.0, watts=watts, idle_w=spec.idle_w)
    return Device(gpu=gpu, clocks_mhz=clocks_mhz, modelled=watts)


def engine_spec(fleet: Fleet) -> EngineSpec:
    """The catalogue's spec of the live engine. Raises ValueError for several sizes."""
    if len(fleet.sizes) != 1:
        raise ValueError("--url: one engine has one size; give --tp")
    return fleet.specs[fleet.sizes[0]]


def chosen_clocks(available: Sequence[int], text: str | None) -> tuple[int, ...]:
    """The clocks to profile: those of `--clocks`, else up to CLOCKS spread over all. Raises ValueError."""
    ladder = sorted(available)
    if text is None:
        steps = min(CLOCKS, len(ladder)) - 1
        places = {round(step * (len(ladder) - 1) / max(1, steps)) for step in range(steps + 1)} | {len(ladder) - 1}
        return tuple(ladder[place] for place in sorted(places))
    try:
        clocks = {int(clock) for clock in text.split(",")}
    except ValueError:
        raise ValueError(f"--clocks {text}: must be MHz with commas between, as in 1410,1050") from None
    for clock in sorted(clocks - set(ladder)):
        nearest = min(ladder, key=lambda each: abs(each - clock))
        raise ValueError(f"--clocks {clock}: this GPU has no such clock; the nearest is {nearest}")
    if ladder[-1] not in clocks:
        raise ValueError(
            f"--clocks {text}: the top clock, {ladder[-1]}, must be among them: the controller uses it whenever it has "
            "no prediction, and no table can be made without it"
        )
    return tuple(sorted(clocks))


def quick_clocks(gpu: Gpu) -> tuple[int, ...]:
    """The clocks of a quick profile: the top, a low one, and two between, where a GPU of this kind has its knees.

    Where a knee is near another clock or below the low one, the widest gap is halved instead. Below the low clock time
    rises as the clock falls and watts hardly fall, so a saving there is rare (docs/evaluation/quick.md).
    """
    top = gpu.clock_max_mhz
    found = [QUICK_LOW * top, float(top)]
    for knee in (gpu.time.memory_knee_mhz, gpu.power.knee_mhz):
        if found[0] < knee and all(abs(knee - each) >= QUICK_APART * top for each in found):
            found.append(knee)
    while len(found) < QUICK_CLOCKS:
        _, low, high = max((high - low, low, high) for low, high in pairwise(sorted(found)))
        found.append((low + high) / 2)
    return tuple(sorted({min(gpu.clocks_mhz, key=lambda mhz: abs(mhz - each)) for each in found}))


# ---- the profile file --------------------------------------------------------------------------------------------


def _identity(connected: Connected, device: Device, plan: LivePlan) -> dict[str, object]:
    """What must be the same for a run to be continued: the engine, the device, and how points are chosen."""
    spec = connected.spec
    return {
        "gpu": spec.gpu,
        "model": spec.model,
        "tp": spec.tp,
        "models": list(connected.models),
        "version": connected.version,
        "block_tokens": spec.block_tokens,
        **capacities_of(spec),
        "chunked": spec.chunked,
        "no_evict": spec.no_evict,
        "clocks_mhz": list(device.clocks_mhz),
        "watts": MODELLED if device.modelled is not None else COUNTED,
        "steps": plan.steps,
        "bursts": plan.bursts,
        "seed": plan.seed,
        **({"quick": True} if plan.quick else {}),
    }


def _frame(points: Mapping[str, Rows], spec: EngineSpec, device: Device, *, quick: bool) -> pl.DataFrame:
    """The profile of all measured points. Without a clock in its key, a point stands for every clock."""
    rows, switches = [], {int(str(each["mhz"])): each for each in points.get(SWITCHES, ())}
    for key, measured in points.items():
        if key == SWITCHES:
            continue
        number, _, clock = key.partition("@")
        for row in measured:
            clocks = [int(clock)] if clock else sorted(device.clocks_mhz)
            rows += [_row(int(number), mhz, row, spec, device) | _timed(switches.get(mhz)) for mhz in clocks]
    frame = pl.DataFrame(rows, schema={column.name: column.dtype for column in (*COLUMNS, *OPTIONAL, *LIVE[:-1])})
    return frame.with_columns(quick=pl.lit(int(quick), dtype=pl.Int64))


def _timed(switches: Mapping[str, object] | None) -> dict[str, object]:
    return (
        {"switches": 0, "switch_s": 0.0}
        if switches is None
        else {"switches": switches["count"], "switch_s": switches["within_s"]}
    )


def _row(number: int, clock_mhz: int, row: Mapping[str, Any], spec: EngineSpec, device: Device) -> dict[str, object]:
    modelled = device.modelled
    columns = ("batch", "kv_blocks", "prefill_tokens", "seconds", "prompts", "prefill_pairs")
    return {
        "gpu": spec.gpu,
        "model": spec.model,
        "tp": spec.tp,
        "block_tokens": spec.block_tokens,
        "clock_mhz": clock_mhz,
        "watts": row["watts"] if modelled is None else modelled(clock_mhz, _work(row, spec)),
        **{name: row[name] for name in columns},
        **capacities_of(spec),
        "point": number,
        "seconds_by": row["by"],
        "watts_by": COUNTED if modelled is None else MODELLED,
        "any_clock": int(modelled is not None),
        "tokens_per_step": row.get("tokens_per_step", 1.0),
    }


def _work(row: Mapping[str, Any], spec: EngineSpec) -> Work:
    """The work of a row's iteration, for the model of its power: about half of each sequence's last block is filled."""
    decode_sequences = row["batch"] - row["prompts"]
    prompt_blocks = -(-row["prefill_tokens"] // spec.block_tokens)
    tokens = (row["kv_blocks"] - prompt_blocks) * spec.block_tokens - decode_sequences * (spec.block_tokens - 1) // 2
    return Work(
        seconds=row["seconds"],
        decode_sequences=decode_sequences,
        kv_tokens=max(decode_sequences, tokens) if decode_sequences else 0,
        prefill_tokens=row["prefill_tokens"],
        prefill_pairs=row["prefill_pairs"],
    )


# ---- the checkpoint ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Checkpoint:
    """The measured points by key, in order, on disk after every point: JSON lines beside the profile's file.

    The first line is the run's identity; a last line cut short by a crash is dropped.
    """

    path: Path
    points: dict[str, Rows] = field(default_factory=dict)

    def add(self, key: str, rows: Rows) -> None:
        """One more point, on disk when this returns."""
        self.points[key] = rows
        _append(self.path, {"point": key, "rows": rows})

    def remove(self) -> None:
        """Everything is measured, or nothing: there is nothing to continue."""
        self.path.unlink(missing_ok=True)


def open_checkpoint(out: Path, identity: Mapping[str, object], *, resume: bool) -> Checkpoint:
    """A new checkpoint, or with `resume` the one beside `out`. Raises CheckpointError."""
    path = checkpoint_of(out)
    ensure_writable_dir(path.absolute().parent)
    wanted = json.loads(json.dumps(identity))
    if not path.exists():
        if resume:
            raise CheckpointError(f"--resume: there is no {path} to continue")
        _append(path, {"of": wanted})
        return Checkpoint(path)
    if not resume:
        raise CheckpointError(f"{path} exists: --resume continues it; remove it to begin again")
    return _resumed(path, wanted)


def checkpoint_of(out: Path) -> Path:
    """The checkpoint's path beside a profile."""
    return out.with_name(out.name + SUFFIX)


def _resumed(path: Path, wanted: dict[str, object]) -> Checkpoint:
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    try:
        first, *lines = (json.loads(line) for line in whole.splitlines())
        there = dict(first["of"])
        points = {str(line["point"]): list(line["rows"]) for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is not a checkpoint of a profile; remove it to begin again") from error
    different = [
        f"{name} {there.get(name)!r} there, {wanted.get(name)!r} now"
        for name in sorted(there.keys() | wanted.keys())
        if there.get(name) != wanted.get(name)
    ]
    if different:
        raise CheckpointError(f"{path}: is of another engine or plan: {'; '.join(different)}")
    if len(whole) < len(text):
        os.truncate(path, len(whole))
    return Checkpoint(path, points)


def _append(path: Path, line: Mapping[str, object]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, separators=(",", ":")) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _how_to_continue(checkpoint: Checkpoint) -> str:
    if not checkpoint.points:
        return "nothing was measured"
    return f"{len(checkpoint.points)} points are saved in {checkpoint.path}: the same command with --resume continues"
