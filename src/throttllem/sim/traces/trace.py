"""A trace: requests in order of arrival, from a file or a generator, and what is known of how a file was read.

`load_trace` takes every form of `--trace`. A `Trace` can be scaled to a peak rate and cut; a long file is not held in
memory but read again whenever its requests are needed. Knows nothing of engines, SLOs or virtual time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from throttllem.did_you_mean import did_you_mean
from throttllem.sim.traces import generators
from throttllem.sim.traces.files import BLOCK_ROWS, TraceFile, open_trace
from throttllem.sim.traces.formats import DATE_TIME, UNITS_NS, Columns, parse_columns
from throttllem.sim.traces.generators import Arrays, TraceError
from throttllem.sim.traces.rows import FAILED, Skipped, requests_of

__all__ = ["PEAK_WINDOW_S", "Trace", "TraceError", "load_trace"]

PEAK_WINDOW_S = 60.0
"""The window of the busiest minute (`--peak-rps`)."""
MOST_HELD = 2_000_000
"""Requests of a file that are held in memory (48 MB) and sorted; a longer file is streamed, and must be in order."""
MOST_RPS = 200.0
"""Above it a mean rate is refused: no engine serves it, so the unit of time is likely another one."""
MOST_SPAN_S = 366 * 86400.0
"""The same for a span: the longest published trace lasts 220 days."""
LEAST_RPS = 0.01
"""Below it a mean rate is refused where the unit is a format's custom alone: nothing is worth simulating at it."""
_INSTANT_S = 1e-9
_COMPRESSED = (".gz", ".zst", ".zz")


class Rows(Protocol):
    """Requests in order of arrival, the first at 0."""

    def blocks(self) -> Iterator[Arrays]:
        """The requests, as read-only arrays of a few ten thousand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Requests in memory."""

    arrays: Arrays

    def blocks(self) -> Iterator[Arrays]:
        """Slices of the arrays."""
        arrival_s, prompt, output = self.arrays
        for start in range(0, arrival_s.size, BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            yield Arrays(arrival_s[part], prompt[part], output[part])


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """Requests that are read from the file each time; the file must stay as it is (`stamp`: its size and time)."""

    path: Path
    columns: Columns
    first_ns: int
    stamp: tuple[int, int]

    def blocks(self) -> Iterator[Arrays]:
        """Blocks of the file. Raises TraceError if it changed since it was first read."""
        if _stamp(self.path) != self.stamp:
            raise TraceError(f"{self.path}: changed while it was simulated; start again")
        for block in _requests(open_trace(self.path, self.columns), Skipped()):
            yield _arrays(block, self.first_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a file was understood: its format, where arrival, prompt and output came from, and the rows left out."""

    format: str
    container: str
    columns: Mapping[str, str]
    unit: str
    skipped: Mapping[str, int]
    unordered: bool
    """Rows were not in order of arrival, and were sorted."""
    assumed: bool
    """The unit is the format's custom, and no name in the file proves it."""
    fractions: bool
    """An arrival has a fraction of the unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Figures over all requests of a trace."""

    requests: int
    duration_s: float
    mean_context_tokens: int
    longest_output_tokens: int
    peak_minute: int
    """Requests in the busiest window of PEAK_WINDOW_S."""
    sha256: str
    lengths_sha256: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """Requests in order of arrival, the first at 0; at least 1.

    `name` is short (a file's stem, a generator's name); `source` is the text that named the trace. Arrivals of `rows`
    are multiplied by `factor`; those at `end_s` and later are left out.
    """

    name: str
    source: str
    rows: Rows
    factor: float = 1.0
    end_s: float = math.inf
    reading: Reading | None = None
    """Of a file; None for a generator."""

    def blocks(self) -> Iterator[Arrays]:
        """The requests, as read-only arrays of a few ten thousand."""
        for block in self.rows.blocks():
            arrival_s = block.arrival_s if self.factor == 1 else block.arrival_s * self.factor
            within = int(np.searchsorted(arrival_s, self.end_s, side="left"))
            found = Arrays(arrival_s[:within], block.prompt_tokens[:within], block.output_tokens[:within])
            for array in found:
                array.flags.writeable = False
            if within:
                yield found
            if within < arrival_s.size:
                return

    @property
    def arrays(self) -> Arrays:
        """All requests at once: 24 bytes each."""
        found = Arrays(*(np.concatenate(parts) for parts in zip(*self.blocks(), strict=True)))
        for array in found:
            array.flags.writeable = False
        return found

    @cached_property
    def summary(self) -> Summary:
        """Figures over all requests, in one pass."""
        requests, last_s, output, longest, context = 0, 0.0, 0, 0, 0.0
        minute = _BusiestMinute()
        digests = [hashlib.sha256() for _ in range(3)]
        for block in self.blocks():
            requests += block.arrival_s.size
            last_s = float(block.arrival_s[-1])
            longest = max(longest, int(block.output_tokens.max()))
            context += int(block.prompt_tokens.sum())
            output += int(block.output_tokens.sum())
            minute.add(block.arrival_s)
            for digest, array, kind in zip(digests, block, ("<f8", "<i8", "<i8"), strict=True):
                digest.update(array.astype(kind).tobytes())
        lengths = b"".join(digest.digest() for digest in digests[1:])
        return Summary(
            requests=requests,
            duration_s=last_s,
            mean_context_tokens=round((context + output / 2) / requests),
            longest_output_tokens=longest,
            peak_minute=minute.most(),
            sha256=hashlib.sha256(b"trace 2\n" + digests[0].digest() + lengths).hexdigest(),
            lengths_sha256=hashlib.sha256(lengths).hexdigest(),
        )

    @property
    def requests(self) -> int:
        """How many requests there are."""
        return self.summary.requests

    @property
    def mean_context_tokens(self) -> int:
        """Tokens of a typical running request: its prompt and half of its output."""
        return self.summary.mean_context_tokens

    @property
    def duration_s(self) -> float:
        """Seconds from the first arrival to the last; 0 where all come at once."""
        return self.summary.duration_s

    @property
    def mean_rps(self) -> float | None:
        """Requests/s over the duration; None where all come at once."""
        return self.requests / self.duration_s if self.duration_s > _INSTANT_S else None

    @property
    def peak_rps(self) -> float:
        """Requests/s in the busiest window [t, t + 60 s), over every t.

        A trace shorter than 60 s has its requests over its duration instead (over 60 s if they all come at once).
        """
        if _INSTANT_S < self.duration_s < PEAK_WINDOW_S:
            return self.requests / self.duration_s
        return self.summary.peak_minute / PEAK_WINDOW_S

    @property
    def sha256(self) -> str:
        """Digest of the requests alone (not of the names), for cache keys."""
        return self.summary.sha256

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
        tightest_s, before = math.inf, np.empty(0)
        for block in self.blocks():
            joined = np.concatenate((before, block.arrival_s))
            tightest_s = min(tightest_s, float((joined[k:] - joined[:-k]).min(initial=math.inf)))
            before = joined[-k:]
        if tightest_s <= _INSTANT_S:
            raise TraceError(f"{self.name}: over {k} requests arrive at one instant: no scaling makes {peak_rps:g} rps")
        # The rounding of a product may put a pair a hair inside 60 s again.
        return self._stretched(PEAK_WINDOW_S / tightest_s * (1 + 1e-12))

    def cut(self, seconds: float) -> Trace:
        """The requests that arrive before `seconds`. Raises TraceError unless it is positive."""
        if not seconds > 0:
            raise TraceError(f"seconds = {seconds:g}: must be a positive number")
        return replace(self, end_s=min(self.end_s, seconds))

    def described(self) -> str:
        """One line: format, requests, span, rate, unit, and the rows left out."""
        rate = "all at one instant" if self.mean_rps is None else f"{self.mean_rps:.3g} requests/s"
        text = (
            f"{self.requests:,} requests over {_span(self.duration_s)}, {rate} (busiest minute {self.peak_rps:.3g}/s)"
        )
        if self.reading is None:
            return f"{self.name}: {text}"
        read = self.reading
        arrival = read.columns["arrival"]
        unit = f"{arrival} in {read.unit}" if read.unit in UNITS_NS else f"{arrival} is a {read.unit}"
        lines = [f"{self.name}: {text}; {read.format} ({read.container}), {unit}"]
        if read.skipped:
            why = ", ".join(f"{each:,} {reason}" for reason, each in read.skipped.items())
            count = sum(read.skipped.values())
            lines.append(f"left out {count:,} {'row' if count == 1 else 'rows'}: {why}")
        if read.unordered:
            lines.append("rows were not in order of arrival: sorted")
        if read.assumed and not read.fractions:
            other = "s" if read.unit == "ms" else "ms"
            lines.append(
                f"nothing but {read.format}'s custom says {read.unit}; if it is {other}: --columns unit={other}"
            )
        return "; ".join(lines)

    def _stretched(self, factor: float) -> Trace:
        return replace(self, factor=self.factor * factor, end_s=self.end_s * factor)


def _span(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


@dataclass(slots=True)
class _BusiestMinute:
    """The most arrivals in a window of PEAK_WINDOW_S; holds those of the last window."""

    found: int = 0
    open_s: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    def add(self, arrival_s: NDArray[np.float64]) -> None:
        """The next arrivals."""
        joined = np.concatenate((self.open_s, arrival_s))
        complete = int(np.searchsorted(joined + PEAK_WINDOW_S, joined[-1], side="right"))
        self._count(joined, complete)
        self.open_s = joined[complete:]

    def most(self) -> int:
        """Over all arrivals added."""
        self._count(self.open_s, self.open_s.size)
        return self.found

    def _count(self, arrival_s: NDArray[np.float64], windows: int) -> None:
        ends = np.searchsorted(arrival_s, arrival_s[:windows] + PEAK_WINDOW_S, side="left")
        self.found = max(self.found, int((ends - np.arange(windows)).max(initial=0)))


def load_trace(
    spec: str,
    *,
    columns: str | None = None,
    rescaled: bool = False,
    seed: int = 0,
) -> Trace:
    """The trace that `spec` names: `generator[:key=value,...]`, or the path of a file.

    The format of a file follows from the names in it; `columns` overrules them (`formats.parse_columns`). `seed` is
    for generators, whose own `seed=` wins. Rows out of order are sorted, equal ones in the file's order, in a file of
    up to MOST_HELD requests, else refused. Raises TraceError, which says what to correct; also for arrivals all at
    one instant, and for a mean rate above MOST_RPS, a span above MOST_SPAN_S, or a mean rate below LEAST_RPS in a unit
    that is a format's custom alone, unless `columns` names the unit or the trace is to be `rescaled`.
    """
    name, _, options = spec.partition(":")
    if name in generators.NAMES:
        if columns:
            raise TraceError(f"--columns: {name} is a generator; columns are of a file")
        arrays = generators.generate(name, _options_of(name, options), seed)
        held = Arrays(arrays.arrival_s - arrays.arrival_s[0], arrays.prompt_tokens, arrays.output_tokens)
        return Trace(name=name, source=spec, rows=Held(arrays=held))
    named = parse_columns(columns)
    trace = _read(spec, named)
    _check(trace, spec, sure=named.unit is not None or rescaled)
    return trace


def _options_of(name: str, text: str) -> dict[str, str]:
    """`a=1,b=2` as a mapping."""
    found: dict[str, str] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key in found:
            raise TraceError(f"{name}: option {item!r}: must be key=value, each key once")
        found[key] = value
    return found


def _read(spec: str, columns: Columns) -> Trace:
    """The requests of a file: held and sorted, or, of a long one, streamed."""
    path = Path(spec)
    try:
        stamp = _stamp(path)
        file = open_trace(path, columns)
    except FileNotFoundError:
        hint = did_you_mean(spec.partition(":")[0], generators.NAMES)
        raise TraceError(f"{path}: no such file, nor a generator; {hint}") from None
    except IsADirectoryError:
        raise TraceError(f"{path}: is a directory; name the trace file in it") from None
    except (OSError, ValueError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"{path}: cannot be read: {error}") from error
    skipped, parts, unordered = Skipped(), list[pl.DataFrame](), list[int]()
    requests, first_ns, last_ns, fractions = 0, 0, 0, False
    for block in _requests(file, skipped):
        at_ns = block["at_ns"]
        first_ns, last_ns = (first_ns, last_ns) if requests else (int(at_ns[0]), int(at_ns[0]))
        requests += block.height
        if not at_ns.is_sorted() or int(at_ns[0]) < last_ns:
            unordered = unordered or [_first_unordered(block, last_ns)]
        last_ns = int(at_ns[-1])
        fractions = fractions or bool((at_ns % UNITS_NS.get(file.layout.unit or "", 1) != 0).any())
        if requests <= MOST_HELD:
            parts.append(block)
        elif unordered:
            raise TraceError(
                f"{file.at(unordered[0])}: arrives before the row above; a file of over {MOST_HELD:,} requests is "
                f"not sorted in memory: sort it by {file.layout.arrival}"
            )
        else:
            parts.clear()
    if not requests:
        why = ", ".join(f"{count:,} {reason}" for reason, count in skipped.by_reason.items())
        by = f" (by {', '.join(file.layout.failures)})" if skipped.by_reason[FAILED] and file.layout.failures else ""
        raise TraceError(f"{path}: has no request" + (f"; rows left out: {why}{by}" if why else "; it has no row"))
    if file.layout.assumed and fractions and file.layout.unit == "ms":
        raise TraceError(
            f"{path}: {file.layout.arrival} has fractions, and {file.layout.format}'s whole {file.layout.unit} have "
            "none; say which unit it is: --columns unit=s (or unit=ms)"
        )
    unit = file.layout.unit or DATE_TIME
    reading = Reading(
        format=file.layout.format,
        container=file.container,
        columns={
            "arrival": file.layout.arrival,
            "prompt": file.layout.prompt,
            "generated": file.layout.generated,
        },
        unit=unit if unit in UNITS_NS else DATE_TIME,
        skipped=dict(skipped.by_reason),
        unordered=bool(unordered),
        assumed=file.layout.assumed,
        fractions=fractions,
    )
    rows: Rows
    if parts:
        whole = pl.concat(parts).sort("at_ns", maintain_order=True)
        rows = Held(arrays=_arrays(whole, int(whole["at_ns"][0])))
    else:
        rows = Streamed(path=path, columns=columns, first_ns=first_ns, stamp=stamp)
    return Trace(
        name=Path(path.stem).stem if path.suffix in _COMPRESSED else path.stem, source=spec, rows=rows, reading=reading
    )


def _requests(file: TraceFile, skipped: Skipped) -> Iterator[pl.DataFrame]:
    """Blocks of at least one request."""
    for rows in file.rows():
        block = requests_of(rows, file.layout, file.at, skipped)
        if block.height:
            yield block


def _arrays(block: pl.DataFrame, first_ns: int) -> Arrays:
    arrival_s = (block["at_ns"] - first_ns).to_numpy() / 1e9
    return Arrays(arrival_s, block["prompt"].to_numpy(), block["generated"].to_numpy())


def _first_unordered(block: pl.DataFrame, last_ns: int) -> int:
    before = block["at_ns"].shift(1, fill_value=last_ns)
    return int(block.filter(pl.col("at_ns") < before)["line"][0])


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _check(trace: Trace, spec: str, *, sure: bool) -> None:
    """Refuse a span and a rate that no load has."""
    assert trace.reading is not None
    arrival, unit = trace.reading.columns["arrival"], trace.reading.unit
    if trace.requests > 1 and trace.mean_rps is None:
        raise TraceError(
            f"{spec}: all {trace.requests:,} requests arrive at one instant; name the column of arrivals with "
            "--columns arrival=.., or take their lengths with a generator's arrivals"
        )
    dense, long = (trace.mean_rps or 0.0) > MOST_RPS, trace.duration_s > MOST_SPAN_S
    idle = trace.reading.assumed and (trace.mean_rps or 0.0) < LEAST_RPS
    if sure or trace.mean_rps is None or not (dense or long or idle):
        return
    others = [
        f"unit={other}: {trace.mean_rps * UNITS_NS[unit] / scale:.3g} requests/s"
        for other, scale in UNITS_NS.items()
        if unit in UNITS_NS and (scale > UNITS_NS[unit] if dense else scale < UNITS_NS[unit])
    ]
    way = f"name the unit with --columns ({', '.join(others)}; unit={unit} if it is right)" if others else "check it"
    beyond = f"above {MOST_RPS:g} requests/s" if dense else f"above {_span(MOST_SPAN_S)}"
    if idle and not long:
        beyond = f"below {LEAST_RPS:g} requests/s"
    raise TraceError(
        f"{spec}: {arrival} as {unit} makes {trace.mean_rps:,.4g} requests/s over {_span(trace.duration_s)}; "
        f"{beyond} the column or its unit is likely another one: {way}, or scale it with --peak-rps"
    )
