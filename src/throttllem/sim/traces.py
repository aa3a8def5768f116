"""Request traces: when requests arrive and how long they are, from a file or a generator.

`load_trace` takes every form of `--trace`: a generator, Azure's CSV, Mooncake's JSONL. A `Trace` can be scaled to a
peak rate and cut. Knows nothing of engines, SLOs or virtual time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from throttllem.did_you_mean import did_you_mean
from throttllem.sim import generators
from throttllem.sim.generators import Arrays, TraceError

__all__ = ["PEAK_WINDOW_S", "Trace", "TraceError", "load_trace"]

PEAK_WINDOW_S = 60.0
"""The window of the busiest minute (`--peak-rps`)."""
_INSTANT_S = 1e-9
_MOST_TOKENS = 2**31 - 1
_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOONCAKE_FIELDS = ("timestamp", "input_length", "output_length")
_WHOLE = "must be a whole number of 1 or more"
_STAMP = "must be a time like 2023-11-16 18:17:03.9799600"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Requests in order of arrival, the first at 0; the three arrays are read-only and of one length, at least 1.

    `name` is short (a file's stem, a generator's name); `source` is the text that named the trace.
    """

    name: str
    source: str
    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]

    def __post_init__(self) -> None:
        for array in (self.arrival_s, self.prompt_tokens, self.output_tokens):
            array.flags.writeable = False

    @property
    def requests(self) -> int:
        """How many requests there are."""
        return self.arrival_s.size

    @property
    def mean_context_tokens(self) -> int:
        """Tokens of a typical running request: its prompt and half of its output."""
        return round(float((self.prompt_tokens + self.output_tokens / 2).mean()))

    @property
    def duration_s(self) -> float:
        """Seconds from the first arrival to the last; 0 where all come at once."""
        return float(self.arrival_s[-1])

    @property
    def peak_rps(self) -> float:
        """Requests/s in the busiest window [t, t + 60 s), over every t.

        A trace shorter than 60 s has its requests over its duration instead (over 60 s if they all come at once).
        """
        if _INSTANT_S < self.duration_s < PEAK_WINDOW_S:
            return self.requests / self.duration_s
        ends = np.searchsorted(self.arrival_s, self.arrival_s + PEAK_WINDOW_S, side="left")
        return int((ends - np.arange(self.requests)).max()) / PEAK_WINDOW_S

    @property
    def sha256(self) -> str:
        """Digest of the requests alone (not of the names), for cache keys."""
        digest = hashlib.sha256(b"trace 1\n")
        for array, kind in ((self.arrival_s, "<f8"), (self.prompt_tokens, "<i8"), (self.output_tokens, "<i8")):
            digest.update(array.astype(kind).tobytes())
        return digest.hexdigest()

    def scaled(self, *, peak_rps: float) -> Trace:
        """The trace with its arrival times multiplied by one factor, so that its own `peak_rps` becomes this one.

        A window holds a whole number of requests, so the result is the greatest multiple of 1/60 that is not above
        `peak_rps`. Raises TraceError for a rate under 1/60, and where more requests than that
        arrive within one instant (1 ns).
        """
        if not 1 / PEAK_WINDOW_S <= peak_rps < math.inf:
            raise TraceError(f"peak rate {peak_rps:g} requests/s: must be at least 1/60 (one request a minute)")
        # At most k requests in every window of 60 s means: request i + k comes 60 s or more after request i. The exact
        # factor is therefore that of the tightest such pair, and no search is needed.
        k = math.floor(PEAK_WINDOW_S * peak_rps + 1e-9)
        if self.requests <= k:
            together = self.duration_s <= _INSTANT_S
            return self if together else self._stretched(self.requests / (peak_rps * self.duration_s))
        tightest_s = float((self.arrival_s[k:] - self.arrival_s[:-k]).min())
        if tightest_s <= _INSTANT_S:
            raise TraceError(f"{self.name}: over {k} requests arrive at one instant: no scaling makes {peak_rps:g} rps")
        # The rounding of a product may put a pair a hair inside 60 s again.
        return self._stretched(PEAK_WINDOW_S / tightest_s * (1 + 1e-12))

    def cut(self, seconds: float) -> Trace:
        """The requests that arrive before `seconds`. Raises TraceError unless it is positive."""
        if not seconds > 0:
            raise TraceError(f"seconds = {seconds:g}: must be a positive number")
        first = slice(int(np.searchsorted(self.arrival_s, seconds, side="left")))
        return replace(
            self,
            arrival_s=self.arrival_s[first],
            prompt_tokens=self.prompt_tokens[first],
            output_tokens=self.output_tokens[first],
        )

    def _stretched(self, factor: float) -> Trace:
        return replace(self, arrival_s=self.arrival_s * factor)


def load_trace(spec: str, *, seconds: float | None = None, peak_rps: float | None = None, seed: int = 0) -> Trace:
    """The trace that `spec` names: `generator[:key=value,...]`, or the path of an Azure CSV or a Mooncake JSONL.

    First scaled to `peak_rps` (busiest 60 s), then cut to `seconds`. `seed` is for generators, whose own `seed=`
    wins. The format of a file follows from its first line; rows are sorted by arrival, equal ones in the file's order.
    Raises TraceError, which says what to correct.
    """
    name, _, options = spec.partition(":")
    if name in generators.NAMES:
        arrays = generators.generate(name, _options_of(name, options), seed)
    else:
        path = Path(spec)
        name, arrays = path.stem, _read_file(path)
    order = np.argsort(arrays.arrival_s, kind="stable")
    arrival_s = arrays.arrival_s[order]
    trace = Trace(
        name=name,
        source=spec,
        arrival_s=arrival_s - arrival_s[0],
        prompt_tokens=arrays.prompt_tokens[order],
        output_tokens=arrays.output_tokens[order],
    )
    trace = trace if peak_rps is None else trace.scaled(peak_rps=peak_rps)
    return trace if seconds is None else trace.cut(seconds)


def _options_of(name: str, text: str) -> dict[str, str]:
    """`a=1,b=2` as a mapping."""
    found: dict[str, str] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key in found:
            raise TraceError(f"{name}: option {item!r}: must be key=value, each key once")
        found[key] = value
    return found


def _read_file(path: Path) -> Arrays:
    """The rows of a trace file in their order, times from any zero. Raises TraceError naming file, line and field."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        hint = did_you_mean(str(path).partition(":")[0], generators.NAMES)
        raise TraceError(f"{path}: no such file, nor a generator; {hint}") from None
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
        raise TraceError(f"{path}:1: {header[:80]!r} is not the first line of a known trace; give {wanted}")
    return _azure(path, text, columns)


def _azure(path: Path, text: str, columns: list[str]) -> Arrays:
    """`TIMESTAMP,ContextTokens,GeneratedTokens` in any order, other columns ignored, blank lines skipped.

    Times are UTC, with any number of digits of the second (to 1 ns); `T` and a trailing `Z` or `+00:00` are accepted.
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
    stamps_ms, prompt, output = zip(*rows, strict=True)
    return Arrays(np.array(stamps_ms, np.float64) / 1e3, np.array(prompt, np.int64), np.array(output, np.int64))


def _objects(path: Path, text: str) -> Iterator[tuple[int, dict[str, object]]]:
    """Line number and object of each line that is not blank."""
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
