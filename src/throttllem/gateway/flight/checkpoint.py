"""A controller as JSON and back: its options, its state, and the names of its performance tables.

Tables are large and shared, so they are in files apart, named by a digest of their contents. Knows nothing
of files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import cast

from throttllem.core.controller import Controller
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.forecast.table_drift import LEAST_FACTOR, MOST_FACTOR, tolerance
from throttllem.core.forecast.token_rate import MOST_TOKENS_PER_STEP
from throttllem.core.options import ControllerOptions
from throttllem.core.state import ControllerState
from throttllem.gateway.flight import wire
from throttllem.profiling.storage import ARRAYS, TableFileError

_NAME = re.compile(r"([0-9a-f]{16})(?:@(\d{1,5}))?(?:\*([0-9.,]{1,120}))?(?:~([0-9.]{1,20}))?")


class CheckpointError(ValueError):
    """A controller that cannot be recorded, or JSON that holds none of this build; the message says why."""


def table_digest(table: PerformanceTable) -> str:
    """16 hex digits over everything that decisions take from a table."""
    clocks, hull = [int(mhz) for mhz in table.clocks_mhz], {name: int(n) for name, n in asdict(table.hull).items()}
    digest = hashlib.sha256(repr((clocks, hull, tolerance(table))).encode())
    if table.switches:
        digest.update(repr(table.switches).encode())
    for name in ARRAYS:
        part = getattr(table, name)
        digest.update(repr((name, part.dtype.str, part.shape)).encode())
        digest.update(part.tobytes())
    return digest.hexdigest()[:16]


def save(controller: Controller, digest_of: Callable[[PerformanceTable], str]) -> dict[str, object]:
    """`options`, `predictor` and `state` of a controller, plain and nothing of it shared with the controller.

    A table is its digest; one that is held down by a limit is "digest@MHz" of the whole one, one whose clock bands are
    corrected "digest*FACTOR,...", one of an engine that speculates "digest~TOKENS" a step. Raises CheckpointError.
    """

    def name(table: PerformanceTable) -> str:
        limit = "" if table.limit_mhz is None else f"@{table.limit_mhz}"
        factors = f"*{','.join(map(repr, table.factors))}" if table.factors else ""
        rate = "" if table.tokens_per_step == 1.0 else f"~{table.tokens_per_step!r}"
        return digest_of(table.base or table) + limit + factors + rate

    try:
        options = wire.plain(controller.options, name)
        predictor = options.pop("predictor")
        return {"options": options, "predictor": predictor, "state": wire.plain(controller.state(), name)}
    except wire.WireError as error:
        raise CheckpointError(f"the controller cannot be recorded: {error}") from error


def _factors(text: str, table: PerformanceTable) -> tuple[float, ...]:
    found = tuple(float(factor) for factor in text.split(","))
    bounded = all(LEAST_FACTOR <= factor <= MOST_FACTOR for factor in found)
    if not bounded or len(found) != len(table.bands()):
        raise CheckpointError(f"the checkpoint corrects a table by {text[:40]!r}, which are no factors of its bands")
    return found


def _rate(text: str) -> float:
    rate = float(text)
    if not 1.0 <= rate <= MOST_TOKENS_PER_STEP:
        raise CheckpointError(
            f"the checkpoint has a table for {text} tokens a step: 1 to {MOST_TOKENS_PER_STEP:g} can be"
        )
    return rate


def load(data: Mapping[str, object], table: Callable[[str], PerformanceTable]) -> Controller:
    """The controller that `save` wrote; `table` finds a performance table by its digest.

    Raises CheckpointError for anything else; a TableFileError of `table` passes unchanged.
    """
    found: dict[str, PerformanceTable] = {}

    def tables(name: str) -> PerformanceTable:
        match = _NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(f"the checkpoint names a table {name[:40]!r}, which is no digest")
        digest, limit_mhz, factors, rate = match.groups()
        if digest not in found:
            found[digest] = table(digest)
        held = found[digest].capped(None if limit_mhz is None else int(limit_mhz))
        held = held if factors is None else held.corrected(_factors(factors, held))
        return held if rate is None else held.at_rate(_rate(rate))

    try:
        written = {**cast(dict[str, object], data["options"]), "predictor": data["predictor"]}
        options = wire.built(ControllerOptions, written, "options", tables)
        state = wire.built(ControllerState, data["state"], "state", tables)
        return Controller.from_state(options, state)
    except (CheckpointError, TableFileError):
        raise
    except Exception as error:  # values that make no sense together can fail anywhere
        why = str(error) if isinstance(error, wire.WireError) else repr(error)
        raise CheckpointError(f"the checkpoint is damaged, or of another build: {why}") from error
