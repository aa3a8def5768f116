"""Reads a trace file block by block: CSV, JSON lines, JSON and Parquet, plain or compressed.

polars reads and decompresses; a file is never held whole, but for JSON documents of one benchmark run.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import polars as pl

from throttllem.sim.traces.documents import DOCUMENTS, Row
from throttllem.sim.traces.formats import DATE_TIME, TYPED_DATE_TIME, Columns, Layout, recognised
from throttllem.sim.traces.generators import TraceError
from throttllem.sim.traces.rows import FAILED, SCHEMA

BLOCK_ROWS = 1 << 16
_PEEK_LINES = 50
_DELIMITERS = ",;\t|"
_OK = ("ok", "success", "succeeded", "successful", "completed", "complete", "finished", "done", "stop", "length", "0")
_NO_ERROR = ("", "none", "null", "nan", "na", "n/a", "-", "false", "0", "no", "[]", "{}", "ok", "success", "200")
_TRUE = ("true", "1", "yes")
_ROW = "\0row"
"""The number of a row; no column of a file has this name."""
_PACKED = MappingProxyType(
    {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zX": "xz", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
)
_DAMAGED = (pl.exceptions.PolarsError, pl.exceptions.PanicException, csv.Error)
"""What polars (which panics on some damaged Parquet files) and csv raise for a file that they cannot read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFile:
    """A file whose format is known. `rows` reads it; each call begins anew.

    `container`: `CSV`, `JSON lines`, `JSON` or `Parquet`; `numbered`: what the number of a row counts.
    """

    path: Path
    container: str
    layout: Layout
    numbered: str
    _read: Callable[[], Iterator[pl.DataFrame]]
    _line_of: Callable[[int], int] = int

    def at(self, number: int) -> str:
        """Where the row of this number is, to begin an error."""
        return (
            f"{self.path}:{self._line_of(number)}"
            if self.numbered == "line"
            else f"{self.path}: {self.numbered} {number}"
        )

    def rows(self) -> Iterator[pl.DataFrame]:
        """Blocks of rows as text (`rows.SCHEMA`), in the file's order. Raises TraceError."""
        try:
            yield from self._read()
        except (OSError, *_DAMAGED) as error:
            raise TraceError(f"{self.path}: cannot be read: {_first_line(error)}") from error


def open_trace(path: Path, columns: Columns) -> TraceFile:
    """Recognise a file. Raises TraceError (an OSError as it is), which names what is known and the way out."""
    try:
        return _opened(path, columns)
    except _DAMAGED as error:
        raise TraceError(f"{path}: cannot be read: {_first_line(error)}") from None


def _opened(path: Path, columns: Columns) -> TraceFile:
    if path.exists() and not path.is_file() and not path.is_dir():
        raise TraceError(f"{path}: is no file that can be read twice; write the trace to a file first")
    with path.open("rb") as file:
        magic = file.read(4)
    if not magic:
        raise TraceError(f"{path}: is empty")
    for begin, name in _PACKED.items():
        if magic.startswith(begin):
            raise TraceError(f"{path}: is {name}; give it as UTF-8 text, plain or compressed with gzip or zstd")
    if magic == b"PAR1":
        return _parquet(path, columns)
    first = _peek(path)
    if not first:
        raise TraceError(f"{path}: is empty")
    if first[0].startswith("PAR1"):
        raise TraceError(f"{path}: is Parquet inside another compression; unpack it, Parquet is compressed by itself")
    if first[0].startswith(("{", "[")):
        return _json(path, first, columns)
    return _csv(path, first[0], columns)


def _lines(path: Path) -> pl.LazyFrame:
    """The number of each line, from 1, and its text; a separator that no text holds leaves every line whole."""
    return pl.scan_csv(
        path,
        has_header=False,
        separator="\x01",
        quote_char=None,
        schema={"text": pl.String},
        row_index_name=_ROW,
        row_index_offset=1,
        encoding="utf8-lossy",
        empty_string_is_null=False,
        extra_columns="ignore",
        raise_if_empty=False,
        glob=False,
    )


def _peek(path: Path) -> list[str]:
    """The first lines that are not blank."""
    texts = _lines(path).head(_PEEK_LINES).collect()["text"].drop_nulls().to_list()
    return [text.strip() for text in texts if text.strip()]


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _blocks(scanned: pl.LazyFrame) -> Iterator[pl.DataFrame]:
    yield from scanned.collect_batches(chunk_size=BLOCK_ROWS, maintain_order=True, engine="streaming")


# ---- columns --------------------------------------------------------------------------------------------------


def _selected(layout: Layout, column: Callable[[str], pl.Expr]) -> list[pl.Expr]:
    failed = [_failed(name, column(name)) for name in layout.failures]
    return [
        pl.col(_ROW).cast(pl.Int64).alias("line"),
        column(layout.arrival).alias("arrival"),
        column(layout.prompt).alias("prompt"),
        column(layout.generated).alias("generated"),
        (pl.when(pl.any_horizontal(failed)).then(pl.lit(FAILED)) if failed else pl.lit(None, pl.String)).alias(
            "left_out"
        ),
    ]


def _failed(name: str, text: pl.Expr) -> pl.Expr:
    """Whether a column says that a request failed: an error that is there, a status that is not a good one."""
    text, name = text.str.strip_chars().str.to_lowercase().fill_null(""), name.lower()
    text = text.str.replace(r"^([+-]?\d+)\.0*$", "$1")
    if any(word in name for word in ("err", "fail", "cancel", "exception")):
        return ~text.is_in(_NO_ERROR)
    if "success" in name or name.rpartition(".")[2] == "ok":
        return ~text.is_in(_TRUE)
    return ~(text.is_in((*_OK, *_TRUE)) | text.str.contains(r"^2\d\d(\D|$)|^finished"))


def _with_unit(layout: Layout, where: str, samples: Sequence[str | None]) -> Layout:
    """The layout with the unit of its arrivals, of columns that the user named."""
    if layout.unit is not None:
        return layout
    first = next((text for text in samples if text), "")
    try:
        float(first)
    except ValueError:
        return replace(layout, unit=DATE_TIME)
    raise TraceError(
        f"{where}: {layout.arrival} = {first[:40]!r} is a number of unknown unit; add unit=s, ms, us or ns to --columns"
    )


# ---- CSV ------------------------------------------------------------------------------------------------------


def _csv(path: Path, header: str, columns: Columns) -> TraceFile:
    separator = max(_DELIMITERS, key=header.count)
    names = [name.strip().strip("\ufeff") for name in next(csv.reader([header], delimiter=separator))]
    if all(_is_number(name) for name in names if name):
        raise TraceError(f"{path}:1: {header[:60]!r} is no header; write the names of the columns into the first line")
    layout = recognised(names, columns, f"{path}:1")
    for name in (layout.arrival, layout.prompt, layout.generated):
        if names.count(name) > 1:
            raise TraceError(f"{path}:1: column {name} is there {names.count(name)} times; leave one")
    scanned = pl.scan_csv(
        path,
        infer_schema=False,
        separator=separator,
        row_index_name=_ROW,
        row_index_offset=2,
        encoding="utf8-lossy",
        with_column_names=lambda found: [f"{place} {name.strip()}" for place, name in enumerate(found)],
        glob=False,
    )
    places = {name: f"{place} {name}" for place, name in reversed(list(enumerate(names)))}
    selected = scanned.select(
        *_selected(layout, lambda name: pl.col(places.get(name, name))), junk=pl.lit(None, pl.String)
    )
    found = partial(_csv_blocks, path, selected, separator, len(names))
    samples = next(found(), pl.DataFrame(schema=SCHEMA))["arrival"].to_list()
    layout = _with_unit(layout, f"{path}:2", samples)
    line_of = partial(_line_of, path, separator)
    return TraceFile(path=path, container="CSV", layout=layout, numbered="line", _read=found, _line_of=line_of)


def _csv_blocks(path: Path, selected: pl.LazyFrame, separator: str, fields: int) -> Iterator[pl.DataFrame]:
    try:
        yield from _blocks(selected)
    except pl.exceptions.ComputeError as error:
        for line, text in _texts(path):
            found = len(next(csv.reader([text], delimiter=separator), ()))
            if found > fields:
                raise TraceError(f"{path}:{line}: has {found} fields where the header has {fields}") from None
        raise TraceError(f"{path}: cannot be read as CSV: {_first_line(error)}") from None


def _line_of(path: Path, separator: str, row: int) -> int:
    """The line on which a row begins; quoted texts may hold line ends. A row too long for csv: as if none did."""
    reader = csv.reader((text + "\n" for block in _blocks(_lines(path)) for text in block["text"]), delimiter=separator)
    line = 1
    try:
        for _ in range(row - 1):
            next(reader)
            line = reader.line_num + 1
    except (csv.Error, StopIteration):
        return row
    return line


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# ---- Parquet --------------------------------------------------------------------------------------------------


def _parquet(path: Path, columns: Columns) -> TraceFile:
    scanned = pl.scan_parquet(path, row_index_name=_ROW, row_index_offset=1, glob=False)
    schema = scanned.collect_schema()
    layout = recognised([name for name in schema.names() if name != _ROW], columns, str(path))
    kind = schema[layout.arrival]
    stamp = pl.col(layout.arrival)
    if kind.is_temporal():
        stamp = (
            stamp.dt.total_nanoseconds() if kind == pl.Duration else stamp.cast(pl.Datetime("ns")).dt.timestamp("ns")
        )
        layout = replace(layout, unit=TYPED_DATE_TIME)

    def column(name: str) -> pl.Expr:
        return (stamp if name == layout.arrival else pl.col(name)).cast(pl.String)

    selected = scanned.select(*_selected(layout, column), junk=pl.lit(None, pl.String))
    layout = _with_unit(layout, str(path), selected.head(BLOCK_ROWS).collect()["arrival"].to_list())
    return TraceFile(path=path, container="Parquet", layout=layout, numbered="row", _read=partial(_blocks, selected))


# ---- JSON -----------------------------------------------------------------------------------------------------


def _json(path: Path, first: Sequence[str], columns: Columns) -> TraceFile:
    objects = [found for text in first if isinstance(found := _parsed(text), dict)]
    if not objects or first[0].startswith("["):
        return _document(path, columns)
    for key, (rows_of, layout) in DOCUMENTS.items():
        if key in objects[0]:
            numbered, container = ("line", "JSON lines") if key == "resourceSpans" else ("request", "JSON")
            read = partial(_document_blocks, path, lambda: _objects(path), rows_of, numbered == "line")
            return TraceFile(path=path, container=container, layout=layout, numbered=numbered, _read=read)
    if "profile_export" in path.name and "input_config" in objects[0]:
        raise TraceError(f"{path}: holds aiperf's statistics, not its requests; give profile_export.jsonl beside it")
    return _flat_json(path, _lines(path), objects, columns, container="JSON lines", numbered="line")


def _flat_json(
    path: Path,
    lines: pl.LazyFrame,
    objects: Sequence[Mapping[str, Any]],
    columns: Columns,
    *,
    container: str,
    numbered: str,
) -> TraceFile:
    """Each text is an object that is one row; `objects` are some of them."""
    where = f"{path}:1" if numbered == "line" else str(path)
    paths = {name: path for found in objects for name, path in _paths(found)}
    layout = recognised(paths, columns, where)
    selected = lines.filter(pl.col("text").str.strip_chars() != "").select(
        *_selected(layout, lambda name: pl.col("text").str.json_path_match(paths.get(name) or _path(name))),
        junk=pl.when(~pl.col("text").str.json_path_match("$").str.starts_with("{").fill_null(value=False)).then("text"),
    )
    layout = _with_unit(layout, where, selected.head(_PEEK_LINES).collect()["arrival"].to_list())
    return TraceFile(path=path, container=container, layout=layout, numbered=numbered, _read=partial(_blocks, selected))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _paths(found: Mapping[str, Any], before: str = "", path: str = "$") -> Iterator[tuple[str, str]]:
    """Keys of an object and of those inside it, as `a.b`, and the JSON path of each."""
    for key, value in found.items():
        escaped = key.replace("\\", "\\\\").replace("'", "\\'")
        here = f"{path}['{escaped}']"
        yield before + key, here
        if isinstance(value, dict):
            yield from _paths(value, f"{before}{key}.", here)


def _path(name: str) -> str:
    """The JSON path of a name of a known format, which the first objects may lack."""
    return "$" + "".join(f"['{key}']" for key in name.split("."))


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    for block in _blocks(_lines(path)):
        yield from ((line, text) for line, text in block.iter_rows() if text.strip())


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line and object of every line."""
    for line, text in _texts(path):
        found = _parsed(text)
        if not isinstance(found, dict):
            raise TraceError(f"{path}:{line}: {text.strip()[:60]!r} is not a JSON object")
        yield line, found


def _document(path: Path, columns: Columns) -> TraceFile:
    """JSON over several lines: one of the known documents, or a list of objects that are rows."""
    whole = "\n".join(text for _, text in _texts(path))
    try:
        content = json.loads(whole)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise TraceError(f"{path}:{line}: is not JSON, neither as a whole nor line by line") from None
    if isinstance(content, dict):
        for key, (rows_of, layout) in DOCUMENTS.items():
            if key in content:
                read = partial(_document_blocks, path, lambda: iter([(1, content)]), rows_of, False)
                return TraceFile(path=path, container="JSON", layout=layout, numbered="request", _read=read)
    objects = content if isinstance(content, list) else [content]
    if not objects or not all(isinstance(found, dict) for found in objects):
        raise TraceError(f"{path}: holds neither a known document nor a list of requests as objects")
    lines = pl.LazyFrame({_ROW: range(1, len(objects) + 1), "text": [json.dumps(found) for found in objects]})
    return _flat_json(path, lines, objects, columns, container="JSON", numbered="request")


def _document_blocks(
    path: Path,
    objects: Callable[[], Iterator[tuple[int, Mapping[str, Any]]]],
    rows_of: Callable[[Mapping[str, Any]], Iterator[Row]],
    by_line: bool,
) -> Iterator[pl.DataFrame]:
    rows: list[tuple[object, ...]] = []
    count = 0
    for line, found in objects():
        try:
            for row in rows_of(found):
                count += 1
                rows.append((line if by_line else count, *row, None))
        except TraceError as error:
            raise TraceError(f"{path}:{line}: {error}") from None
        if len(rows) >= BLOCK_ROWS:
            yield pl.DataFrame(rows, SCHEMA, orient="row")
            rows = []
    yield pl.DataFrame(rows, SCHEMA, orient="row")
