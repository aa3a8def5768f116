"""What clients do to the socket: malformed lines, floods, slow readers; and a socket file that is removed."""

import asyncio
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.keeper.client import Client
from tests.keeper.rig import LONG_S, NOBODY, TTL_S, locks, needs_root, until
from throttllem.keeper import server
from throttllem.keeper.server import LINE_BYTES


@pytest.mark.parametrize("mhz", ["null", '"fast"', '"900"', "900.0", "true", "[]", "1e999", "NaN", "9" * 400])
def test_a_malformed_clock_ends_the_lease(keeper, machine, mhz):
    with keeper.holds(0, mhz=900) as client:
        client.send(b'{"op": "set", "mhz": ' + mhz.encode() + b"}\n")
        answer = client.receive() if mhz == "9" * 400 else None
        assert answer is None or answer["code"] == "range"
        assert answer or client.disconnected()
    until(lambda: machine.gpus[0].lock is None)
    assert "Traceback" not in keeper.logged


def test_a_line_is_bounded(keeper):
    with keeper.client() as client:
        client.send(b" " * (LINE_BYTES - 30) + b'{"op": "status"}\n')
        assert client.receive()["ok"]
        client.send(b" " * 2 * LINE_BYTES)
        assert client.disconnected(), "without waiting for the end of the line"


def test_half_a_line_is_no_heartbeat(keeper, machine):
    with keeper.holds(mhz=900, ttl_s=TTL_S) as client:
        client.send(b'{"op": "be')
        until(lambda: locks(machine) == [None, None])
        client.send(b'at"}\n')
        assert client.receive()["code"] == "lost"


def test_a_line_may_come_in_pieces(client):
    for piece in (b'{"op"', b': "sta', b'tus"}\n'):
        client.send(piece)
        time.sleep(0.02)
    assert client.receive()["ok"]


def test_a_client_that_does_not_read_delays_no_other(keeper, machine):
    silent = keeper.holds(0, mhz=900, ttl_s=TTL_S)
    silent.socket.settimeout(0.1)
    with pytest.raises(TimeoutError):
        while True:
            silent.send(b'{"op": "status"}\n' * 100)
    with keeper.holds(1, mhz=1005) as other:
        until(lambda: machine.gpus[0].lock is None)
        assert other.ok("beat")


@pytest.mark.slow
def test_a_flood_of_connections_delays_no_lease(keeper, machine):
    stop = threading.Event()

    def connect():
        while not stop.is_set():
            with socket.socket(socket.AF_UNIX) as one:
                one.settimeout(1)
                try:
                    one.connect(str(keeper.socket))
                except OSError:
                    continue

    connecting = [threading.Thread(target=connect) for _ in range(4)]
    with keeper.holds(0, mhz=900) as client, keeper.holds(1, mhz=900, ttl_s=TTL_S):
        for each in connecting:
            each.start()
        try:
            until(lambda: machine.gpus[1].lock is None)
            assert client.ok("beat")
        finally:
            stop.set()
            for each in connecting:
                each.join()
    until(lambda: machine.gpus[0].lock is None)


@needs_root
@pytest.mark.parametrize(("uid", "lines"), [(NOBODY - 1, 0), (NOBODY, 1000)])
def test_a_flood_of_one_user_keeps_no_other_out(keepers, processes, machine, uid, lines):
    """Neither of a user that may not connect, nor of one that may, which can take all of its places."""
    keeper = keepers(users=[NOBODY, NOBODY - 2])
    pid, log = keeper.begun("flood", socket=str(keeper.socket), uid=uid, lines=lines)
    try:
        until(lambda: log.exists() and "flooding" in log.read_text())
        time.sleep(0.1)
        for mhz in (900, 1005):
            begun_s = time.monotonic()
            with keeper.holds(0, mhz=mhz):
                assert machine.gpus[0].lock == (mhz, mhz)
            assert time.monotonic() - begun_s < 1.0
            until(lambda: machine.gpus[0].lock is None)
            until(lambda: not keeper.status()["returning"])
        sets = [{"op": "lease", "gpus": keeper.uuids[:1], "ttl_s": LONG_S}, {"op": "set", "mhz": 900}]
        answers = keeper.other("speak", socket=str(keeper.socket), uid=NOBODY - 2, lines=sets)
        assert answers == [{"ok": True}] * 2
    finally:
        os.kill(pid, signal.SIGKILL)
        processes.wait(pid)


@pytest.mark.parametrize("sent", [b"", b'{"op": "sta'], ids=["nothing", "half a line"])
def test_a_connection_without_a_line_ends(sent, monkeypatch):
    monkeypatch.setattr(server, "IDLE_S", 0.05)

    async def serve():
        reader = asyncio.StreamReader()
        reader.feed_data(sent)
        await server.Connection(None, "a test", reader.at_eof).serve(reader, None)

    with pytest.raises(TimeoutError):
        asyncio.run(serve())


@pytest.mark.parametrize("how", ["removed", "replaced", "folder removed"])
def test_a_removed_socket_is_made_again(keeper, client, machine, how):
    client.ok("lease", gpus=keeper.uuids, ttl_s=LONG_S)
    client.ok("set", mhz=900)
    match how:
        case "removed":
            keeper.socket.unlink()
        case "replaced":
            keeper.socket.unlink()
            keeper.socket.touch()
        case "folder removed":
            aside = keeper.run.rename(keeper.run.with_name("aside"))
            time.sleep(0.3)
            assert client.ok("beat"), "open connections stay"
            aside.rename(keeper.run)
            keeper.socket.unlink(missing_ok=True)
    until(keeper.listens, 3)
    assert client.ok("beat")
    assert locks(machine) == [(900, 900)] * 2


def test_every_user_may_connect(keeper):
    assert keeper.socket.stat().st_mode & 0o777 == 0o666


def test_the_socket_of_a_dead_keeper_is_replaced(keepers):
    keepers().kill()
    assert keepers().status()


def test_a_keeper_that_cannot_start_logs_one_line_and_waits(keepers, machine):
    machine.driver(loaded=False)
    keeper = keepers(wait=False)
    until(lambda: keeper.logged.startswith("ERROR NVML: Driver Not Loaded"))
    time.sleep(0.2)
    keeper.kill()  # it still runs: systemd would restart it ten times a second
    assert "Traceback" not in keeper.logged


def test_an_ended_connection_leaves_no_file_open(keeper):
    def files():
        return len(list(Path(f"/proc/{keeper.pid}/fd").iterdir()))

    with keeper.client() as client:
        client.ok("status")
    keeper.holds(mhz=900).ok("release")
    before = files() - sum(not client.closed for client in keeper._clients)
    for _ in range(20):
        with Client(keeper.socket) as client:
            client.ok("status")
    until(lambda: files() - sum(not client.closed for client in keeper._clients) <= before)
