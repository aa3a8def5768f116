"""Rows of a trace file, as text, become requests: numbers are checked, failed requests are left out and counted.

Knows nothing of formats and files, but for the words that an error needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import polars as pl

from throttllem.sim.traces.formats import DATE_TIME, UNITS_NS, Layout
from throttllem.sim.traces.generators import TraceError

SCHEMA = {
    "line": pl.Int64,
    "arrival": pl.String,
    "prompt": pl.String,
    "generated": pl.String,
    "left_out": pl.String,
    "junk": pl.String,
}
"""Of rows as a reader gives them. `left_out`: why it is no request; `junk`: a line that is no row at all."""
FAILED = "failed"
"""Why a row is left out."""
MOST_TOKENS = 2**31 - 1
_MOST_NS = 9e18
_NULLS = ("", "null", "none", "nan", "na", "n/a", "-")
_STAMP = "must be a time like 2023-11-16 18:17:03.9799600, or, of numbers, name their unit with --columns unit=s"
_WHOLE = "must be a whole number of tokens; another column is named with --columns"


@dataclass(slots=True)
class Skipped:
    """Rows left out, by reason."""

    by_reason: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """All rows left out."""
        return self.by_reason.total()


def requests_of(rows: pl.DataFrame, layout: Layout, at: Callable[[int], str], skipped: Skipped) -> pl.DataFrame:
    """Columns line, at_ns, prompt, generated of the rows that are requests, in their order.

    Rows of failed requests and those without tokens are counted in `skipped`; empty rows are not rows. `at` says
    where the row of a number is, to begin an error. Raises TraceError for a value that is wrong.
    """
    for line, text in rows.filter(pl.col("junk").is_not_null()).select("line", "junk").head(1).iter_rows():
        raise TraceError(f"{at(line)}: {text.strip()[:60]!r} is not a JSON object")
    texts = [pl.col(name).str.strip_chars() for name in ("arrival", "prompt", "generated")]
    rows = rows.with_columns(*(pl.when(~text.str.to_lowercase().is_in(_NULLS)).then(text) for text in texts))
    rows = rows.filter(
        pl.any_horizontal(pl.col("arrival", "prompt", "generated").is_not_null()) | pl.col("left_out").is_not_null()
    )
    rows = rows.with_columns(prompt_tokens=_tokens("prompt"), generated_tokens=_tokens("generated"))
    rows = rows.with_columns(at_ns=_stamps_ns(rows["arrival"]) if layout.unit == DATE_TIME else _times_ns(layout.unit))
    reason = (
        pl.when(pl.col("left_out").is_not_null())
        .then(pl.col("left_out"))
        .when(pl.col("generated").is_null() | (pl.col("generated_tokens") == 0))
        .then(pl.lit("no output tokens"))
        .when(pl.col("prompt").is_null() | (pl.col("prompt_tokens") == 0))
        .then(pl.lit("no prompt tokens"))
    )
    rows = rows.with_columns(reason=reason)
    skipped.by_reason.update(rows["reason"].drop_nulls().to_list())
    rows = rows.filter(pl.col("reason").is_null())
    rules = (
        ("arrival", "at_ns", layout.arrival, _STAMP if layout.unit == DATE_TIME else _number(layout.unit)),
        ("prompt", "prompt_tokens", layout.prompt, _WHOLE),
        ("generated", "generated_tokens", layout.generated, _WHOLE),
    )
    bad = rows.filter(pl.any_horizontal(pl.col(checked).is_null() for _, checked, _, _ in rules)).head(1)
    for row in bad.iter_rows(named=True):
        text, column, rule = next((row[raw], name, rule) for raw, value, name, rule in rules if row[value] is None)
        shown = "is missing" if text is None else f"= {text[:60]!r}"
        raise TraceError(f"{at(row['line'])}: {column} {shown}: {rule}")
    return rows.select("line", "at_ns", prompt="prompt_tokens", generated="generated_tokens")


def _number(unit: str | None) -> str:
    return f"must be a number of {unit}; another unit, or a column of times, is named with --columns"


def _tokens(name: str) -> pl.Expr:
    """Whole numbers, also as `374.0`; null for what is none."""
    number = pl.col(name).cast(pl.Float64, strict=False)
    whole = number.is_between(0, MOST_TOKENS) & (number == number.floor())
    return pl.when(whole).then(number.cast(pl.Int64, strict=False))


def _times_ns(unit: str | None) -> pl.Expr:
    scale = UNITS_NS.get(unit or "", 1)
    number = pl.col("arrival").cast(pl.Float64, strict=False)
    whole = pl.col("arrival").cast(pl.Int64, strict=False) * scale
    inside = (number * scale).abs() < _MOST_NS
    return pl.when(inside).then(pl.coalesce(whole, (number * scale).round().cast(pl.Int64, strict=False)))


def _stamps_ns(texts: pl.Series) -> pl.Series:
    """Of date-times; those of Azure's form in a quarter of the time that offsets and `T` take."""
    plain = texts.str.strip_suffix("+00:00").str.strptime(pl.Datetime("ns"), "%Y-%m-%d %H:%M:%S%.f", strict=False)
    found = plain.dt.replace_time_zone("UTC")
    if found.null_count() > texts.null_count():
        other = texts.str.replace(r"(\d)T(\d)", "$1 $2").str.replace(r"(Z| ?UTC)$", "+00:00")
        offset = other.str.contains(r":\S*[+-]\d\d:?\d\d$")
        other = other.zip_with(offset, other + "+00:00")
        found = other.str.strptime(pl.Datetime("ns", "UTC"), "%Y-%m-%d %H:%M:%S%.f%:z", strict=False)
    # Nanoseconds wrap around outside of these years.
    inside = texts.str.slice(0, 5).is_between(pl.lit("1970-"), pl.lit("2199-"))
    return found.dt.timestamp("ns").zip_with(inside.fill_null(value=False), pl.Series([None], dtype=pl.Int64))
