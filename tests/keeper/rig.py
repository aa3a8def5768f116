"""Fixtures: a machine of two fake GPUs that switch at once, keepers on it, and whoever else is needed."""

import json
import os
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.keeper.nursery import Nursery
from tests.keeper.talk import Talk
from throttllem.keeper.journal import Journal, places
from tools.nvml import build
from tools.nvml.machine import Machine, a100

BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
SWEEP_S = 0.05
TTL_S = 0.3
"""Short, for tests that wait for it to pass."""
LONG_S = 30.0
"""For leases that shall not end by themselves."""
NOBODY = 65534
is_root = os.geteuid() == 0
needs_root = pytest.mark.skipif(not is_root, reason="only root can become another user")


def until(true, within_s=2.0):
    """Wait until something is so; 2 s is what the keeper promises."""
    ends_s = time.monotonic() + within_s
    while not (found := true()):
        assert time.monotonic() < ends_s, f"not so within {within_s} s"
        time.sleep(0.003)
    return found


def locks(machine):
    """Of all its GPUs."""
    return [gpu.lock for gpu in machine.gpus]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """Compiled once for all workers, and then where other users may read it."""
    base = tmp_path_factory.getbasetemp()
    built = build.library((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "libnvidia-ml")
    with tempfile.TemporaryDirectory(prefix="nvml") as made:
        Path(made).chmod(0o755)
        yield shutil.copytree(built, Path(made) / "library")


@pytest.fixture(scope="session")
def nursery(library):
    made = Nursery(library)
    yield made
    made.close()


@pytest.fixture
def folder():
    """With a short name, as sockets want it, and open to other users."""
    made = Path(tempfile.mkdtemp(prefix="kept"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def machine(library, folder):
    with Machine.create(folder / "gpus", a100(2, switch_ms=(0, 0)), library=library) as made:
        (folder / "gpus").chmod(0o666)
        for gpu in made.gpus:
            gpu.root_only(is_root)
        yield made


@pytest.fixture
def keepers(nursery, folder, machine):
    """Makes keepers; none outlives the test."""
    made = []

    def make(*, wait=True, **options):
        made.append(Keeper(nursery, folder, machine, **options))
        return made[-1].ready() if wait else made[-1]

    yield make
    for each in made:
        each.end()


@pytest.fixture
def keeper(keepers):
    return keepers()


@pytest.fixture
def talk(keeper):
    with keeper.talk() as made:
        yield made


class Keeper:
    """A keeper in a process of its own. `clocks`: by GPU's number."""

    def __init__(
        self,
        nursery,
        folder,
        machine,
        *,
        clocks=((210, 1410), (600, 1410)),
        normally=None,
        users=(),
        environment=None,
        what="keep",
        **more,
    ):
        self._nursery, self.machine = nursery, machine
        self.uuids = [gpu.uuid for gpu in machine.gpus]
        self.run, self.state, self.log = folder / "run", folder / "state", folder / "keeper.log"
        self.socket = self.run / "keeper.sock"
        self.run.mkdir(exist_ok=True)
        self.log.touch()
        arguments = ["--socket", str(self.socket), "--state", str(self.state)]
        for uuid, (low, high) in zip(self.uuids, clocks, strict=False):
            arguments += ["--gpu", f"{uuid}={low}-{high}"]
        for number, (low, high) in (normally or {}).items():
            arguments += ["--normally", f"{self.uuids[number]}={low}-{high}"]
        for user in users:
            arguments += ["--user", str(user)]
        self.arguments = arguments
        self.environment = machine.environment() | (environment or {})
        self.pid = nursery.start(what, self.log, self.environment, arguments=arguments, **more)
        self.copies = places(self.state, self.socket)
        self._code, self._talks = None, []

    def ready(self):
        """Itself, once it answers."""
        until(lambda: self.listens() or self._gone(), 10)
        return self

    def listens(self):
        """Whether it answers."""
        with suppress(OSError), Talk(self.socket) as talk:
            return talk.ask("status")["ok"]
        return False

    def _gone(self):
        assert self._nursery._order(do="wait", pid=self.pid, within_s=0) is None, self.said
        return False

    @property
    def said(self):
        """Its log."""
        return self.log.read_text()

    @property
    def journal(self):
        """What it holds now, in either copy."""
        return Journal(self.copies, BOOT).read()

    def talk(self):
        """A connection, closed with the test at the latest."""
        self._talks.append(Talk(self.socket))
        return self._talks[-1]

    def status(self):
        with self.talk() as talk:
            return talk.done("status")

    def holds(self, *numbers, mhz=None, ttl_s=LONG_S):
        """A connection with a lease on these GPUs, set to a clock if one is given."""
        talk = self.talk()
        talk.done("lease", gpus=[self.uuids[number] for number in numbers or range(len(self.uuids))], ttl_s=ttl_s)
        if mhz is not None:
            talk.done("set", mhz=mhz)
        return talk

    def signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        """As the kernel does it; gone when this returns."""
        self.signal(signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def stop(self, within_s=4.0):
        """As systemd does it; its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(within_s)

    def wait(self, within_s=4.0):
        self._code = self._nursery.wait(self.pid, within_s)
        return self._code

    def end(self):
        for talk in self._talks:
            talk.close()
        if self._code is None:
            with suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            self._nursery.wait(self.pid)

    def other(self, what, **given):
        """Another process, for its whole life; what it printed, line by line."""
        log = self.log.with_name(f"{what}-{time.monotonic_ns()}.log")
        log.touch()
        log.chmod(0o666)
        pid = self._nursery.start(what, log, self.environment, **given)
        self._nursery.wait(pid)
        return [json.loads(line) for line in log.read_text().splitlines()]

    def begun(self, what, **given):
        """Another process, left running; its id and its log. The test ends it."""
        log = self.log.with_name(f"{what}.log")
        return self._nursery.start(what, log, self.environment, **given), log
