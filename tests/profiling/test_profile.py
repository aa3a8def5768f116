from __future__ import annotations

import datetime
import io
import math
import re
import tempfile
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings

from tests.fuzz.properties import mutated
from throttllem.profiling.profile import COLUMNS, OPTIONAL, ProfileError, read_profile, spec_of, write_profile

from .analytic import spec

HEADER = "gpu,model,tp,block_tokens,batch,kv_blocks,clock_mhz,prefill_tokens,seconds,watts"
GOOD = "a100-40gb-sxm,llama-2-13b,2,64,32,410,1410,0,0.0187,612"
DOCUMENT = Path(__file__).parents[2] / "docs" / "profile-format.md"


def write(folder: Path, *lines: str) -> Path:
    path = folder / "profile.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["p.csv", "p.parquet"])
def test_written_and_read_again(tmp_path: Path, measured: pl.DataFrame, name: str) -> None:
    write_profile(measured, tmp_path / name)
    assert read_profile(tmp_path / name, sizes=(1, 2, 4)).equals(measured)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_engine_has_the_clocks_that_were_measured_of_its_size(measured: pl.DataFrame) -> None:
    """Whatever it could be set to: a table is baked for these."""
    others = measured.filter((pl.col("tp") == 2) | pl.col("clock_mhz").is_in([735, 1260]))
    assert spec_of(others, spec(1, clocks_mhz=(210, 1410, 1500))) == spec(1, clocks_mhz=(735, 1260))
    assert spec_of(others, spec(2, clocks_mhz=(1500,))) == spec(2)


def test_a_good_row(tmp_path: Path) -> None:
    frame = read_profile(write(tmp_path, HEADER, GOOD))
    assert frame.row(0) == ("a100-40gb-sxm", "llama-2-13b", 2, 64, 32, 410, 1410, 0, 0.0187, 612.0)


def test_other_columns_and_another_order_do_no_harm(tmp_path: Path) -> None:
    shuffled = "note,watts," + HEADER.removesuffix(",watts")
    frame = read_profile(write(tmp_path, shuffled, "x,612," + GOOD.removesuffix(",612")))
    assert frame.columns == [column.name for column in COLUMNS]
    assert frame["watts"].to_list() == [612.0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.0187", "abc", "line 3, column seconds: 'abc': not a finite number"),
        ("0.0187", "NaN", "line 3, column seconds: 'NaN': not a finite number"),
        ("0.0187", "inf", "line 3, column seconds: 'inf': not a finite number"),
        ("0.0187", "", "line 3, column seconds: None: no value"),
        ("0.0187", "0", "line 3, column seconds: '0': must be above 0"),
        ("0.0187", "-0.01", "line 3, column seconds: '-0.01': must be above 0"),
        (",612", ",0", "line 3, column watts: '0': must be above 0"),
        (",32,", ",0,", "line 3, column batch: '0': must be at least 1"),
        (",32,", ",1.5,", "line 3, column batch: '1.5': not a whole number"),
        (",32,", ",1e30,", "line 3, column batch: '1e30': too large a number"),
        (",1410,0,", ",1410,-1,", "line 3, column prefill_tokens: '-1': must be at least 0"),
        (",2,64", ",8,64", "line 3, column tp: 8: unknown engine size; known: 1, 2, 4"),
        (",64,", ",16,", "line 3, column block_tokens: 16: a profile is of one block_tokens, and row 1 says 64"),
        ("llama-2-13b", "llama-3-8b", "line 3, column model: 'llama-3-8b': a profile is of one model"),
    ],
)
def test_a_bad_value_is_named_with_its_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write(tmp_path, HEADER, GOOD, GOOD.replace(old, new))
    with pytest.raises(ProfileError, match=re.escape(f"{path}, {message}")):
        read_profile(path, sizes=(1, 2, 4))


def test_a_bad_parquet_row_is_named(tmp_path: Path, measured: pl.DataFrame) -> None:
    path = tmp_path / "p.parquet"
    bad = measured.with_row_index().with_columns(
        seconds=pl.when(pl.col("index") == 4).then(float("nan")).otherwise(1.0)
    )
    bad.write_parquet(path)
    with pytest.raises(ProfileError, match=r"p.parquet, row 5, column seconds: nan: not a finite number"):
        read_profile(path)


def test_a_column_of_another_type(tmp_path: Path, measured: pl.DataFrame) -> None:
    path = tmp_path / "p.parquet"
    measured.with_columns(batch=pl.lit([1])).write_parquet(path)
    with pytest.raises(ProfileError, match=r"column batch"):
        read_profile(path)


def test_missing_columns_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"missing column clock_mhz, watts; there are: gpu"):
        read_profile(write(tmp_path, HEADER.replace("clock_mhz,", "").replace(",watts", "")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", b"{}", "ends with .parquet or .csv"),
        ("p.csv", b"", "cannot be read as csv"),
        ("p.csv", HEADER.encode() + b"\n", "no rows"),
        ("p.parquet", b"nothing of the kind", "cannot be read as parquet"),
    ],
)
def test_files_that_are_no_profile(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ProfileError, match=message):
        read_profile(tmp_path / name)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no such file"):
        read_profile(tmp_path / "absent.csv")


def test_the_documented_example_is_a_profile(tmp_path: Path) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    example = text.split("```csv\n")[1].split("```")[0]
    assert read_profile(write(tmp_path, *example.splitlines())).height >= 3
    assert all(f"`{column.name}`" in text for column in (*COLUMNS, *OPTIONAL))


# ---- damage ------------------------------------------------------------------------------------------------------


def packed() -> bytes:
    names = HEADER.split(",")
    values: list[object] = ["a100-40gb-sxm", "llama-2-13b", 2, 64, 32, 410, 1410, 0, 0.0187, 612.0]
    out = io.BytesIO()
    pl.DataFrame({name: [value] * 20 for name, value in zip(names, values, strict=True)}).write_parquet(out)
    return out.getvalue()


CSV_TEXT = "\n".join([HEADER, GOOD, GOOD]).encode()
ODD = [b"nan", b"inf", b"1e999", b"9" * 400, b"", b'"', b",", b"\x00", b"\xff", b"\n"]


@settings(max_examples=40, deadline=None)
@given(parquet=mutated(packed()), text=mutated(CSV_TEXT, tokens=ODD))
def test_a_damaged_profile_is_read_or_refused_with_its_name(parquet: bytes, text: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (("p.parquet", parquet), ("p.csv", text)):
            path = Path(folder) / name
            path.write_bytes(content)
            try:
                read_profile(path)
            except ProfileError as error:
                assert str(path) in str(error)


@pytest.mark.parametrize(
    "values",
    [[[2]], [{"a": 2}], [b"2"], [None], [datetime.date(2020, 1, 1)], [True], [math.nan], [math.inf], [1e300], [-1], []],
    ids=str,
)
@pytest.mark.parametrize("name", ["gpu", "tp", "seconds"])
def test_a_column_of_another_type_is_read_or_refused_with_its_name(
    tmp_path: Path, values: list[object], name: str
) -> None:
    path = tmp_path / "p.parquet"
    good = pl.read_parquet(io.BytesIO(packed())).head(len(values))
    good.with_columns(pl.Series(name, values)).write_parquet(path)
    try:
        read_profile(path)
    except ProfileError as error:
        assert str(path) in str(error)


def test_a_parquet_file_that_makes_its_reader_panic_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(path: Path) -> pl.DataFrame:
        raise pl.exceptions.PanicException("index out of bounds")

    path = tmp_path / "p.parquet"
    path.write_bytes(packed())
    monkeypatch.setattr(pl, "read_parquet", panic)
    with pytest.raises(ProfileError, match=r"p.parquet: cannot be read as parquet: index out of bounds"):
        read_profile(path)
