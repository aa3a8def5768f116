"""Three scenes, and what `throttllem doctor` says in each: `python -m tests.doctor.scenes`.

No GPU; a GPU without permission; a GPU whose clock stands still. The latter two as a user without rights.
"""

import os
import re
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.keeper.nursery import Nursery
from tools.nvml import build
from tools.nvml.machine import Machine, a100

NOBODY = 65534
NAMES = {
    "no-gpu": "a machine without a GPU",
    "not-permitted": "a GPU whose clocks this user may not set, and no keeper",
    "steady": "a GPU whose clock stands still, here since another program has locked it",
}


class Ward:
    """Where the doctor comes: a folder with a keeper's places in it."""

    def __init__(self, nursery, folder):
        self._nursery, self.folder = nursery, folder
        self.socket, self.state = folder / "run/keeper.sock", folder / "state"

    def doctor(self, *options, machine=None, uid=None):
        """Its exit code, and what it said; of another user where we are root."""
        places = ["--socket", str(self.socket), "--state", str(self.state)]
        log = self.folder / "doctor.log"
        log.unlink(missing_ok=True)
        pid = self._nursery.start(
            "examine",
            log,
            machine.environment() if machine else {},
            arguments=[*options, *places],
            uid=uid if os.geteuid() == 0 else None,
        )
        code = self._nursery.wait(pid, 30)
        said = log.read_text().replace(str(self.socket.parent), "/run/throttllem")
        return code, said.replace(str(self.state), "/var/lib/throttllem")


def scene(name, ward, nursery, library):
    """The doctor's exit code, and what it says, with the usual places in the place of ours."""
    with ExitStack() as stack:
        if name == "no-gpu":
            stack.enter_context(nursery.without_driver())
            return ward.doctor()
        machine = stack.enter_context(Machine.create(ward.folder / "gpus", a100(1), library=library))
        machine.file.chmod(0o666)
        machine.gpus[0].permission(False)
        if name == "steady":
            machine.gpus[0].lock_by_other(1005, 1005)
        return ward.doctor(machine=machine, uid=NOBODY)


def masked(said):
    """Without what differs from run to run, and from user to user."""
    said = re.sub(r"user \d+( \([^)]*\))?", "user N", said)
    said = re.sub(r"refreshed every \d+ ms", "refreshed every N ms", said)
    return re.sub(r"now \d+ MHz, \d+ of", "now N MHz, N of", said)


def main():
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o755)
        library = build.library(folder / "library")
        nursery = Nursery(library)
        for name, words in NAMES.items():
            code, said = scene(name, Ward(nursery, folder), nursery, library)
            print(f"# {words} (exit code {code})\n{said}")
        nursery.close()


if __name__ == "__main__":
    main()
