"""The formats of trace files: which columns hold arrival, prompt and output, and in which unit.

A format is recognised by names of columns (of CSV and Parquet) or paths of keys (of JSON lines), never by values.
`--columns` names others. Knows nothing of how a file is read.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from types import MappingProxyType

from throttllem.did_you_mean import did_you_mean
from throttllem.sim.traces.generators import TraceError

UNITS_NS = MappingProxyType({"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1})
"""Nanoseconds of each unit of time."""
DATE_TIME = "date-time"
"""Arrivals are texts like 2024-05-10 00:00:00.009930+00:00; UTC where they do not say."""
TYPED_DATE_TIME = "date-time of Parquet"
_KEYS = ("arrival", "prompt", "generated", "status", "unit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where a file keeps what a trace needs: names of columns, or dotted paths of keys of JSON.

    `unit` is one of `UNITS_NS`, DATE_TIME or TYPED_DATE_TIME; None: to be given by the user where arrivals are numbers.
    `failures` are columns that say whether a request failed.
    """

    format: str
    arrival: str
    prompt: str
    generated: str
    unit: str | None
    failures: tuple[str, ...] = ()
    assumed: bool = False
    """The unit is the format's custom, and no name in the file proves it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A known layout, and the names by whose presence it is recognised."""

    layout: Layout
    marks: tuple[str, ...]


def _flat(name: str, arrival: str, prompt: str, generated: str, unit: str, *also: str) -> Format:
    layout = Layout(format=name, arrival=arrival, prompt=prompt, generated=generated, unit=unit)
    return Format(layout=layout, marks=(arrival, prompt, generated, *also))


FORMATS = (
    _flat("Azure LLM 2023/2024", "TIMESTAMP", "ContextTokens", "GeneratedTokens", DATE_TIME),
    _flat("BurstGPT", "Timestamp", "Request tokens", "Response tokens", "s"),
    _flat("Mooncake", "timestamp", "input_length", "output_length", "ms"),
    _flat("ServeGen", "timestamp", "input_tokens", "output_tokens", "s", "request_id"),
    _flat("ServeGen", "timestamp", "data.input_tokens", "data.output_tokens", "s", "request_id"),
    Format(
        layout=Layout(
            format="aiperf",
            arrival="metadata.request_start_ns",
            prompt="metrics.input_sequence_length.value",
            generated="metrics.output_sequence_length.value",
            unit="ns",
            failures=("metadata.was_cancelled",),
        ),
        marks=("metadata.request_start_ns", "metrics"),
    ),
)
"""Of rows; documents that hold a whole run are in `documents`."""
_BY_CUSTOM = ("BurstGPT", "Mooncake", "ServeGen")
"""Formats whose names any log of requests may have, in another unit."""
_MOONCAKE_PROOF = "hash_ids"
_FAILURES = re.compile(r"(http_?)?status(_?code)?|success|ok|failed|errors?(_?(code|type|message))?", re.IGNORECASE)
"""Columns that say whether a request failed, in any format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """What `--columns` names; None: as the recognised format has it."""

    arrival: str | None = None
    prompt: str | None = None
    generated: str | None = None
    status: str | None = None
    unit: str | None = None


def parse_columns(text: str | None) -> Columns:
    """`arrival=..,prompt=..,generated=..[,status=..][,unit=s|ms|us|ns]`, any of them. Raises TraceError."""
    found: dict[str, str] = {}
    for item in (text or "").split(",") if text else ():
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value or key in found:
            raise TraceError(f"--columns: {item.strip()!r}: must be key=column, each key once")
        if key not in _KEYS:
            raise TraceError(f"--columns: unknown key {key!r}; {did_you_mean(key, _KEYS)}")
        found[key] = value
    if found.get("unit", "s") not in UNITS_NS:
        raise TraceError(f"--columns: unit = {found['unit']!r}: must be one of {', '.join(UNITS_NS)}")
    return Columns(**found)


def recognised(names: Collection[str], columns: Columns, where: str) -> Layout:
    """The layout of a file with these columns (or paths of keys). Raises TraceError, which names the way out."""
    known = next((format.layout for format in FORMATS if set(format.marks) <= set(names)), None)
    picked = (columns.arrival, columns.prompt, columns.generated)
    for key, name in zip(_KEYS, (*picked, columns.status), strict=False):
        if name is not None and name not in names:
            raise TraceError(f"{where}: --columns {key}={name}: no such column; {did_you_mean(name, sorted(names))}")
    if known is None:
        arrival, prompt, generated = picked
        if arrival is None or prompt is None or generated is None:
            raise TraceError(f"{where}: {_unknown(names)}")
        known = Layout(format="columns", arrival=arrival, prompt=prompt, generated=generated, unit=None)
    layout = replace(
        known,
        arrival=columns.arrival or known.arrival,
        prompt=columns.prompt or known.prompt,
        generated=columns.generated or known.generated,
        unit=columns.unit or (known.unit if columns.arrival in (None, known.arrival) else None),
        assumed=known.format in _BY_CUSTOM and columns.unit is None and _MOONCAKE_PROOF not in names,
    )
    used = {layout.arrival, layout.prompt, layout.generated}
    said = [columns.status] if columns.status else sorted(name for name in names if _FAILURES.fullmatch(name))
    return replace(layout, failures=(*layout.failures, *(name for name in said if name not in used)))


def _unknown(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names))[:200]
    formats = ", ".join(dict.fromkeys(format.layout.format for format in FORMATS))
    guess = ",".join(f"{key}={_likely(names, words)}" for key, words in _LIKELY.items())
    return (
        f"columns {shown or 'none'} are of no known trace ({formats}, vLLM, GenAI-Perf, OpenTelemetry); "
        f"name them, as in --columns '{guess},unit=s'"
    )


_LIKELY = MappingProxyType(
    {
        "arrival": ("arriv", "start", "time", "date"),
        "prompt": ("prompt", "input", "context", "request_tok"),
        "generated": ("generat", "output", "complet", "response", "out"),
    }
)


def _likely(names: Collection[str], words: tuple[str, ...]) -> str:
    """The column whose name sounds most like one of the words, for a hint."""
    return next((name for word in words for name in sorted(names) if word in name.lower()), "COLUMN")
