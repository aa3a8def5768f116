"""Replay a flight record on this build: the same commands, or the first difference.

The controller continues from the record's checkpoint and handles every event at its recorded time. Knows nothing of
engines or HTTP: what they did is in the record.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from throttllem.core.controller import Controller
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.types import Event, Observed, Stepped
from throttllem.gateway.flight import wire
from throttllem.gateway.flight.checkpoint import CheckpointError, load, table_digest
from throttllem.gateway.flight.recordings import SCHEMA, build, made_with, table_path
from throttllem.profiling.storage import TableFileError, load_table

Json = list[dict[str, object]]

LONGEST_S = 10.0
"""The core may take this long for one event or checkpoint; those of a gateway take milliseconds."""


class ReplayError(ValueError):
    """A file that cannot be replayed; the message names it, the line, and what is wrong."""


class _TooLong(BaseException):
    """The core took too long; no part of it may catch this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first event at which this build gives other commands. `recorded`, `ours`: commands as JSON; None: `handle`
    raised, ours with `error`.
    """

    line: int
    at_s: float
    event: dict[str, object]
    recorded: Json | None
    ours: Json | None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """What a replay found. `events` and `commands`: how many of each kind were compared.

    `recorded_s` is the time that they span, `seconds` what the replay took. `cut_off`: the file ends within a line,
    which was left out. `doubts`: warnings about what has changed since the record was made.
    """

    file: Path
    model: str
    policy: str
    build: str
    build_matches: bool
    doubts: tuple[str, ...] = ()
    events: Mapping[str, int] = field(default_factory=dict)
    commands: Mapping[str, int] = field(default_factory=dict)
    first_difference: Difference | None = None
    recorded_s: float = 0.0
    seconds: float = 0.0
    cut_off: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """One call of `handle` as it was recorded."""

    line: int
    at_s: float
    event: Event
    commands: Json | None


def replay(path: Path, *, progress: Callable[[float], None] = lambda share: None) -> ReplayResult:
    """Replay one file up to the first difference. `progress` is called with the share that is done.

    Raises ReplayError for a file that is no flight record, or damaged elsewhere than at its end.
    """
    began_s = time.perf_counter()
    events: Counter[str] = Counter()
    commands: Counter[str] = Counter()
    difference = None
    try:
        with path.open("rb") as file:
            header = _header(path, file)
            with _bounded(path, 1):
                controller = _controller(path, header)
            lines = _Lines(path, file, progress)
            first_s = last_s = None
            for entry in lines.entries():
                if not math.isfinite(entry.at_s) or (last_s is not None and entry.at_s < last_s):
                    raise ReplayError(f"{path}:{entry.line}: t: {entry.at_s!r} is no time after {last_s!r}")
                first_s = entry.at_s if first_s is None else first_s
                last_s = entry.at_s
                events[type(entry.event).__name__] += 1
                commands.update(str(command.get("k")) for command in entry.commands or ())
                with _bounded(path, entry.line):
                    difference = _compare(controller, entry)
                if difference is not None:
                    break
    except OSError as error:
        raise ReplayError(f"{path}: cannot be read: {error.strerror}") from error
    return ReplayResult(
        file=path,
        model=str(header["model"]),
        policy=str(header["policy"]),
        build=str(header["build"]),
        build_matches=header["build"] == build(),
        doubts=_doubts(header),
        events=dict(sorted(events.items())),
        commands=dict(sorted(commands.items())),
        first_difference=difference,
        recorded_s=0.0 if first_s is None or last_s is None else last_s - first_s,
        seconds=time.perf_counter() - began_s,
        cut_off=lines.cut_off,
    )


@contextmanager
def _bounded(path: Path, line: int) -> Iterator[None]:
    """Raise ReplayError where the block takes more than `LONGEST_S`; signals reach the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
    try:
        yield
    except _TooLong:
        raise ReplayError(f"{path}:{line}: takes the core more than {LONGEST_S:g} s: no gateway recorded it") from None
    except MemoryError as error:
        raise ReplayError(f"{path}:{line}: takes more memory than there is: no gateway recorded it") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _compare(controller: Controller, entry: Call) -> Difference | None:
    ours: Json | None = None
    error = None
    try:
        ours = [wire.to_json(command) for command in controller.handle(entry.event, entry.at_s)]
    except Exception as raised:  # a failure of this build's core is a result of the replay
        error = f"{type(raised).__name__}: {raised}"
    if ours is entry.commands is None or wire.dumps(ours) == wire.dumps(entry.commands):
        return None
    return Difference(
        line=entry.line,
        at_s=entry.at_s,
        event=wire.to_json(entry.event),
        recorded=entry.commands,
        ours=ours,
        error=error,
    )


# ---- the header ----------------------------------------------------------------------------------------------


def _header(path: Path, file: BinaryIO) -> dict[str, object]:
    line = file.readline()
    if not line:
        raise ReplayError(f"{path}: is empty")
    header = _json(path, 1, line)
    if not isinstance(header, dict) or "schema" not in header:
        raise ReplayError(f"{path}:1: is no header of a flight record")
    if header["schema"] != SCHEMA:
        raise ReplayError(
            f"{path}:1: recorded with schema {_short(header['schema'])}, this build replays schema {SCHEMA} only: "
            f"replay it with the build that recorded it ({_short(header.get('build'))})"
        )
    for name in ("build", "model", "policy"):
        if not isinstance(header.get(name), str):
            raise ReplayError(f"{path}:1: the header has no {name}")
    for name in ("options", "predictor", "state"):
        if not isinstance(header.get(name), dict):
            raise ReplayError(f"{path}:1: the header has no {name}")
    if not line.endswith(b"\n"):
        raise ReplayError(f"{path}:1: was cut off in its header")
    return header


def _short(value: object) -> str:
    return repr(value)[:60]


def _controller(path: Path, header: Mapping[str, object]) -> Controller:
    def table(digest: str) -> PerformanceTable:
        file = table_path(path.parent, digest)
        found = load_table(file)
        if table_digest(found) != digest:
            raise TableFileError(f"{file}: is not the table that {path.name} was recorded with (its digest differs)")
        return found

    try:
        return load(header, table)
    except CheckpointError as error:
        builds = "" if header["build"] == build() else f" (recorded by build {header['build']!r}, this is {build()!r})"
        raise ReplayError(f"{path}:1: {error}{builds}") from error
    except TableFileError as error:
        raise ReplayError(f"{error}; a flight record needs the tables that were written beside it") from error


def _doubts(header: Mapping[str, object]) -> tuple[str, ...]:
    doubts = []
    if header["build"] != build():
        doubts.append(f"recorded by build {header['build']}, this is {build()}")
    then, now = header.get("made_with"), made_with()
    if isinstance(then, dict):
        doubts += [
            f"recorded with {name} {then[name]}, this is {now[name]}: last bits of numbers may differ"
            for name in now
            if name in then and then[name] != now[name] and name != "python"
        ]
    return tuple(doubts)


# ---- lines ---------------------------------------------------------------------------------------------------


class _Lines:
    """The lines after the header. `cut_off` is known once all are read."""

    def __init__(self, path: Path, file: BinaryIO, progress: Callable[[float], None]) -> None:
        self.cut_off = False
        self._path = path
        self._file = file
        self._progress = progress

    def entries(self) -> Iterator[Call]:
        """Every call of `handle`, in order. Raises ReplayError for a bad line."""
        size = max(1, self._path.stat().st_size)
        done = self._file.tell()
        for number, line in enumerate(self._file, start=2):
            if not line.endswith(b"\n"):
                self.cut_off = True
                break
            try:
                yield from calls(number, _json(self._path, number, line))
            except wire.WireError as error:
                raise ReplayError(f"{self._path}:{number}: {error}") from error
            done += len(line)
            self._progress(min(1.0, done / size))
        self._progress(1.0)


def _json(path: Path, number: int, line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ReplayError(f"{path}:{number}: is not JSON ({error})") from error


def calls(number: int, line: object) -> Iterator[Call]:
    """The calls of `handle` that one line, read from its JSON, stands for. Raises WireError."""
    match line:
        case {"r": int(engine), "i": int(first), "q": list(items)}:
            yield from _run(number, engine, first, items)
        case {"t": float() | int() as at_s, "e": event, **rest} if rest.keys() <= {"c"}:
            yield Call(number, at_s, wire.event_from(event), _commands(rest.get("c", [])))
        case _:
            raise wire.WireError("is neither an event (t, e, c) nor a run of steps (r, i, q)")


def _commands(commands: object) -> Json | None:
    if commands is None:
        return None
    if not isinstance(commands, list) or not all(isinstance(command, dict) for command in commands):
        raise wire.WireError("c: is no list of commands")
    return commands


def _run(number: int, engine: int, first: int, items: list[object]) -> Iterator[Call]:
    """Bare steps, a time each, and observations, all without commands."""
    iteration = first
    for item in items:
        match item:
            case float() | int() as at_s:
                yield Call(number, at_s, Stepped(engine=engine, iteration=iteration), [])
                iteration += 1
            case [float() | int() as at_s, int(running), int(waiting), (int() | None) as kv_blocks]:
                observed = Observed(engine=engine, running=running, waiting=waiting, kv_blocks=kv_blocks)
                yield Call(number, at_s, observed, [])
            case _:
                raise wire.WireError(f"q: {str(item)[:60]!r} is neither a time nor an observation")
