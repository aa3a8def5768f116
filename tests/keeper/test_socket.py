"""What comes in through the socket: garbage, floods, too many, too slow; and the socket file that is taken away."""

import socket
import threading
import time
from pathlib import Path

import pytest

from tests.keeper.rig import LONG_S, TTL_S, locks, until
from tests.keeper.talk import Talk
from throttllem.keeper.__main__ import CONNECTIONS, LINE_BYTES

GARBAGE = [
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


@pytest.mark.parametrize("said", GARBAGE)
def test_garbage_ends_its_connection_and_nothing_else(keeper, talk, said):
    with keeper.talk() as other:
        other.say(said)
        assert other.hung_up()
    assert talk.done("status")
    assert "Traceback" not in keeper.said
    assert keeper.said.count("is cut off") == 1


@pytest.mark.parametrize("mhz", ["null", '"fast"', '"900"', "900.0", "true", "[]", "1e999", "NaN", "9" * 400])
def test_garbage_in_a_lease_ends_it(keeper, machine, mhz):
    with keeper.holds(0, mhz=900) as talk:
        talk.say(b'{"op": "set", "mhz": ' + mhz.encode() + b"}\n")
        answer = talk.hear() if mhz == "9" * 400 else None
        assert answer is None or answer["code"] == "range"
        assert answer or talk.hung_up()
    until(lambda: machine.gpus[0].lock is None)
    assert "Traceback" not in keeper.said


def test_a_line_has_its_bound(keeper):
    with keeper.talk() as talk:
        talk.say(b" " * (LINE_BYTES - 30) + b'{"op": "status"}\n')
        assert talk.hear()["ok"]
        talk.say(b" " * 2 * LINE_BYTES)
        assert talk.hung_up(), "without waiting for the end of the line"


def test_half_a_line_holds_nothing(keeper, machine):
    with keeper.holds(mhz=900, ttl_s=TTL_S) as talk:
        talk.say(b'{"op": "be')
        until(lambda: locks(machine) == [None, None])
        talk.say(b'at"}\n')
        assert talk.hear()["code"] == "lost"


def test_a_line_may_come_in_pieces(talk):
    for piece in (b'{"op"', b': "sta', b'tus"}\n'):
        talk.say(piece)
        time.sleep(0.02)
    assert talk.hear()["ok"]


def test_so_many_connections_and_no_more(keeper):
    inside = [keeper.talk() for _ in range(CONNECTIONS)]
    for talk in inside:
        talk.done("status")
    for _ in range(3):
        with keeper.talk() as one_more:
            assert one_more.hung_up()
    assert all(talk.done("status") for talk in inside), "those inside stay"
    inside.pop().close()
    until(keeper.listens)


def test_whoever_does_not_listen_holds_nobody_up(keeper, machine):
    deaf = keeper.holds(0, mhz=900, ttl_s=TTL_S)
    deaf.socket.settimeout(0.1)
    with pytest.raises(TimeoutError):
        while True:
            deaf.say(b'{"op": "status"}\n' * 100)
    with keeper.holds(1, mhz=1005) as other:
        until(lambda: machine.gpus[0].lock is None)
        assert other.done("beat")


@pytest.mark.slow
def test_a_flood_of_connections_holds_nobody_up(keeper, machine):
    stop = threading.Event()

    def knock():
        while not stop.is_set():
            with socket.socket(socket.AF_UNIX) as one:
                one.settimeout(1)
                try:
                    one.connect(str(keeper.socket))
                except OSError:
                    continue

    knocking = [threading.Thread(target=knock) for _ in range(4)]
    with keeper.holds(0, mhz=900) as talk, keeper.holds(1, mhz=900, ttl_s=TTL_S):
        for each in knocking:
            each.start()
        try:
            until(lambda: machine.gpus[1].lock is None)
            assert talk.done("beat")
        finally:
            stop.set()
            for each in knocking:
                each.join()
    until(lambda: machine.gpus[0].lock is None)


@pytest.mark.parametrize("how", ["removed", "replaced", "folder removed"])
def test_a_socket_that_is_taken_away_is_made_anew(keeper, talk, machine, how):
    talk.done("lease", gpus=keeper.uuids, ttl_s=LONG_S)
    talk.done("set", mhz=900)
    match how:
        case "removed":
            keeper.socket.unlink()
        case "replaced":
            keeper.socket.unlink()
            keeper.socket.touch()
        case "folder removed":
            aside = keeper.run.rename(keeper.run.with_name("aside"))
            time.sleep(0.3)
            assert talk.done("beat"), "those inside stay"
            aside.rename(keeper.run)
            keeper.socket.unlink(missing_ok=True)
    until(keeper.listens, 3)
    assert talk.done("beat")
    assert locks(machine) == [(900, 900)] * 2


def test_anybody_may_connect_to_be_judged(keeper):
    assert keeper.socket.stat().st_mode & 0o777 == 0o666


def test_a_socket_that_a_dead_keeper_left_is_no_hindrance(keepers):
    keepers().kill()
    assert keepers().status()


def test_what_it_lacks_is_one_sentence_and_not_again_and_again(keepers, machine):
    machine.driver(loaded=False)
    keeper = keepers(wait=False)
    until(lambda: keeper.said.startswith("ERROR NVML: Driver Not Loaded"))
    time.sleep(0.2)
    keeper.kill()  # still there: whoever restarts it at once does not do so many times a second
    assert "Traceback" not in keeper.said


def test_an_ended_connection_leaves_no_file_open(keeper):
    def files():
        return len(list(Path(f"/proc/{keeper.pid}/fd").iterdir()))

    with keeper.talk() as talk:
        talk.done("status")
    keeper.holds(mhz=900).done("release")
    before = files() - sum(not talk.closed for talk in keeper._talks)
    for _ in range(20):
        with Talk(keeper.socket) as talk:
            talk.done("status")
    until(lambda: files() - sum(not talk.closed for talk in keeper._talks) <= before)
