"""From what was measured of a live engine to a profile's columns: every clock, watts, and the engine's capacities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from throttllem.core.types import EngineSpec
from throttllem.engines.base import Connected
from throttllem.gpu.device import Work
from throttllem.profiling.live.plan import LivePlan
from throttllem.profiling.live.run_profile import Device
from throttllem.profiling.profile import COLUMNS, LIVE, OPTIONAL, capacities_of

MODELLED, COUNTED = "modelled", "counted"


def described(connected: Connected, device: Device, plan: LivePlan) -> dict[str, object]:
    """What must be the same for a profile to be gone on with: engine, device, and how points are chosen."""
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
    }


def frame_of(points: Mapping[str, Sequence[Mapping[str, Any]]], spec: EngineSpec, device: Device) -> pl.DataFrame:
    """The profile of all points that were measured; rows of one point share its number."""
    rows = []
    for key, measured in points.items():
        number, _, clock = key.partition("@")
        for row in measured:
            clocks = [int(clock)] if clock else sorted(device.clocks_mhz)
            rows += [_row(int(number), mhz, row, spec, device) for mhz in clocks]
    wanted = {column.name: column.dtype for column in (*COLUMNS, *OPTIONAL, *LIVE)}
    return pl.DataFrame(rows, schema=wanted)


def _row(number: int, clock_mhz: int, row: Mapping[str, Any], spec: EngineSpec, device: Device) -> dict[str, object]:
    watts, by = row["watts"], COUNTED
    if device.modelled is not None:
        watts, by = device.modelled(clock_mhz, work_of(row, spec)), MODELLED
    kept = ("batch", "kv_blocks", "prefill_tokens", "seconds", "prompts", "prefill_pairs")
    return {
        "gpu": spec.gpu,
        "model": spec.model,
        "tp": spec.tp,
        "block_tokens": spec.block_tokens,
        "clock_mhz": clock_mhz,
        "watts": watts,
        **{name: row[name] for name in kept},
        **capacities_of(spec),
        "point": number,
        "seconds_by": row["by"],
        "watts_by": by,
        "any_clock": int(device.modelled is not None),
    }


def work_of(row: Mapping[str, Any], spec: EngineSpec) -> Work:
    """What a row's iteration did, for the model of its power: of each row's last block about half is filled."""
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
