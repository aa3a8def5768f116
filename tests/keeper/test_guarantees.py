"""The guarantees of docs/keeper.md, one test each, in the page's order. The last test compares the two lists."""

import ast
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.keeper.rig import LONG_S, NOBODY, TTL_S, locks, needs_root, until
from tests.keeper.test_imports import OURS, SOURCES, modules_of_the_process
from throttllem.keeper.leases import SETS_AT_ONCE, SETS_PER_S
from throttllem.keeper.server import CONNECTIONS, LINE_BYTES, Connection
from throttllem.keeper.unit import unit_text
from tools.nvml.machine import Op

PAGE = Path(__file__).parents[2] / "docs/keeper.md"
STATUS = {"op": "status"}
MALFORMED = [
    b"\n",
    b"hello\n",
    b"{}\n",
    b"[]\n",
    b"null\n",
    b"7\n",
    b'"status"\n',
    b'{"op"\n',
    b"\xff\xfe\x00\n",
    b"\0" * 100 + b"\n",
    b"[" * 4000 + b"\n",
    b'{"op": "lease"}\n',
    b'{"op": "lease", "gpus": 5, "ttl_s": 1}\n',
    b'{"op": "lease", "gpus": ["GPU-x"], "ttl_s": null}\n',
    b'{"op": "lease", "gpus": ["GPU-x"], "ttl_s": "soon"}\n',
    b'{"op": "lease", "gpus": ["GPU-x"], "ttl_s": ' + b"9" * 400 + b"}\n",
    b'{"op": "lease", "gpus": ["GPU-x"], "ttl_s": "1"}\n',
    b'{"op": "lease", "gpus": ["GPU-x"], "ttl_s": true}\n',
    b'{"op": "lease", "gpus": "GPU-x", "ttl_s": 1}\n',
    b'{"op": "lease", "gpus": {"GPU-x": 1}, "ttl_s": 1}\n',
    b'{"op": "lease", "gpus": [5], "ttl_s": 1}\n',
    b"GET / HTTP/1.1\r\n\r\n",
]


# ---- who may connect ------------------------------------------------------------------------------------------


@needs_root
def test_only_root_and_named_users_are_answered(keepers):
    keeper = keepers(users=[NOBODY])
    assert [answer["ok"] for answer in keeper.other("speak", socket=str(keeper.socket), uid=NOBODY, lines=[STATUS])]
    (answer,) = keeper.other("speak", socket=str(keeper.socket), uid=NOBODY - 1, lines=[STATUS])
    assert answer in ("ConnectionAbortedError", "ConnectionResetError", "BrokenPipeError")
    assert f"of user {NOBODY - 1}" not in keeper.logged, "disconnected before a byte of it is read"
    (answer,) = keeper.other("speak", socket=str(keeper.socket), uid=None, lines=[STATUS])
    assert answer["ok"]


@needs_root
def test_the_kernel_reports_the_user(keepers):
    keeper = keepers(users=[NOBODY])
    false_claims = {"uid": 0, "user": "root", "pid": 1, "holder": "process 1 of user 0"}
    lines = [{"op": "lease", "gpus": keeper.uuids, "ttl_s": LONG_S, **false_claims}, STATUS]
    _, answer = keeper.other("speak", socket=str(keeper.socket), uid=NOBODY, lines=lines)
    assert {each["by"].split(" of ")[1] for each in answer["held"].values()} == {f"user {NOBODY}"}


# ---- what a compromised client can do -------------------------------------------------------------------------


def test_it_can_set_only_gpus_that_are_allowed(keepers, machine):
    keeper = keepers(clocks=[(210, 1410)])
    with keeper.client() as client:
        for gpus in ([keeper.uuids[1]], keeper.uuids, ["GPU-x"], ["0"], [""], ["*"]):
            assert client.rejected("lease", gpus=gpus, ttl_s=LONG_S) == "not-allowed"
    assert machine.writes() == []


def test_it_can_set_only_clocks_in_range(keepers, machine):
    keeper = keepers(clocks=[(600, 1200), (600, 1200)])
    with keeper.holds() as client:
        for mhz in (599, 1201, 0, -900, 2**63):
            assert client.rejected("set", mhz=mhz) == "range"
        client.ok("set", mhz=1200)
        client.send({"op": "set", "mhz": "1100"})
        assert client.disconnected(), "a clock is a whole number"
    until(lambda: locks(machine) == [None, None])
    assert {(write.op, write.low, write.high) for write in machine.writes()} == {
        (Op.LOCK, 1200, 1200),
        (Op.UNLOCK, 0, 0),
    }


def test_it_can_do_nothing_else_to_a_gpu(keeper, machine):
    with keeper.holds() as client:
        for op in ("power", "power_limit", "limit", "persistence", "reset", "memory", "fan", "mig", "unlock", "exec"):
            assert client.rejected(op, mhz=900, watts=100, gpus=keeper.uuids) == "malformed"
        client.ok("set", mhz=900, low_mhz=1, high_mhz=2000, watts=100)
    until(lambda: locks(machine) == [None, None])
    assert {write.op for write in machine.writes()} <= {Op.LOCK, Op.UNLOCK}


def test_it_can_set_only_at_a_bounded_rate(keeper, machine):
    begun_s, done, refused = time.monotonic(), 0, 0
    while time.monotonic() < begun_s + 0.6:
        with keeper.holds() as client:  # a new lease gives no new burst
            while client.request("set", mhz=900)["ok"]:
                done += 1
            refused += 1
        until(lambda: not keeper.status()["held"] and not keeper.status()["returning"])
    assert refused > 1
    assert done <= SETS_AT_ONCE + SETS_PER_S * (time.monotonic() - begun_s) + 1
    assert sum(write.op is Op.LOCK for write in machine.writes()) == 2 * done


def test_it_can_hold_a_clock_only_with_heartbeats(keeper, machine):
    with keeper.client() as client:
        assert client.rejected("lease", gpus=keeper.uuids, ttl_s=60.001) == "malformed"
        client.ok("lease", gpus=keeper.uuids, ttl_s=TTL_S)
        client.ok("set", mhz=900)
        until(lambda: locks(machine) == [None, None], TTL_S + 0.5)


def test_it_cannot_keep_a_lock_after_its_death(keeper, processes, machine):
    given = {"socket": str(keeper.socket), "gpus": keeper.uuids, "mhz": 900, "ttl_s": LONG_S, "fork": False}
    pid, log = keeper.begun("hold_on", **given)
    until(lambda: log.exists() and "held" in log.read_text())
    assert locks(machine) == [(900, 900)] * 2
    os.kill(pid, signal.SIGKILL)
    until(lambda: locks(machine) == [None, None], 2.0)
    processes.wait(pid)


def test_it_cannot_leave_a_lock_to_a_child(keeper, processes, machine):
    given = {"socket": str(keeper.socket), "gpus": keeper.uuids, "mhz": 900, "ttl_s": 0.4, "fork": True}
    pid, log = keeper.begun("hold_on", **given)
    until(lambda: log.exists() and "held" in log.read_text())
    processes.wait(pid)
    assert locks(machine) == [(900, 900)] * 2, "the child has the connection, and sends nothing"
    until(lambda: locks(machine) == [None, None])
    os.killpg(pid, signal.SIGKILL)


def test_it_cannot_touch_the_lease_of_another_client(keeper, machine):
    with keeper.holds(0, mhz=900) as client, keeper.client() as other:
        assert other.rejected("lease", gpus=keeper.uuids[:1], ttl_s=1) == "held"
        assert [other.rejected(op, gpus=keeper.uuids[:1], mhz=1005) for op in ("set", "beat", "release")] == [
            "malformed"
        ] * 3
        other.ok("lease", gpus=keeper.uuids[1:], ttl_s=LONG_S)
        other.ok("set", mhz=1005, gpus=keeper.uuids)
        assert locks(machine) == [(900, 900), (1005, 1005)]
        other.ok("release")
        assert locks(machine) == [(900, 900), None]
        assert client.ok("beat")


def test_it_cannot_lock_a_shared_gpu(keeper, machine):
    machine.gpus[0].mig(True)
    machine.gpus[1].mps([4711])
    for number, sharing in enumerate(("MIG", "MPS")):
        with keeper.holds(number) as client:
            answer = client.request("set", mhz=900)
            assert (answer["code"], sharing in answer["error"]) == ("gpu", True)
    assert machine.writes() == []


# ---- what it cannot reach -------------------------------------------------------------------------------------


@needs_root
def test_it_cannot_reach_the_journal_nor_the_socket(keepers):
    keeper = keepers(users=[NOBODY])
    with keeper.holds(mhz=900):
        files = [*keeper.copies, keeper.run / ".lock", keeper.socket]
        done = keeper.other("touch", uid=NOBODY, paths=list(map(str, files)))
        assert all("written" not in each and "removed" not in each for each in done)
        assert keeper.journal == dict.fromkeys(keeper.uuids)


def test_it_cannot_change_what_is_allowed(keeper, client):
    before = keeper.status()
    for op in ("allow", "config", "reload", "status", "normally"):
        client.request(op, allowed={uuid: [1, 9999] for uuid in keeper.uuids}, gpu=["GPU-x=1-2"], users=[NOBODY])
    assert keeper.status() == before
    source = "".join(path.read_text() for path in SOURCES)
    assert "setattr" not in source
    assert "environ[" not in source


def test_it_cannot_make_the_keeper_open_run_or_reach_anything(keepers, folder):
    keeper = keepers(what="keep_watched", seen=str(folder / "seen"))
    keeper.holds(mhz=900).ok("release")  # first uses open and import more
    with keeper.client() as client:
        client.send(MALFORMED[0])
        client.disconnected()
    until(lambda: keeper.journal == {})
    (folder / "seen").write_text("")
    for line in MALFORMED:
        with keeper.client() as client:
            client.send(line)
            client.disconnected()
    paths = ["/etc/passwd", "../../x", "http://127.0.0.1:1/", str(folder / "secret"), "__import__('os')"]
    with keeper.client() as client:
        for path in paths:
            client.request("lease", gpus=[path], ttl_s=1, socket=path, state=path, file=path)
            client.request(path, path=path)
    with keeper.holds(mhz=900) as client:
        client.ok("release")
    until(lambda: keeper.journal == {})
    events = [json.loads(line) for line in (folder / "seen").read_text().splitlines()]
    own = {part for copy in keeper.copies for path in (copy, copy.with_suffix(".part")) for part in path.parts}
    made = ("os.rename", "os.remove", "open")
    unexpected = [event for event in events if event[0] not in made or event[1] not in own]
    assert [event for event in unexpected if event[0] != "os.chmod"] == []
    assert events, "the audit hook works: it saw the journal"


def test_requests_are_data(keeper):
    evaluating = {"eval", "exec", "compile", "__import__", "loads", "import_module", "getattr", "setattr", "system"}
    called = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)).split(".")[-1] in evaluating:
                called.add(name)
    assert called == {"json.loads"}


# ---- what it cannot exhaust -----------------------------------------------------------------------------------


def resident_bytes(keeper):
    status = Path(f"/proc/{keeper.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024


def test_memory_is_bounded(keeper):
    before = resident_bytes(keeper)
    clients = [keeper.client() for _ in range(CONNECTIONS - 1)]
    for client in clients:
        client.socket.settimeout(0.004)
        with pytest.raises(OSError):
            while True:
                client.send(b'{"op": "status"}\n' * 50)
        with pytest.raises(OSError):
            while True:
                client.send(b" " * LINE_BYTES)
    assert resident_bytes(keeper) - before < 32 * 2**20
    for client in clients:
        client.close()
    assert until(keeper.listens)


def test_connections_are_bounded(keeper):
    with keeper.holds(mhz=900) as client:
        inside = [keeper.client() for _ in range(CONNECTIONS - 1)]
        inside[-1].ok("status")
        with keeper.client() as one_more:
            assert one_more.disconnected()
        assert client.ok("beat")
        for one in inside:
            one.close()
        unread = []
        for _ in range(2 * CONNECTIONS):
            assert until(keeper.listens)
            unread.append(keeper.client())
            unread[-1].send(b'{"op": "status"}\n' * 300 + b"garbage\n")
            unread[-1].socket.shutdown(socket.SHUT_WR)
        assert until(lambda: len(list(Path(f"/proc/{keeper.pid}/fd").iterdir())) < CONNECTIONS)
        assert client.ok("beat")
        for one in unread:
            one.close()


class AcceptingWriter:
    """The writer of a client that takes every answer."""

    def write(self, answer):
        pass

    async def drain(self):
        pass


async def rounds_of_other_tasks(requests):
    """How often other tasks run while the keeper answers requests that are buffered already."""
    rounds, done = 0, False

    async def other():
        nonlocal rounds
        while not done:
            rounds += 1
            await asyncio.sleep(0)

    reader = asyncio.StreamReader(limit=LINE_BYTES)
    reader.feed_data(b'{"op":"beat"}\n' * requests)
    reader.feed_eof()
    others = asyncio.ensure_future(other())
    await Connection(None, "a test", reader.at_eof).serve(reader, AcceptingWriter())
    done = True
    await others
    return rounds


def test_a_flood_delays_no_other_client(keeper, machine):
    assert asyncio.run(rounds_of_other_tasks(requests=500)) >= 500
    clients = [keeper.client() for _ in range(CONNECTIONS - 4)]
    stop = threading.Event()

    def flood():
        """As many requests as the sockets take. Every answer is read: the bound on unread answers does not help."""
        while not stop.is_set():
            for client in clients:
                with contextlib.suppress(OSError):
                    client.socket.send(b'{"op":"beat"}\n' * 8000)
                with contextlib.suppress(OSError):
                    client.socket.recv(2**20)

    for client in clients:
        client.ok("status")
        client.socket.setblocking(False)
    flooding = threading.Thread(target=flood)
    with keeper.holds(mhz=900, ttl_s=0.5):
        flooding.start()
        try:
            until(lambda: locks(machine) == [None, None], 6.0)  # a flood only takes its share of the processor
        finally:
            stop.set()
            flooding.join()


def test_a_malformed_request_ends_only_its_own_connection(keeper, machine):
    with keeper.holds(mhz=900) as client:
        for line in MALFORMED:
            with keeper.client() as other:
                other.send(line)
                assert other.disconnected()
        assert client.ok("beat")
        assert locks(machine) == [(900, 900)] * 2
    assert keeper.logged.count("is disconnected") == len(MALFORMED)
    assert "Traceback" not in keeper.logged


def test_its_log_is_bounded(keeper):
    for _ in range(100):
        with keeper.client() as client:
            client.ok("lease", gpus=keeper.uuids, ttl_s=1)
            client.ok("release")
            client.send(b"\xff" * (LINE_BYTES - 1) + b"\n")
            assert client.disconnected()
    assert max(map(len, keeper.logged.splitlines())) < 400
    for kind in ("released by its client", "is disconnected"):
        assert 50 <= keeper.logged.count(kind) < 75


# ---- clocks are restored --------------------------------------------------------------------------------------


def test_nothing_is_locked_before_it_is_in_the_journal(keepers, machine):
    first = keepers(baselines={0: (705, 705)})
    client = first.holds()
    machine.fault("nvmlDeviceSetGpuLockedClocks", kill="before", gpu=0, times=1)
    client.send({"op": "set", "mhz": 900})
    assert first.wait() == -signal.SIGKILL
    assert first.journal == {first.uuids[0]: (705, 705), first.uuids[1]: None}


def test_the_next_keeper_restores_within_two_seconds(keepers, machine):
    first = keepers(baselines={0: (705, 705)})
    with first.holds(mhz=900):
        first.kill()
    begun_s = time.monotonic()
    keepers(wait=False, baselines={0: (705, 705)})
    until(lambda: locks(machine) == [(705, 705), None], 1.9 - (time.monotonic() - begun_s))  # RestartSec is 0.1 s


def test_only_a_stated_baseline_is_restored(keepers, machine):
    """Nothing is inferred from a clock: a lock that another program set before the lease is reset."""
    machine.gpus[0].lock_by_other(705, 705)
    machine.gpus[1].lock_by_other(705, 705)
    keeper = keepers(baselines={1: (600, 1200)})
    keeper.holds(mhz=900).close()
    until(lambda: locks(machine) == [None, (600, 1200)])


def test_a_gpu_that_hangs_delays_no_other(keeper, machine):
    with keeper.holds(mhz=900):
        machine.fault("nvmlDeviceResetGpuLockedClocks", sleep_s=0.8, gpu=0, times=1)
    begun_s = time.monotonic()
    until(lambda: machine.gpus[1].lock is None, 0.5)
    with keeper.holds(1, mhz=1005):
        assert machine.gpus[1].lock == (1005, 1005)
    assert machine.gpus[0].lock == (900, 900)
    until(lambda: locks(machine) == [None, None], 2.0 - (time.monotonic() - begun_s))


@pytest.mark.slow
def test_a_keeper_ends_though_a_gpu_hangs_for_ever(keeper, keepers, machine):
    with keeper.holds(mhz=900):
        machine.fault("nvmlDeviceResetGpuLockedClocks", sleep_s=60, gpu=0, times=1)
        until(lambda: keeper.signal(signal.SIGTERM) is None and machine.gpus[1].lock is None)
    assert keeper.wait(8) == 0, "TimeoutStopSec of the unit"
    machine.clear_faults()
    keepers()
    until(lambda: locks(machine) == [None, None])


def test_a_failed_restore_is_retried(keeper, machine):
    with keeper.holds(mhz=900):
        machine.gpus[0].permission(False)
    until(lambda: machine.gpus[1].lock is None)
    time.sleep(0.3)
    machine.gpus[0].permission(True)
    until(lambda: locks(machine) == [None, None], 1.0)


def test_one_keeper_at_a_time(keeper, keepers):
    other = keepers(wait=False)
    until(lambda: "another keeper runs there" in other.logged)
    assert keeper.status()


def test_a_removed_socket_is_made_again(keeper):
    keeper.socket.unlink()
    with socket.socket(socket.AF_UNIX) as impostor:
        impostor.bind(str(keeper.socket))
        until(keeper.listens, 2.0)


# ---- what root runs -------------------------------------------------------------------------------------------


def test_root_runs_nothing_but_the_keeper():
    assert {name for name in modules_of_the_process() if name.startswith("throttllem")} == OURS


def test_the_service_has_no_more_rights_than_it_needs():
    unit = unit_text(["/usr/bin/python3"], Path("/run/throttllem/keeper.sock"), Path("/var/lib/throttllem"))
    lines = set(unit.splitlines())
    assert {line for line in lines if line.startswith("CapabilityBoundingSet")} == {
        "CapabilityBoundingSet=CAP_SYS_ADMIN"
    }
    for line in ("NoNewPrivileges=yes", "ProtectSystem=strict", "PrivateNetwork=yes", "DevicePolicy=closed"):
        assert line in lines
    assert "RestrictAddressFamilies=AF_UNIX" in lines


# ---- the page -------------------------------------------------------------------------------------------------


def test_every_guarantee_of_the_page_is_tested_and_nothing_else():
    part = PAGE.read_text().split("\n## What it guarantees\n", 1)[1].split("\n## ", 1)[0]
    guaranteed = re.findall(r"^\d+\. .*?`(test_\w+)`", part, re.MULTILINE | re.DOTALL)
    numbered = re.findall(r"^(\d+)\. ", part, re.MULTILINE)
    nodes = ast.parse(Path(__file__).read_text()).body
    tests = [node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    tests.remove(test_every_guarantee_of_the_page_is_tested_and_nothing_else.__name__)
    assert numbered == [str(number) for number in range(1, len(numbered) + 1)]
    assert guaranteed == tests
