"""Three scenes, and the report of `throttllem doctor` in each: `python -m tests.doctor.scenes`.

No GPU; a GPU without permission; a GPU whose clock stands still. The latter two as a user without rights.
"""

import os
import re
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.keeper.processes import keeper_processes
from tools.nvml import build
from tools.nvml.machine import Machine, a100

NOBODY = 65534
NAMES = {
    "no-gpu": "a machine without a GPU",
    "not-permitted": "a GPU whose clocks this user may not set, and no keeper",
    "steady": "a GPU whose clock stands still, here since another program has locked it",
}


class Ward:
    """A folder with the paths of a keeper, and the doctor that examines them."""

    def __init__(self, processes, folder):
        self._processes, self.folder = processes, folder
        self.socket, self.state = folder / "run/keeper.sock", folder / "state"

    def doctor(self, *options, machine=None, uid=None):
        """Its exit code and its output; as another user where the tests run as root."""
        places = ["--socket", str(self.socket), "--state", str(self.state)]
        log = self.folder / "doctor.log"
        log.unlink(missing_ok=True)
        pid = self._processes.start(
            "examine",
            log,
            machine.environment() if machine else {},
            arguments=[*options, *places],
            uid=uid if os.geteuid() == 0 else None,
        )
        code = self._processes.wait(pid, 30)
        output = log.read_text().replace(str(self.socket.parent), "/run/throttllem")
        return code, output.replace(str(self.state), "/var/lib/throttllem")


def scene(name, ward, processes, library):
    """The doctor's exit code and output, with the default paths instead of those of the test."""
    with ExitStack() as stack:
        if name == "no-gpu":
            stack.enter_context(processes.without_driver())
            return ward.doctor()
        machine = stack.enter_context(Machine.create(ward.folder / "gpus", a100(1), library=library))
        machine.file.chmod(0o666)
        machine.gpus[0].permission(False)
        if name == "steady":
            machine.gpus[0].lock_by_other(1005, 1005)
        return ward.doctor(machine=machine, uid=NOBODY)


def masked(output):
    """Without what differs between runs and users."""
    output = re.sub(r"user \d+( \([^)]*\))?", "user N", output)
    output = re.sub(r"refreshed every \d+ ms", "refreshed every N ms", output)
    return re.sub(r"now \d+ MHz, \d+ of", "now N MHz, N of", output)


def main():
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o755)
        library = build.library(folder / "library")
        with keeper_processes(library) as processes:
            for name, words in NAMES.items():
                code, output = scene(name, Ward(processes, folder), processes, library)
                print(f"# {words} (exit code {code})\n{output}")


if __name__ == "__main__":
    main()
