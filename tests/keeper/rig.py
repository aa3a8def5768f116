"""Fixtures: a machine of two fake GPUs that switch at once, keepers on it, and processes of other users."""

import json
import os
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.keeper.client import Client
from tests.keeper.processes import keeper_processes
from throttllem.keeper.journal import Journal, boot_id, journal_paths
from tools.nvml.machine import Machine, a100
from tools.testbed.private import private_folder

BOOT = boot_id()
SWEEP_S = 0.05
TTL_S = 0.3
"""Short, for tests in which it passes."""
LONG_S = 30.0
"""For leases that shall not expire."""
NOBODY = 65534
is_root = os.geteuid() == 0
needs_root = pytest.mark.skipif(not is_root, reason="only root can become another user")


def until(true, within_s=2.0):
    """Wait until it holds; 2 s is what docs/keeper.md guarantees. Its value."""
    ends_s = time.monotonic() + within_s
    while not (found := true()):
        assert time.monotonic() < ends_s, f"it does not hold within {within_s} s"
        time.sleep(0.003)
    return found


def locks(machine):
    """Of all its GPUs."""
    return [gpu.lock for gpu in machine.gpus]


@pytest.fixture(scope="session")
def library(nvml_library):
    """In a folder that other users may read."""
    with tempfile.TemporaryDirectory(prefix="nvml") as made:
        Path(made).chmod(0o755)
        yield shutil.copytree(nvml_library, Path(made) / "library")


@pytest.fixture(scope="session")
def processes(library):
    with keeper_processes(library) as made:
        yield made


@pytest.fixture
def folder():
    """With a short path, since those of sockets are limited, and open to other users."""
    with private_folder("keeper") as made:
        yield made


@pytest.fixture
def machine(library, folder):
    with Machine.create(folder / "gpus", a100(2, switch_ms=(0, 0)), library=library) as made:
        (folder / "gpus").chmod(0o666)
        for gpu in made.gpus:
            gpu.root_only(is_root)
        yield made


@pytest.fixture
def keepers(processes, folder, machine):
    """Starts keepers; none outlives the test."""
    made = []

    def make(*, wait=True, **options):
        made.append(Keeper(processes, folder, machine, **options))
        return made[-1].ready() if wait else made[-1]

    yield make
    for each in made:
        each.end()


@pytest.fixture
def keeper(keepers):
    return keepers()


@pytest.fixture
def client(keeper):
    with keeper.client() as made:
        yield made


class Keeper:
    """A keeper in its own process. `clocks`: by GPU's number."""

    def __init__(
        self,
        processes,
        folder,
        machine,
        *,
        clocks=((210, 1410), (600, 1410)),
        baselines=None,
        users=(),
        environment=None,
        what="keep",
        **more,
    ):
        self._processes, self.machine = processes, machine
        self.uuids = [gpu.uuid for gpu in machine.gpus]
        self.run, self.state, self.log = folder / "run", folder / "state", folder / "keeper.log"
        self.socket = self.run / "keeper.sock"
        self.run.mkdir(exist_ok=True)
        self.log.touch()
        arguments = ["--socket", str(self.socket), "--state", str(self.state)]
        for uuid, (low, high) in zip(self.uuids, clocks, strict=False):
            arguments += ["--gpu", f"{uuid}={low}-{high}"]
        for number, (low, high) in (baselines or {}).items():
            arguments += ["--normally", f"{self.uuids[number]}={low}-{high}"]
        for user in users:
            arguments += ["--user", str(user)]
        self.arguments = arguments
        self.environment = machine.environment() | (environment or {})
        self.pid = processes.start(what, self.log, self.environment, arguments=arguments, **more)
        self.copies = journal_paths(self.state, self.socket)
        self._code, self._clients = None, []

    def ready(self):
        """Itself, once it answers."""
        until(lambda: self.listens() or self._gone(), 10)
        return self

    def listens(self):
        """Whether it answers."""
        with suppress(OSError), Client(self.socket) as client:
            return client.request("status")["ok"]
        return False

    def _gone(self):
        assert self._processes.exit_code(self.pid) is None, self.logged
        return False

    @property
    def logged(self):
        """Its log."""
        return self.log.read_text()

    @property
    def journal(self):
        """What it contains now, in either copy."""
        return Journal(self.copies, BOOT).read()

    def client(self):
        """A connection, closed at the end of the test."""
        self._clients.append(Client(self.socket))
        return self._clients[-1]

    def status(self):
        with self.client() as client:
            return client.ok("status")

    def holds(self, *numbers, mhz=None, ttl_s=LONG_S):
        """A connection with a lease on these GPUs, set to a clock if one is given."""
        client = self.client()
        requests = [{"op": "lease", "gpus": [self.uuids[n] for n in numbers or range(len(self.uuids))], "ttl_s": ttl_s}]
        if mhz is not None:
            requests.append({"op": "set", "mhz": mhz})
        client.send(
            b"".join(json.dumps(request).encode() + b"\n" for request in requests)
        )  # at once: the lease is short
        for answer in [client.receive() for _ in requests]:
            assert answer["ok"], answer
        return client

    def signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        """With SIGKILL; it has ended when this returns."""
        self.signal(signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def stop(self, within_s=4.0):
        """With SIGTERM, as systemd does; its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(within_s)

    def wait(self, within_s=4.0):
        self._code = self._processes.wait(self.pid, within_s)
        return self._code

    def end(self):
        for client in self._clients:
            client.close()
        if self._code is None:
            with suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            self._processes.wait(self.pid)

    def other(self, what, **given):
        """Run another process to its end; what it printed, line by line."""
        log = self.log.with_name(f"{what}-{time.monotonic_ns()}.log")
        log.touch()
        log.chmod(0o666)
        pid = self._processes.start(what, log, self.environment, **given)
        self._processes.wait(pid)
        return [json.loads(line) for line in log.read_text().splitlines()]

    def begun(self, what, **given):
        """Start another process; its id and its log. The test ends it."""
        log = self.log.with_name(f"{what}.log")
        return self._processes.start(what, log, self.environment, **given), log
