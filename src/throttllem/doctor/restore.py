"""`doctor --restore`: what a dead keeper left locked is restored: to its stated baseline, else its clocks are reset. A
GPU that is named is reset.

Holds the keeper's folder meanwhile, so that none starts in between. Touches nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from throttllem.doctor.finding import Finding, note, ok, trouble
from throttllem.doctor.gpus import HANG_S
from throttllem.doctor.keeping import ask_keeper, heard, journal_of
from throttllem.doctor.rights import missing_right, who
from throttllem.doctor.waiting import within
from throttllem.files import hold_dir
from throttllem.gpu.locks import LockableGpu
from throttllem.gpu.nvml import Lock, Nvml, NvmlError
from throttllem.keeper.journal import Journal

Tell = Callable[[Finding], None]
_AGAIN = "try again; a reset of the GPU or a reboot unlocks it too"


def restore(state: Path, socket: Path, named: Sequence[str], tell: Tell) -> None:
    """Each finding is told before the next step is taken. `named`: UUIDs to reset, no matter what locked them;
    none: all that the journal names are restored. Raises ValueError for a GPU that is not here, WriteError.
    """
    if missing := missing_right():
        tell(trouble("restore", f"{who()} may not set clocks (missing: {missing})", "run it with sudo, on the host"))
        return
    with heard() as words:
        try:
            with ExitStack() as stack:
                hands = Hands(within(HANG_S, lambda: stack.enter_context(Nvml())))
                _restore(hands, state, socket, named, tell)
                if hands.hang:  # closing would hang too
                    stack.pop_all()
        except (NvmlError, TimeoutError) as error:
            tell(trouble("restore", f"not done: {error}", _AGAIN))
    for text in words:
        tell(note("journal", text))


class Hands:
    """Restores GPUs, and remembers whether one does not answer."""

    def __init__(self, nvml: Nvml) -> None:
        self.nvml, self.hang = nvml, False

    def restore(self, uuid: str, baseline: Lock | None) -> str | None:
        """Why it did not work; None if it did."""
        try:
            within(HANG_S, lambda: LockableGpu(self.nvml, uuid).restore(baseline))
        except (NvmlError, TimeoutError) as error:
            self.hang |= isinstance(error, TimeoutError)
            return str(error)
        return None


def _restore(hands: Hands, state: Path, socket: Path, named: Sequence[str], tell: Tell) -> None:
    found = within(HANG_S, hands.nvml.gpus).values()
    here = [uuid for uuid in found if isinstance(uuid, str)]
    for uuid in named:
        if uuid not in here:
            lacking = "".join(f"; {error}" for error in found if isinstance(error, NvmlError))
            raise ValueError(f"--gpu {uuid}: is not here; here are {', '.join(here) or 'none'}{lacking}")
    hold = hold_dir(socket.parent)
    try:
        if named:
            for finding in _reset(hands, state, socket, named, held=hold is not None):
                tell(finding)
        elif hold is None:
            tell(note("restore", f"a keeper runs on {socket.parent}: it restores by itself what is under no lease"))
        else:
            for finding in _restore_left(hands, journal_of(state, socket)):
                tell(finding)
    finally:
        if hold is not None:
            os.close(hold)


def _restore_left(hands: Hands, journal: Journal) -> Iterator[Finding]:
    """All that the journal names."""
    left = journal.read()
    if not left:
        yield ok("restore", "no keeper left anything locked")
        return
    remaining = dict(left)
    for uuid, baseline in left.items():
        if error := hands.restore(uuid, baseline):
            yield trouble("restore", f"not restored: {error}", _AGAIN)
        else:
            del remaining[uuid]
            yield ok("restore", f"{uuid} is {_words(baseline)}")
    journal.write(remaining)


def _reset(hands: Hands, state: Path, socket: Path, named: Sequence[str], *, held: bool) -> Iterator[Finding]:
    """Those that are named, unless a keeper has to do with them."""
    keeper, journal = ask_keeper(state, socket), journal_of(state, socket)
    left = journal.read()
    for uuid in named:
        if not held and (not keeper.status or keeper.holder_of(uuid) or keeper.returning(uuid)):
            by = keeper.holder_of(uuid) or "a holder that it does not show"
            remedy = "stop its holder; then it is restored"
            yield trouble("restore", f"{uuid} is left alone: the keeper holds it for {by}", remedy)
            continue
        yield note("restore", f"resetting {uuid}, no matter what locked it")
        if error := hands.restore(uuid, None):
            yield trouble("restore", f"not reset: {error}", _AGAIN)
            continue
        yield ok("restore", f"{uuid} is not locked any more")
        if held and uuid in left:
            left = {other: baseline for other, baseline in left.items() if other != uuid}
            journal.write(left)


def _words(baseline: Lock | None) -> str:
    return f"at its baseline again, {baseline[0]} to {baseline[1]} MHz" if baseline else "unlocked"
