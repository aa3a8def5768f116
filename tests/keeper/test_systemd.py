"""Messages to systemd: ready, alive while the event loop runs; and a systemd that does not read."""

import signal
import socket
import time

import pytest

from tests.keeper.rig import locks, until

WATCHDOG_S = 0.75
"""WatchdogSec of the unit (tests/test_cli_keeper.py)."""


@pytest.fixture
def systemd(folder):
    """systemd's end of sd_notify."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(folder / "notify"))
        made.settimeout(5)
        yield made


def messages(systemd):
    """Those since the last call."""
    found = []
    systemd.setblocking(False)
    try:
        while True:
            found.append(systemd.recv(100))
    except BlockingIOError:
        systemd.settimeout(5)
        return found


def test_it_is_ready_when_it_listens(keepers, systemd, folder):
    keeper = keepers(environment={"NOTIFY_SOCKET": str(folder / "notify")}, wait=False)
    message = systemd.recv(100)
    while message != b"READY=1":
        assert message == b"WATCHDOG=1"
        message = systemd.recv(100)
    until(keeper.listens, 1)


def test_it_is_alive_while_the_event_loop_runs(keepers, systemd, folder):
    keeper = keepers(
        environment={"NOTIFY_SOCKET": str(folder / "notify")}, what="keep_until_told_to_hang", clocks=[(210, 1410)]
    )
    messages(systemd)
    for _ in range(5):
        begun_s = time.monotonic()
        assert systemd.recv(100) == b"WATCHDOG=1"
        assert time.monotonic() - begun_s < WATCHDOG_S / 2
    keeper.signal(signal.SIGUSR1)
    time.sleep(0.1)
    messages(systemd)
    systemd.settimeout(WATCHDOG_S / 2)
    with pytest.raises(TimeoutError):
        systemd.recv(100)


def test_it_is_alive_while_a_gpu_hangs(keepers, machine, systemd, folder):
    keeper = keepers(environment={"NOTIFY_SOCKET": str(folder / "notify")})
    machine.fault("nvmlDeviceSetGpuLockedClocks", sleep_s=0.4, gpu=0, times=1)
    client = keeper.holds()
    client.send({"op": "set", "mhz": 900})
    time.sleep(0.1)
    messages(systemd)
    assert systemd.recv(100) == b"WATCHDOG=1"
    assert client.receive()["ok"]


def test_an_abstract_address(keepers):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("")
        systemd.settimeout(5)
        name = systemd.getsockname().decode()
        keepers(environment={"NOTIFY_SOCKET": "@" + name.removeprefix("\0")}, wait=False)
        assert systemd.recv(100) in (b"READY=1", b"WATCHDOG=1")


@pytest.mark.parametrize("silent", [True, False], ids=["silent", "gone"])
def test_a_systemd_that_does_not_read_delays_nothing(keepers, machine, folder, silent):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        if silent:
            systemd.bind(str(folder / "notify"))
        keeper = keepers(environment={"NOTIFY_SOCKET": str(folder / "notify")})
        time.sleep(0.6 if silent else 0.1)  # more than a queue of datagrams holds
        with keeper.holds(mhz=900, ttl_s=1.0):
            until(lambda: locks(machine) == [None, None])
        assert keeper.stop() == 0
