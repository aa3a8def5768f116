"""Trace files: Azure's CSV and Mooncake's JSONL, read whole and checked row by row.

Knows nothing of the order of the rows nor of scaling.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from throttllem.sim import generators
from throttllem.sim.generators import Arrays, TraceError

_MOST_TOKENS = 2**31 - 1
_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOONCAKE_FIELDS = ("timestamp", "input_length", "output_length")
_WHOLE = "must be a whole number of 1 or more"
_STAMP = "must be a time like 2023-11-16 18:17:03.9799600"


def read_trace_file(path: Path) -> Arrays:
    """The rows of a trace file as they stand in it, times from any zero; the form is known by the first line.

    Raises TraceError naming file, line and field.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise TraceError(_unknown(path)) from None
    except IsADirectoryError:
        raise TraceError(f"{path}: is a directory; name the trace file in it") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise TraceError(f"{path}:{line}: is not UTF-8 text ({error.reason})") from None
    except (OSError, ValueError) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from error
    if not text.strip():
        raise TraceError(f"{path}: is empty")
    header = text.partition("\n")[0].strip()
    if header.startswith("{"):
        return _mooncake(path, text)
    columns = [column.strip() for column in header.split(",")]
    if any(columns.count(column) != 1 for column in _AZURE_COLUMNS):
        wanted = f"a CSV with {','.join(_AZURE_COLUMNS)} or a JSONL with {', '.join(_MOONCAKE_FIELDS)}"
        raise TraceError(f"{path}:1: {header[:80]!r} is not the first line of a known trace; it takes {wanted}")
    return _azure(path, text, columns)


def _unknown(path: Path) -> str:
    """What to say of a spec that is neither a file nor a generator."""
    name = str(path).partition(":")[0]
    near = difflib.get_close_matches(name, generators.NAMES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{path}: no such file, nor a generator ({hint}there are {', '.join(generators.NAMES)})"


def _azure(path: Path, text: str, columns: list[str]) -> Arrays:
    """`TIMESTAMP,ContextTokens,GeneratedTokens` in any order, other columns ignored, blank lines skipped.

    Times are UTC, with any number of digits of the second (to 1 ns); `T` and a trailing `Z` or `+00:00` are taken too.
    """
    try:
        frame = pl.read_csv(text.encode(), new_columns=columns, infer_schema=False, quote_char=None)
    except (pl.exceptions.PolarsError, ValueError):
        raise TraceError(_uneven(path, text, len(columns))) from None
    frame = frame.with_row_index("line", offset=2).filter(~pl.all_horizontal(pl.exclude("line").is_null()))
    if not frame.height:
        raise TraceError(f"{path}: has a header and no row")
    stamps, *counts = (frame[column].str.strip_chars() for column in _AZURE_COLUMNS)
    plain = stamps.str.replace(r"(Z|\+00:00)$", "").str.replace("T", " ", literal=True)
    times = plain.str.strptime(pl.Datetime("ns"), "%Y-%m-%d %H:%M:%S%.f", strict=False).dt.timestamp("ns")
    # Nanoseconds wrap around outside of these years.
    years = plain.str.slice(0, 5).is_between(pl.lit("1970-"), pl.lit("2199-"))
    tokens = [column.cast(pl.Int64, strict=False) for column in counts]
    good = [
        times.is_not_null() & years.fill_null(False),
        *(column.is_between(1, _MOST_TOKENS).fill_null(False) for column in tokens),
    ]
    bad = ~(good[0] & good[1] & good[2])
    if bad.any():
        row = int(bad.arg_max() or 0)
        field = next(index for index in range(3) if not good[index][row])
        value, rule = frame[_AZURE_COLUMNS[field]][row], _WHOLE if field else _STAMP
        shown = "is missing:" if value is None else f"= {repr(value)[:60]}:"
        raise TraceError(f"{path}:{frame['line'][row]}: {_AZURE_COLUMNS[field]} {shown} {rule}")
    arrival_s = (times - times.min()).to_numpy() / 1e9
    return Arrays(arrival_s, tokens[0].to_numpy(), tokens[1].to_numpy())


def _uneven(path: Path, text: str, wanted: int) -> str:
    """Names the first line with more fields than the header."""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.count(",") >= wanted:
            return f"{path}:{number}: has {line.count(',') + 1} fields where the header has {wanted}"
    return f"{path}: cannot be read as CSV"


def _mooncake(path: Path, text: str) -> Arrays:
    """One object per line: `timestamp` in ms, `input_length`, `output_length`; other fields ignored."""
    rows = [
        (_number(path, line, row, "timestamp"), *(_count(path, line, row, field) for field in _MOONCAKE_FIELDS[1:]))
        for line, row in _objects(path, text)
    ]
    stamps_ms, prompt, answer = zip(*rows, strict=True)
    return Arrays(np.array(stamps_ms, np.float64) / 1e3, np.array(prompt, np.int64), np.array(answer, np.int64))


def _objects(path: Path, text: str) -> Iterator[tuple[int, dict[str, object]]]:
    """Line number and object of every line that is not blank."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise TraceError(f"{path}:{number}: {line.strip()[:60]!r} is not JSON") from None
        if not isinstance(row, dict):
            raise TraceError(f"{path}:{number}: {line.strip()[:60]!r} is not a JSON object")
        for field in _MOONCAKE_FIELDS:
            if field not in row:
                raise TraceError(f"{path}:{number}: {field} is missing")
        yield number, row


def _number(path: Path, line: int, row: dict[str, object], field: str) -> float:
    value = row[field]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e15:
        raise TraceError(f"{path}:{line}: {field} = {repr(value)[:60]}: must be a number of milliseconds")
    return float(value)


def _count(path: Path, line: int, row: dict[str, object], field: str) -> int:
    value = row[field]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_TOKENS:
        raise TraceError(f"{path}:{line}: {field} = {repr(value)[:60]}: {_WHOLE}")
    return value
