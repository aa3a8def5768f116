"""Engines as processes of this host.

Each leads a session of its own, so neither a signal to the gateway nor the gateway's death reaches it. A file in the
folder names its process: by number, by the time at which the kernel started it, and by the boot, as numbers are used
again. With it the next gateway finds the engine. One port has one engine: where something listens already, that is
taken to be the engine, and nothing is started. Knows nothing of readiness.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from throttllem.files import ensure_writable_dir, read_own, write_aside
from throttllem.launchers.base import NOT_RUN, Ended, EngineCommand, Launched, LaunchError
from throttllem.option_sources import PREFIX

log = logging.getLogger("throttllem.launchers")

_GATE = ("/bin/sh", "-c", 'read -r line && exec "$@" </dev/null', "engine")
"""Becomes the engine's command once it reads a line; ends where the gateway is gone before."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_REACH_S = 1.0
_LAST_BYTES = 400
_KILLED_S = 5.0
"""Within this time the kernel has ended what was killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """A process and what it was started with. `start_ticks`: since boot, as the kernel counts."""

    pid: int
    start_ticks: int
    boot: str
    words: tuple[str, ...]


@dataclass(slots=True, eq=False)
class _Running:
    """A process that is watched. `pidfd` becomes readable when it ends; `child`: this gateway started it."""

    record: _Record
    pidfd: int
    child: bool
    asked: bool = False
    """It was asked to end."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    why: str = ""


class LocalLauncher:
    """Keeps its files in `folder`, which no other gateway may use. An engine that is stopped has `stop_s` to end before
    it is killed.
    """

    def __init__(self, folder: Path, *, stop_s: float = 15.0) -> None:
        self._folder, self._stop_s = folder, stop_s
        self._running: dict[str, _Running] = {}

    async def launch(self, command: EngineCommand) -> Launched:
        """Start its process, adopt one of an earlier gateway, or leave alone what listens on its port already."""
        found = self._running.get(command.engine_id) or self._adopt(command.engine_id)
        if found is not None and found.record.words != command.words:
            log.warning("engine %s runs with an earlier command, and is stopped", command.engine_id)
            await self.stop(command.engine_id)
            found = None
        if found is None:
            if await _listens(command.host, command.port):
                return Launched(engine_id=command.engine_id)
            found = self._start(command)
        return self._launched(command.engine_id, found)

    async def stop(self, engine_id: str) -> None:
        """SIGTERM to its processes, then SIGKILL."""
        found = self._running.get(engine_id) or self._adopt(engine_id)
        if found is None:
            return
        found.asked = True
        for number, patience_s in ((signal.SIGTERM, self._stop_s), (signal.SIGKILL, _KILLED_S)):
            _signal(found, number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    await found.ended.wait()
                    return
        raise LaunchError(f"engine {engine_id}: process {found.record.pid} does not end")

    async def listed(self) -> tuple[Launched, ...]:
        """Those that are watched, and those of which an earlier gateway left a file."""
        if self._folder.is_dir():
            for file in sorted(self._folder.glob("*.json")):
                if file.stem not in self._running:
                    self._adopt(file.stem)
        return tuple(self._launched(engine_id, found) for engine_id, found in self._running.items())

    def close(self) -> None:
        """Watch none any more; those that run go on, for the next gateway."""
        for engine_id, found in list(self._running.items()):
            self._forget(engine_id, found)

    async def watch(self, engine_id: str) -> Ended:
        """Wait for its end: its status, and the last line of its log."""
        found = self._running.get(engine_id)
        if found is None:
            return NOT_RUN
        await found.ended.wait()
        return Ended(why=found.why, certain=True)

    def _launched(self, engine_id: str, found: _Running) -> Launched:
        incarnation = f"pid {found.record.pid}"
        return Launched(
            engine_id=engine_id, incarnation=incarnation, log=str(self._log(engine_id)), adopted=not found.child
        )

    # ---- processes -------------------------------------------------------------------------------------------

    def _start(self, command: EngineCommand) -> _Running:
        """Its process waits at a gate until it is noted. The output of the last run is kept beside that of this one."""
        file = self._log(command.engine_id)
        environment = _environment(command.environment)
        if shutil.which(command.words[0], path=environment.get("PATH")) is None:
            raise LaunchError(f"{command.words[0]} cannot be started: there is no such program")
        gate, opens = os.pipe()
        try:
            ensure_writable_dir(self._folder, private=True)
            if file.exists():
                file.replace(file.with_suffix(".log.1"))
            written = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            pid = os.posix_spawn(
                _GATE[0],
                (*_GATE, *command.words),
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, gate, 0),
                    (os.POSIX_SPAWN_OPEN, 1, file, written, 0o600),
                    (os.POSIX_SPAWN_DUP2, 1, 2),
                ],
                setsid=True,
                setsigmask=(),
                setsigdef=(signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
            )
            found = self._watched(command.engine_id, _record(pid, command.words), child=True)
            self._remember(command.engine_id, found)
            os.write(opens, b"\n")
        except OSError as error:
            raise LaunchError(f"{command.words[0]} cannot be started: {error.strerror or error}") from error
        finally:
            os.close(gate)
            os.close(opens)
        log.info("engine %s: process %d was started, output in %s", command.engine_id, pid, file)
        return found

    def _remember(self, engine_id: str, found: _Running) -> None:
        """An engine that no later gateway would find is not started."""
        try:
            with write_aside(self._file(engine_id), private=True) as aside:
                aside.write_text(json.dumps(asdict(found.record)))
        except OSError as error:
            found.asked = True
            _signal(found, signal.SIGKILL)
            raise LaunchError(f"engine {engine_id} is not started, as its process cannot be noted: {error}") from error

    def _adopt(self, engine_id: str) -> _Running | None:
        """The process that an earlier gateway started; None: there is none, or it has ended."""
        file = self._file(engine_id)
        try:
            fields = json.loads(read_own(file))
            record = _Record(**fields | {"words": tuple(fields["words"])})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("%s cannot be read, so no engine is adopted by it: %s", file, error)
            return None
        try:
            found = self._watched(engine_id, record, child=False)
        except OSError:
            found = None
        if found is None or not _is_there(record):
            if found is not None:
                self._forget(engine_id, found)
            file.unlink(missing_ok=True)
            return None
        log.info("engine %s: process %d of an earlier gateway was adopted", engine_id, record.pid)
        return found

    def _watched(self, engine_id: str, record: _Record, *, child: bool) -> _Running:
        found = _Running(record=record, pidfd=os.pidfd_open(record.pid), child=child)
        self._running[engine_id] = found
        asyncio.get_running_loop().add_reader(found.pidfd, self._ended, engine_id, found)
        return found

    def _ended(self, engine_id: str, found: _Running) -> None:
        """Its first process has ended, and the others of its session end with it: they would hold its GPUs."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(found.record.pid, signal.SIGKILL)
        status = ""
        if found.child:  # only after the signal: until then no other process gets this number
            _, code = os.waitpid(found.record.pid, 0)
            code = os.waitstatus_to_exitcode(code)
            status = f" by signal {signal.Signals(-code).name}" if code < 0 else f" with status {code}"
        found.why = "it was stopped" if found.asked else f"process {found.record.pid} ended{status}"
        if not found.asked and (last := _last_line(self._log(engine_id))):
            found.why += f"; its log ends: {last}"
        self._forget(engine_id, found)
        self._file(engine_id).unlink(missing_ok=True)
        found.ended.set()

    def _forget(self, engine_id: str, found: _Running) -> None:
        asyncio.get_running_loop().remove_reader(found.pidfd)
        os.close(found.pidfd)
        if self._running.get(engine_id) is found:
            del self._running[engine_id]

    def _file(self, engine_id: str) -> Path:
        return self._folder / f"{engine_id}.json"

    def _log(self, engine_id: str) -> Path:
        return self._folder / f"{engine_id}.log"


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """The gateway's variables without its own options, which may hold keys."""
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)} | dict(more)


async def _listens(host: str, port: int) -> bool:
    """Whether something accepts connections there."""
    try:
        async with asyncio.timeout(_REACH_S):
            _, writer = await asyncio.open_connection(host, port)
    except OSError:  # a timeout is one
        return False
    writer.close()
    return True


def _record(pid: int, words: tuple[str, ...]) -> _Record:
    return _Record(pid=pid, start_ticks=_start_ticks(pid), boot=_boot(), words=words)


def _is_there(record: _Record) -> bool:
    try:
        return record.boot == _boot() and record.start_ticks == _start_ticks(record.pid)
    except OSError:
        return False


def _boot() -> str:
    return _BOOT.read_text().strip()


def _start_ticks(pid: int) -> int:
    """Field 22 of /proc/PID/stat (proc_pid_stat(5)); the command before it may hold blanks and brackets."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _signal(found: _Running, number: signal.Signals) -> None:
    """To its whole group while the first process is there, so that the number is certainly its own."""
    if not found.ended.is_set():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(found.record.pid, number)


def _last_line(file: Path) -> str:
    try:
        with file.open("rb") as log_file:
            log_file.seek(max(0, file.stat().st_size - _LAST_BYTES))
            lines = log_file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
