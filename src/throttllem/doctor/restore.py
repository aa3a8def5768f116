"""`doctor --restore`: restores what a dead keeper left locked, by its journal; a GPU that is named is reset instead.

The keeper's folder is held meanwhile, so that no keeper starts. No other GPU is touched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from throttllem.doctor.finding import Finding, note, ok, trouble
from throttllem.doctor.gpus import HANG_S
from throttllem.doctor.keeper_state import collected_log, open_journal, read_keeper_state
from throttllem.doctor.rights import missing_right, this_user
from throttllem.doctor.timeouts import call_within
from throttllem.files import hold_dir
from throttllem.gpu.clock_range import ClockRange
from throttllem.gpu.locks import LockableGpu
from throttllem.gpu.nvml import Nvml, NvmlError
from throttllem.keeper.folder import UnsafeError, open_folder
from throttllem.keeper.journal import Journal

_REMEDY = "try again; a reset of the GPU or a reboot unlocks it, too"


def restore(state: Path, socket: Path, named: Sequence[str]) -> Iterator[Finding]:
    """Restore the GPUs, and yield each finding before the next step. `named`: UUIDs of GPUs to reset, whatever locked
    them; empty: every GPU in the journal is restored. Raises ValueError for a GPU that is not here, WriteError.
    """
    if missing := missing_right():
        yield trouble(
            "restore", f"{this_user()} may not set clocks (missing: {missing})", "run it with sudo, on the host"
        )
        return
    with collected_log() as messages:
        try:
            with ExitStack() as stack:
                gpus = _Gpus(call_within(HANG_S, lambda: stack.enter_context(Nvml())))
                yield from _restore(gpus, state, socket, named)
                if gpus.hang:  # closing NVML would hang, too
                    stack.pop_all()
        except (NvmlError, TimeoutError) as error:
            yield trouble("restore", f"not done: {error}", _REMEDY)
    for message in messages:
        yield note("journal", message)


class _Gpus:
    """Restores GPUs. `hang`: whether a call has not returned."""

    def __init__(self, nvml: Nvml) -> None:
        self.nvml, self.hang = nvml, False

    def restore(self, uuid: str, baseline: ClockRange | None) -> str | None:
        """The error; None: it is restored."""
        try:
            call_within(HANG_S, lambda: LockableGpu(self.nvml, uuid).restore(baseline))
        except (NvmlError, TimeoutError) as error:
            self.hang |= isinstance(error, TimeoutError)
            return str(error)
        return None


def _restore(gpus: _Gpus, state: Path, socket: Path, named: Sequence[str]) -> Iterator[Finding]:
    found = call_within(HANG_S, gpus.nvml.gpus).values()
    here = [uuid for uuid in found if isinstance(uuid, str)]
    for uuid in named:
        if uuid not in here:
            unreadable = "".join(f"; {error}" for error in found if isinstance(error, NvmlError))
            raise ValueError(f"--gpu {uuid}: is not here; here are {', '.join(here) or 'none'}{unreadable}")
    try:
        with open_folder(socket.parent, make=True):
            pass
    except UnsafeError as error:
        yield trouble("restore", f"not done: {error}", "no keeper runs there; name the folder of its socket (--socket)")
        return
    hold = hold_dir(socket.parent)
    try:
        if named:
            yield from _reset_named(gpus, state, socket, named, held=hold is not None)
        elif hold is None:
            yield note("restore", f"a keeper runs on {socket.parent}: it restores GPUs that are under no lease")
        else:
            yield from _restore_journaled(gpus, open_journal(state, socket))
    finally:
        if hold is not None:
            os.close(hold)


def _restore_journaled(gpus: _Gpus, journal: Journal) -> Iterator[Finding]:
    left = journal.read()
    if journal.damaged:
        journal.replace_damaged(left)
        yield trouble(
            "restore",
            "the journal was damaged: a GPU that it named may still be locked",
            "start the keeper, which restores every GPU that it may set, or reset one with `--restore --gpu UUID`",
        )
    elif not left:
        yield ok("restore", "no keeper left anything locked")
        return
    remaining = dict(left)
    for uuid, baseline in left.items():
        if error := gpus.restore(uuid, baseline):
            yield trouble("restore", f"not restored: {error}", _REMEDY)
        else:
            del remaining[uuid]
            yield ok(
                "restore", f"{uuid} is restored to its baseline, {baseline}" if baseline else f"{uuid} is unlocked"
            )
    journal.write(remaining)


def _reset_named(gpus: _Gpus, state: Path, socket: Path, named: Sequence[str], *, held: bool) -> Iterator[Finding]:
    """Reset these GPUs, unless a keeper runs that holds or restores them. `held`: its folder is held, none runs."""
    keeper, journal = read_keeper_state(state, socket), open_journal(state, socket)
    left = journal.read()
    for uuid in named:
        if not held and (not keeper.status or keeper.holder_of(uuid) or keeper.restoring(uuid)):
            holder = keeper.holder_of(uuid) or "a client that it does not show"
            yield trouble(
                "restore",
                f"{uuid} is not touched: the keeper holds it for {holder}",
                "stop that client; then it is restored",
            )
            continue
        yield note("restore", f"resetting {uuid}, whatever locked it")
        if error := gpus.restore(uuid, None):
            yield trouble("restore", f"not reset: {error}", _REMEDY)
            continue
        yield ok("restore", f"{uuid} is unlocked")
        if held and uuid in left:
            del left[uuid]
            journal.write(left)
