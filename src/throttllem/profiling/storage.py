"""Performance tables on disk: one compressed npz per engine size, with a mark and a version.

Knows nothing of how a table is made, nor of where tables are stored.
"""

from __future__ import annotations

import json
import tokenize
import zipfile
import zlib
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

from throttllem.core.forecast.performance_table import Calibrated, Hull, PerformanceTable, TableVerdict
from throttllem.core.forecast.switch_latency import ProfiledSwitches
from throttllem.files import write_aside
from throttllem.physics.model import Model

MARK = "throttllem performance table"
VERSION = 4
UNJUDGED = 3
"""The version before, without the verdict of `train` and the basis of a calibrated law."""
UNMARKED = 2
"""The version before that, which does not record whether the clock axis was measured."""
ARRAYS = {
    "batch_bin": np.int32,
    "kv_bin": np.int32,
    "prefill_bin": np.int32,
    "seconds": np.float32,
    "watts": np.float32,
}

_DAMAGED = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError),
    *(MemoryError, RuntimeError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)
"""numpy, zipfile and zlib have different errors for a truncated file, for another format, and for sizes that lie; numpy
reads an array's head as Python."""


class TableFileError(ValueError):
    """A file that is not a performance table, or of an unknown version; the message names it."""


def save_table(table: PerformanceTable, path: Path) -> None:
    """Write one table; the file appears whole or not at all."""
    arrays = {name: getattr(table, name) for name in ARRAYS}
    hull = np.array(list(asdict(table.hull).values()), dtype=np.int64)
    clocks = np.array(table.clocks_mhz, dtype=np.int64)
    if table.calibrated is not None:
        basis = table.calibrated
        arrays["calibrated_at_mhz"] = np.array(basis.clocks_mhz, dtype=np.int64)
        arrays["calibrated_errors"] = np.array([basis.seconds_error, basis.watts_error])
    if table.switches:
        arrays["switch_clocks_mhz"] = np.array([each.mhz for each in table.switches], dtype=np.int64)
        arrays["switch_counts"] = np.array([each.count for each in table.switches], dtype=np.int64)
        arrays["switch_within_s"] = np.array([each.within_s for each in table.switches])
    with write_aside(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(
            file,
            mark=np.array(MARK),
            version=np.array(VERSION),
            clocks_mhz=clocks,
            clocks_measured=np.array(table.clocks_measured),
            hull=hull,
            gpu=np.array(table.gpu or ""),
            model=np.array(table.model or ""),
            verdict=np.array(json.dumps(None if table.verdict is None else asdict(table.verdict))),
            **arrays,
        )


def load_table(path: Path) -> PerformanceTable:
    """Read one table. Raises TableFileError for a file that is missing, damaged, newer, or not a table."""
    try:
        # Opened here, as numpy leaves a file open that it cannot read.
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            return _table(path, dict(loaded))
    except FileNotFoundError as error:
        raise TableFileError(f"{path}: no such file") from error
    except _DAMAGED as error:
        if isinstance(error, TableFileError):
            raise
        raise TableFileError(f"{path}: not a performance table, or damaged ({error}); bake it again") from error


def profiled_model(table: PerformanceTable, path: Path) -> Model | None:
    """The model that was profiled; None: not known. Raises TableFileError for figures that are none."""
    try:
        return None if table.model is None else Model.model_validate_json(table.model)
    except ValueError as error:
        raise TableFileError(f"{path}: its model is damaged ({error}); bake it again") from error


def _table(path: Path, parts: dict[str, np.ndarray]) -> PerformanceTable:
    if str(parts.get("mark")) != MARK:
        raise TableFileError(f"{path}: not a performance table of throttllem")
    version = int(parts["version"])
    if version not in (UNMARKED, UNJUDGED, VERSION):
        raise TableFileError(f"{path}: table version {version}, this is version {VERSION}; bake it again")
    for name, dtype in ARRAYS.items():
        if parts[name].dtype != dtype:
            raise TableFileError(f"{path}: {name} holds {parts[name].dtype}, not {np.dtype(dtype)}; bake it again")
    names = [item.name for item in fields(Hull)]
    return PerformanceTable(
        clocks_mhz=tuple(int(clock) for clock in parts["clocks_mhz"]),
        hull=Hull(**{name: int(value) for name, value in zip(names, parts["hull"], strict=True)}),
        clocks_measured=_depend_on_clock(parts["seconds"]) if version == UNMARKED else bool(parts["clocks_measured"]),
        verdict=_verdict(parts["verdict"]) if version == VERSION else None,
        calibrated=_calibrated(parts),
        gpu=str(parts.get("gpu", "")) or None,
        model=str(parts.get("model", "")) or None,
        switches=_switches(parts),
        **{name: parts[name] for name in ARRAYS},
    )


def _verdict(text: np.ndarray) -> TableVerdict | None:
    found = json.loads(str(text))
    if found is None:
        return None
    texts = {name: tuple(found.get(name, ())) for name in ("faults", "doubts")}
    return TableVerdict(**(found | texts))


def _calibrated(parts: dict[str, np.ndarray]) -> Calibrated | None:
    if "calibrated_at_mhz" not in parts:
        return None
    seconds_error, watts_error = parts["calibrated_errors"].tolist()
    return Calibrated(
        clocks_mhz=tuple(parts["calibrated_at_mhz"].tolist()), seconds_error=seconds_error, watts_error=watts_error
    )


def _switches(parts: dict[str, np.ndarray]) -> tuple[ProfiledSwitches, ...]:
    if "switch_clocks_mhz" not in parts:
        return ()
    columns = [parts[name].tolist() for name in ("switch_clocks_mhz", "switch_counts", "switch_within_s")]
    return tuple(
        ProfiledSwitches(mhz=int(mhz), count=int(count), within_s=float(within_s))
        for mhz, count, within_s in zip(*columns, strict=True)
    )


def _depend_on_clock(seconds: np.ndarray) -> bool:
    """Whether seconds depend on the clock in any cell; with a single clock they do not."""
    return not np.allclose(seconds, seconds[:, -1:], rtol=1e-3, atol=0.0)
