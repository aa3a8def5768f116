"""The profile: one row per measured iteration, in a file of any engine (docs/profile-format.md).

Reads, validates (errors name file, row and column) and writes it. Knows nothing of how iterations are measured.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from throttllem.core.forecast.performance_table import MOST_SWITCH_S
from throttllem.core.forecast.switch_latency import ProfiledSwitches
from throttllem.core.types import EngineSpec
from throttllem.files import write_aside

PARQUET = ".parquet"
CSV = ".csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column: its type and the least valid value (`above`: that value itself is not valid)."""

    name: str
    dtype: type[pl.DataType]
    least: float | None = None
    above: bool = False


COLUMNS = (
    Column(name="gpu", dtype=pl.String),
    Column(name="model", dtype=pl.String),
    Column(name="tp", dtype=pl.Int64, least=1),
    Column(name="block_tokens", dtype=pl.Int64, least=1),
    Column(name="batch", dtype=pl.Int64, least=1),
    Column(name="kv_blocks", dtype=pl.Int64, least=1),
    Column(name="clock_mhz", dtype=pl.Int64, least=1),
    Column(name="prefill_tokens", dtype=pl.Int64, least=0),
    Column(name="seconds", dtype=pl.Float64, least=0.0, above=True),
    Column(name="watts", dtype=pl.Float64, least=0.0, above=True),
)
OPTIONAL = (
    Column(name="prompts", dtype=pl.Int64, least=0),
    Column(name="prefill_pairs", dtype=pl.Float64, least=0.0),
)
"""Read if the file has them: `calibrate` uses them."""
LIVE = (
    Column(name="max_batch", dtype=pl.Int64, least=1),
    Column(name="kv_capacity_blocks", dtype=pl.Int64, least=1),
    Column(name="prefill_budget_tokens", dtype=pl.Int64, least=1),
    Column(name="max_context_tokens", dtype=pl.Int64, least=1),
    Column(name="point", dtype=pl.Int64, least=0),
    Column(name="seconds_by", dtype=pl.String),
    Column(name="watts_by", dtype=pl.String),
    Column(name="any_clock", dtype=pl.Int64, least=0),
    Column(name="tokens_per_step", dtype=pl.Float64, least=1.0),
    Column(name="switches", dtype=pl.Int64, least=0),
    Column(name="switch_s", dtype=pl.Float64, least=0.0),
    Column(name="quick", dtype=pl.Int64, least=0),
)
"""Read likewise: the capacities that a live engine reported, which rows were measured together, and how; of each clock
how many switches to it were timed, and the seconds that few of them exceeded."""
CAPACITIES = ("max_batch", "kv_capacity_blocks", "prefill_budget_tokens", "max_context_tokens")
"""Columns of the engine's capacities; the same in every row of a size."""
SAME_THROUGHOUT = ("gpu", "model", "block_tokens")
_LARGEST_WHOLE = 2.0**53
"""Larger whole numbers are not exact as doubles."""


class ProfileError(ValueError):
    """A profile that cannot be used; the message names the file and, where there is one, the row and the column."""


def read_profile(path: Path, sizes: Collection[int] | None = None) -> pl.DataFrame:
    """Read and check a profile, Parquet or CSV by the file's ending. Raises ProfileError.

    `sizes` are the allowed tensor parallel degrees. Columns that the format does not name are dropped.
    """
    frame = _read(path)
    missing = [column.name for column in COLUMNS if column.name not in frame.columns]
    if missing:
        raise ProfileError(f"{path}: missing column {', '.join(missing)}; there are: {', '.join(frame.columns)}")
    if frame.is_empty():
        raise ProfileError(f"{path}: no rows")
    there = [*COLUMNS, *(column for column in (*OPTIONAL, *LIVE) if column.name in frame.columns)]
    checked = pl.DataFrame([_checked(path, frame[column.name], column) for column in there])
    for name in SAME_THROUGHOUT:
        others = checked[name] != checked[name][0]
        _refuse(path, checked[name], others, f"a profile is of one {name}, and row 1 says {checked[name][0]!r}")
    for name in CAPACITIES:
        if name in checked.columns:
            firsts = checked.select(pl.col(name).first().over("tp")).to_series()
            _refuse(path, checked[name], checked[name] != firsts, "an engine size has one capacity throughout")
    if sizes is not None:
        known = ", ".join(str(size) for size in sorted(sizes))
        _refuse(path, checked["tp"], ~checked["tp"].is_in(sorted(sizes)), f"unknown engine size; known: {known}")
    return checked


def write_profile(profile: pl.DataFrame, path: Path) -> None:
    """Write a profile, Parquet or CSV by the file's ending; the file appears whole or not at all."""
    ending = _ending(path)
    with write_aside(path) as unfinished:
        if ending == CSV:
            profile.write_csv(unfinished)
        else:
            profile.write_parquet(unfinished)


def spec_of(profile: pl.DataFrame, spec: EngineSpec) -> EngineSpec:
    """`spec` with the profile's blocks, its capacities of this size, if any, and its measured clocks alone: between two
    of them the trees only repeat one of the two.
    """
    rows = profile.filter(pl.col("tp") == spec.tp)
    block_tokens = int(rows["block_tokens"][0])
    spec = replace(
        spec,
        clocks_mhz=tuple(sorted(set(rows["clock_mhz"].to_list()))),
        block_tokens=block_tokens,
        kv_blocks=spec.kv_blocks * spec.block_tokens // block_tokens,
    )
    if not set(CAPACITIES) <= set(profile.columns):
        return spec
    row = rows.row(0, named=True)
    return replace(
        spec,
        max_batch=row["max_batch"],
        kv_blocks=row["kv_capacity_blocks"],
        prefill_budget_tokens=row["prefill_budget_tokens"],
        max_context_tokens=row["max_context_tokens"],
    )


def is_quick(profile: pl.DataFrame) -> bool:
    """Whether it was measured at a few clocks and batches only, for a law to be calibrated on."""
    return "quick" in profile.columns and bool((profile["quick"] == 1).any())


def tokens_per_step_of(profile: pl.DataFrame) -> float | None:
    """Tokens that the engine gave a sequence in a step of decoding alone, on the mean; None: the file does not say."""
    if "tokens_per_step" not in profile.columns:
        return None
    decoded = profile.filter(pl.col("prefill_tokens") == 0)["tokens_per_step"].to_list()
    return sum(decoded) / len(decoded) if decoded else None


def switches_of(profile: pl.DataFrame, tp: int) -> tuple[ProfiledSwitches, ...]:
    """What switches to the clocks of an engine size took; (): the file does not say."""
    if not {"switches", "switch_s"} <= set(profile.columns):
        return ()
    timed = profile.filter((pl.col("tp") == tp) & (pl.col("switches") > 0) & (pl.col("switch_s") > 0))
    by_clock = timed.group_by("clock_mhz").agg(pl.col("switches", "switch_s").max()).sort("clock_mhz")
    return tuple(
        ProfiledSwitches(mhz=mhz, count=count, within_s=min(within_s, MOST_SWITCH_S))
        for mhz, count, within_s in by_clock.select("clock_mhz", "switches", "switch_s").iter_rows()
    )


def capacities_of(spec: EngineSpec) -> dict[str, int]:
    """An engine's capacities by column of the profile."""
    values = (spec.max_batch, spec.kv_blocks, spec.prefill_budget_tokens, spec.max_context_tokens)
    return dict(zip(CAPACITIES, values, strict=True))


def place(path: Path, row: int) -> str:
    """The position of row `row` (from 0) in an error: the line of a CSV (the header is line 1), else the row."""
    return f"line {row + 2}" if path.suffix.lower() == CSV else f"row {row + 1}"


def check_ending(path: Path) -> None:
    """Raise ProfileError for a file name without a profile's ending, before a long run."""
    _ending(path)


def _ending(path: Path) -> str:
    ending = path.suffix.lower()
    if ending not in (PARQUET, CSV):
        raise ProfileError(f"{path}: a profile's name ends with {PARQUET} or {CSV}")
    return ending


def _read(path: Path) -> pl.DataFrame:
    """The file as it is; the values of a CSV stay text, so that an error can quote them."""
    ending = _ending(path)
    if not path.is_file():
        raise ProfileError(f"{path}: no such file")
    try:
        return pl.read_csv(path, infer_schema=False) if ending == CSV else pl.read_parquet(path)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise ProfileError(f"{path}: cannot be read as {ending[1:]}: {why}") from error


def _checked(path: Path, values: pl.Series, column: Column) -> pl.Series:
    _refuse(path, values, values.is_null(), "no value")
    if values.dtype.is_nested():
        wanted_type = "texts" if column.dtype == pl.String else "numbers"
        raise ProfileError(f"{path}, column {column.name}: holds {values.dtype}, not {wanted_type}")
    wanted = values.str.strip_chars() if values.dtype == pl.String else values
    if column.dtype == pl.String:
        try:
            wanted = wanted.cast(pl.String)
        except pl.exceptions.PolarsError as error:
            raise ProfileError(f"{path}, column {column.name}: holds {values.dtype}, not texts") from error
        _refuse(path, values, wanted.str.len_chars() == 0, "no value")
        return wanted
    try:
        numbers = wanted.cast(pl.Float64, strict=False)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise ProfileError(f"{path}, column {column.name}: holds {values.dtype}, not numbers") from error
    _refuse(path, values, numbers.is_null() | ~numbers.is_finite().fill_null(False), "not a finite number")
    if column.dtype == pl.Int64:
        _refuse(path, values, numbers != numbers.round(), "not a whole number")
        _refuse(path, values, numbers.abs() > _LARGEST_WHOLE, "too large a number")
    if column.least is not None:
        low = numbers <= column.least if column.above else numbers < column.least
        _refuse(path, values, low, f"must be {'above' if column.above else 'at least'} {column.least:g}")
    return numbers.cast(column.dtype)


def _refuse(path: Path, values: pl.Series, bad: pl.Series, why: str) -> None:
    """Raise for the first bad value."""
    rows = bad.arg_true()
    if len(rows):
        row = int(rows[0])
        raise ProfileError(f"{path}, {place(path, row)}, column {values.name}: {values[row]!r}: {why}")
