"""The flight recorder: every event that a controller handled, its time, and the commands that followed.

Files are bounded, and each begins with a checkpoint of the controller, so that each replays on its own (docs/replay.md
has the format). Recording never holds up serving: a failure is logged once, and recording is tried again later. Knows
nothing of HTTP, and reads the controller for its checkpoint only.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from pathlib import Path
from typing import NamedTuple

from throttllem.core.controller import Controller
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.types import Command, Event, Observed, Stepped
from throttllem.gateway.flight import wire
from throttllem.gateway.flight.checkpoint import save, table_digest
from throttllem.gateway.flight.recordings import SCHEMA, Recordings, build, made_with, table_path, write_all
from throttllem.profiling.storage import save_table

_BUFFER_BYTES = 64 * 1024
_RUN_ITEMS = 1000
_RETRY_S = 60.0
_MODE = 0o600


class _Opened(NamedTuple):
    """A file with its header in it."""

    handle: int
    path: Path
    header_bytes: int


class Recorder:
    """Records one controller. The constructor touches no file: `start` does, before the controller's first event.

    `files` files of about `file_bytes` each are kept in `folder` per model, those of earlier starts included. `say` is
    called with a message when recording stops, and when it goes on. No method raises. While the next file is being
    opened in the background, lines wait in memory.
    """

    def __init__(
        self,
        folder: Path,
        controller: Controller,
        *,
        model: str,
        policy: str,
        file_bytes: int,
        files: int,
        say: Callable[[str], None],
    ) -> None:
        self.path: Path | None = None
        """The file that is being written; None while recording has stopped."""
        self._folder = folder
        self._controller = controller
        self._model = model
        self._policy = policy
        self._file_bytes = file_bytes
        self._say = say
        self._recordings = Recordings(folder, model, files)
        self._digests: dict[int, tuple[PerformanceTable, str]] = {}
        self._handle: int | None = None
        self._aside: Executor | None = None
        self._opening: Future[_Opened] | None = None
        self._lines: list[str] = []
        self._buffered = 0
        self._left = 0
        self._run_engine: int | None = None
        self._run_first = 0
        self._run_steps = 0
        self._run: list[float | list[float | int | None]] = []
        self._troubled = False
        self._retry_at_s: float | None = None
        self._closed = False

    def start(self, aside: Executor | None = None) -> None:
        """Open the first file, with the controller as it is now. `aside` opens later ones; None: `record` does."""
        self._guarded(self._rotate)
        self._aside = aside

    def record(self, calls: Sequence[tuple[float, Event, Sequence[Command] | None]]) -> None:
        """Note calls of `handle` as (now_s, event, commands), in order. `commands` None: it raised.

        The controller must be as the last of them left it: the next file may begin with a checkpoint.
        """
        if not calls:
            return
        self._guarded(self._take_opened)
        if self._handle is None and self._opening is None:
            self._try_again(calls[-1][0])
            return
        try:
            for now_s, event, commands in calls:
                if commands or commands is None or not self._packed(now_s, event):
                    self._end_run()
                    self._add(_line(now_s, event, commands))
                if len(self._run) >= _RUN_ITEMS:
                    self._end_run()
            if self._handle is None:
                self._wait_for_it()
            elif self._buffered >= _BUFFER_BYTES:
                self._write()
            if self._handle is not None and self._buffered >= self._left:
                self._rotate()
        except Exception as error:  # a recorder that fails must not fail a request
            self._stop(error)

    def flush(self) -> None:
        """Hand to the operating system what was recorded so far; to be called at least once a second."""
        self._guarded(self._take_opened)
        if self._handle is not None:
            self._guarded(self._write)

    def close(self) -> None:
        """Write the rest; nothing is recorded from now on."""
        if self._opening is not None:
            wait((self._opening,))
        self.flush()
        self._closed = True
        self._shut()

    # ---- lines -----------------------------------------------------------------------------------------------

    def _packed(self, now_s: float, event: Event) -> bool:
        """Add a bare step or an observation without commands to the current run of them, if it is one."""
        match event:
            case Stepped(started=(), finished=(), preempted=(), assumed=False):
                if event.engine != self._run_engine or event.iteration != self._run_first + self._run_steps:
                    self._begin_run(event.engine, event.iteration)
                self._run.append(now_s)
                self._run_steps += 1
                return True
            case Observed():
                if event.engine != self._run_engine:
                    self._begin_run(event.engine, 0)
                self._run.append([now_s, event.running, event.waiting, event.kv_blocks])
                return True
        return False

    def _begin_run(self, engine: int, first: int) -> None:
        if engine == self._run_engine and not self._run_steps:
            self._run_first = first  # observations alone do not show which iteration comes next
            return
        self._end_run()
        self._run_engine, self._run_first = engine, first

    def _end_run(self) -> None:
        if self._run:
            self._add(wire.dumps({"r": self._run_engine, "i": self._run_first, "q": self._run}) + "\n")
        self._run_engine, self._run, self._run_steps = None, [], 0

    def _add(self, line: str) -> None:
        self._lines.append(line)
        self._buffered += len(line)

    # ---- files -----------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Write the buffer to the file, as whole lines."""
        assert self._handle is not None
        self._end_run()
        if not os.fstat(self._handle).st_nlink:
            raise FileNotFoundError(f"{self.path} was removed")
        text = "".join(self._lines).encode()
        self._lines, self._buffered = [], 0
        self._left -= len(text)
        write_all(self._handle, text)

    def _rotate(self) -> None:
        """Close the file that is open, begin the next with a checkpoint, remove the oldest above the limit."""
        if self._handle is not None:
            self._write()
        self._shut()
        self._folder.mkdir(0o700, parents=True, exist_ok=True)
        fields = self._header()
        if self._aside is None:
            self._begin(self._open(fields))
        else:
            self._opening = self._aside.submit(self._open, fields)

    def _open(self, fields: dict[str, object]) -> _Opened:
        """A new file with its header: what is slow and does not need the controller."""
        header = (wire.dumps(fields) + "\n").encode()
        path = self._recordings.next_path()
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _MODE)
        try:
            write_all(handle, header)
            self._recordings.remove_old(path)
        except OSError:
            os.close(handle)
            path.unlink(missing_ok=True)
            raise
        return _Opened(handle, path, len(header))

    def _begin(self, opened: _Opened) -> None:
        self._handle, self.path = opened.handle, opened.path
        # A large checkpoint must not make every event the last of its file.
        self._left = max(self._file_bytes - opened.header_bytes, self._file_bytes // 2)
        if self._troubled:
            self._troubled = False
            self._report(f"flight recorder of {self._model}: records again, in {self.path}")

    def _take_opened(self) -> None:
        if self._opening is not None and self._opening.done():
            opening, self._opening = self._opening, None
            self._begin(opening.result())

    def _wait_for_it(self) -> None:
        """Keep what waits for the next file to be opened within bounds."""
        if self._buffered > self._file_bytes:
            raise TimeoutError("the next file could not be opened in time")

    def _header(self) -> dict[str, object]:
        """Everything that a replay needs; the controller last, which may be large."""
        tables = {str(tp): self._stored(table) for tp, table in self._controller.options.tables.items()}
        checkpoint = save(self._controller, self._stored)
        others = {digest for _, digest in self._digests.values()} - set(tables.values())
        return {
            "schema": SCHEMA,
            "build": build(),
            "made_with": made_with(),
            "model": self._model,
            "policy": self._policy,
            "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "tables": tables | {f"other {digest}": digest for digest in sorted(others)},
            **checkpoint,
        }

    def _stored(self, table: PerformanceTable) -> str:
        """The digest of a table that is on the disk. Made once; the table is held, so that its id stays its own."""
        if id(table) not in self._digests:
            self._digests[id(table)] = (table, table_digest(table))
        digest = self._digests[id(table)][1]
        path = table_path(self._folder, digest)
        if not path.exists():
            save_table(table, path)
            path.chmod(_MODE)
        return digest

    # ---- trouble ---------------------------------------------------------------------------------------------

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a recorder that fails must not fail a request
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        """Report it, unless it was reported, and drop what could not be written."""
        self._shut()
        self._lines, self._buffered, self._run = [], 0, []
        self._end_run()
        self._retry_at_s = None
        if not self._troubled:
            self._troubled = True
            self._report(f"flight recorder of {self._model}: stopped ({error}); it tries again every {_RETRY_S:.0f} s")

    def _try_again(self, now_s: float) -> None:
        """Open a new file, a while after recording stopped."""
        if self._closed:
            return
        if self._retry_at_s is None:
            self._retry_at_s = now_s + _RETRY_S
        if now_s < self._retry_at_s:
            return
        self._guarded(self._rotate)

    def _report(self, message: str) -> None:
        with contextlib.suppress(Exception):
            self._say(message)

    def _shut(self) -> None:
        handle, self._handle, self.path = self._handle, None, None
        if handle is not None:
            with contextlib.suppress(OSError):
                os.close(handle)
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.add_done_callback(_let_go)


def _let_go(opening: Future[_Opened]) -> None:
    """Close a file that is no longer wanted."""
    if not opening.cancelled() and opening.exception() is None:
        os.close(opening.result().handle)


def _line(now_s: float, event: Event, commands: Sequence[Command] | None) -> str:
    line: dict[str, object] = {"t": now_s, "e": wire.to_json(event)}
    if commands is None:
        line["c"] = None
    elif commands:
        line["c"] = [wire.to_json(command) for command in commands]
    return wire.dumps(line) + "\n"
