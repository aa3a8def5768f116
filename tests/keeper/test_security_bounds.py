"""The second half of docs/keeper.md's guarantees: nothing is exhausted, clocks are restored, and root runs little."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.keeper.rig import locks, until
from tests.keeper.test_size import KEEPER, MOST_LINES, OURS, code_lines
from tests.keeper.test_socket import GARBAGE
from throttllem.keeper.__main__ import CONNECTIONS, LINE_BYTES, Door
from throttllem.keeper.unit import unit_text

# ---- what it cannot exhaust -----------------------------------------------------------------------------------


def resident_bytes(keeper):
    status = Path(f"/proc/{keeper.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024


def test_memory_is_bounded(keeper):
    before = resident_bytes(keeper)
    talks = [keeper.talk() for _ in range(CONNECTIONS - 1)]
    for talk in talks:
        talk.socket.settimeout(0.004)
        with pytest.raises(OSError):
            while True:
                talk.say(b'{"op": "status"}\n' * 50)
        with pytest.raises(OSError):
            while True:
                talk.say(b" " * LINE_BYTES)
    assert resident_bytes(keeper) - before < 32 * 2**20
    for talk in talks:
        talk.close()
    assert until(keeper.listens)


def test_connections_are_bounded(keeper):
    with keeper.holds(mhz=900) as talk:
        inside = [keeper.talk() for _ in range(CONNECTIONS - 1)]
        inside[-1].done("status")
        with keeper.talk() as one_more:
            assert one_more.hung_up()
        assert talk.done("beat")
        for one in inside:
            one.close()
        unread = []
        for _ in range(2 * CONNECTIONS):
            assert until(keeper.listens)
            unread.append(keeper.talk())
            unread[-1].say(b'{"op": "status"}\n' * 300 + b"garbage\n")
            unread[-1].socket.shutdown(socket.SHUT_WR)
        assert until(lambda: len(list(Path(f"/proc/{keeper.pid}/fd").iterdir())) < CONNECTIONS)
        assert talk.done("beat")
        for one in unread:
            one.close()


class Mute:
    """A client's end that takes every answer."""

    def __init__(self, end):
        self.get_extra_info = lambda _: end
        self.transport = self

    def write(self, answer):
        pass

    async def drain(self):
        pass

    def abort(self):
        pass


async def turns_of_others(requests):
    """How often the rest has its turn while so many requests are there already."""
    turns, done = 0, False

    async def other():
        nonlocal turns
        while not done:
            turns += 1
            await asyncio.sleep(0)

    reader = asyncio.StreamReader(limit=LINE_BYTES)
    reader.feed_data(b'{"op":"beat"}\n' * requests)
    reader.feed_eof()
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        others = asyncio.ensure_future(other())
        await Door(None, frozenset([os.geteuid()])).enter(reader, Mute(ours))
        done = True
        await others
    return turns


def test_nobody_is_held_up_by_a_flood(keeper, machine):
    assert asyncio.run(turns_of_others(requests=500)) >= 500
    talks = [keeper.talk() for _ in range(CONNECTIONS - 4)]
    stop = threading.Event()

    def flood():
        """Everything that the sockets take, all the time; and every answer is taken, so that no bound on them helps."""
        while not stop.is_set():
            for talk in talks:
                with contextlib.suppress(OSError):
                    talk.socket.send(b'{"op":"beat"}\n' * 8000)
                with contextlib.suppress(OSError):
                    talk.socket.recv(2**20)

    for talk in talks:
        talk.done("status")
        talk.socket.setblocking(False)
    flooding = threading.Thread(target=flood)
    with keeper.holds(mhz=900, ttl_s=0.5):
        flooding.start()
        try:
            until(lambda: locks(machine) == [None, None], 6.0)  # a flood takes its share of the processor, and no more
        finally:
            stop.set()
            flooding.join()


def test_garbage_ends_only_its_own_connection(keeper, machine):
    with keeper.holds(mhz=900) as talk:
        for said in GARBAGE:
            with keeper.talk() as other:
                other.say(said)
                assert other.hung_up()
        assert talk.done("beat")
        assert locks(machine) == [(900, 900)] * 2


def test_its_log_is_bounded(keeper):
    for _ in range(100):
        with keeper.talk() as talk:
            talk.done("lease", gpus=keeper.uuids, ttl_s=1)
            talk.done("release")
            talk.say(b"\xff" * (LINE_BYTES - 1) + b"\n")
            assert talk.hung_up()
    assert max(map(len, keeper.said.splitlines())) < 400
    for kind in ("released by its holder", "is cut off"):
        assert 50 <= keeper.said.count(kind) < 75


# ---- whatever happens, clocks are restored -------------------------------------------------------------------------


def test_nothing_is_locked_that_the_next_keeper_would_not_know(keepers, machine):
    first = keepers(normally={0: (705, 705)})
    talk = first.holds()
    machine.fault("nvmlDeviceSetGpuLockedClocks", kill="before", gpu=0, times=1)
    talk.say({"op": "set", "mhz": 900})
    assert first.wait() == -signal.SIGKILL
    assert first.journal == {first.uuids[0]: (705, 705), first.uuids[1]: None}


def test_a_killed_keeper_is_made_good_within_two_seconds(keepers, machine):
    first = keepers(normally={0: (705, 705)})
    with first.holds(mhz=900):
        first.kill()
    begun_s = time.monotonic()
    keepers(wait=False, normally={0: (705, 705)})
    until(lambda: locks(machine) == [(705, 705), None], 1.9 - (time.monotonic() - begun_s))  # RestartSec is 0.1 s


def test_only_a_stated_baseline_is_restored(keepers, machine):
    """Nothing is inferred from a clock: a lock that another program set before the lease is reset."""
    machine.gpus[0].lock_by_other(705, 705)
    machine.gpus[1].lock_by_other(705, 705)
    keeper = keepers(normally={1: (600, 1200)})
    keeper.holds(mhz=900).close()
    until(lambda: locks(machine) == [None, (600, 1200)])


def test_a_gpu_that_hangs_holds_no_other_up(keeper, machine):
    with keeper.holds(mhz=900):
        machine.fault("nvmlDeviceResetGpuLockedClocks", sleep_s=0.8, gpu=0, times=1)
    begun_s = time.monotonic()
    until(lambda: machine.gpus[1].lock is None, 0.5)
    with keeper.holds(1, mhz=1005):
        assert machine.gpus[1].lock == (1005, 1005)
    assert machine.gpus[0].lock == (900, 900)
    until(lambda: locks(machine) == [None, None], 2.0 - (time.monotonic() - begun_s))


@pytest.mark.slow
def test_a_keeper_with_a_gpu_that_hangs_for_ever_still_ends(keeper, keepers, machine):
    with keeper.holds(mhz=900):
        machine.fault("nvmlDeviceResetGpuLockedClocks", sleep_s=60, gpu=0, times=1)
        until(lambda: keeper.signal(signal.SIGTERM) is None and machine.gpus[1].lock is None)
    assert keeper.wait(8) == 0, "TimeoutStopSec of the unit"
    machine.clear_faults()
    keepers()
    until(lambda: locks(machine) == [None, None])


def test_a_refusal_is_not_the_last_word(keeper, machine):
    with keeper.holds(mhz=900):
        machine.gpus[0].permission(False)
    until(lambda: machine.gpus[1].lock is None)
    time.sleep(0.3)
    machine.gpus[0].permission(True)
    until(lambda: locks(machine) == [None, None], 1.0)


def test_one_keeper_at_a_time(keeper, keepers):
    other = keepers(wait=False)
    until(lambda: "another keeper runs there" in other.said)
    assert keeper.status()


def test_the_socket_cannot_be_taken_away_for_long(keeper):
    keeper.socket.unlink()
    with socket.socket(socket.AF_UNIX) as impostor:
        impostor.bind(str(keeper.socket))
        until(keeper.listens, 2.0)


# ---- what root runs -------------------------------------------------------------------------------------------


def test_what_root_runs_is_small():
    assert sum(len(code_lines(path.read_text())) for path in KEEPER.glob("*.py")) <= MOST_LINES
    assert len(OURS) == 9


def test_the_service_has_no_more_rights_than_it_needs():
    unit = unit_text(["/usr/bin/python3"], Path("/run/throttllem/keeper.sock"), Path("/var/lib/throttllem"))
    lines = set(unit.splitlines())
    assert {line for line in lines if line.startswith("CapabilityBoundingSet")} == {
        "CapabilityBoundingSet=CAP_SYS_ADMIN"
    }
    for line in ("NoNewPrivileges=yes", "ProtectSystem=strict", "PrivateNetwork=yes", "DevicePolicy=closed"):
        assert line in lines
    assert "RestrictAddressFamilies=AF_UNIX" in lines
