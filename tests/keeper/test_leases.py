"""What a lease does and how it ends: it sets all GPUs of a group or none, and every end restores them."""

import os
import signal
import time

import pytest

from tests.keeper.rig import LONG_S, SWEEP_S, TTL_S, locks, until
from tools.nvml.machine import Op

LOCK, RESET = "nvmlDeviceSetGpuLockedClocks", "nvmlDeviceResetGpuLockedClocks"
NO_PERMISSION, UNKNOWN = 4, 999


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("first", [True, False])
def test_a_group_is_set_as_a_whole_or_its_lease_ends(keepers, machine, number, first):
    keeper = keepers(baselines={0: (705, 705)})
    client = keeper.client()
    client.ok("lease", gpus=keeper.uuids, ttl_s=LONG_S)
    if not first:
        client.ok("set", mhz=900)
    machine.fault(LOCK, error=UNKNOWN, gpu=number, times=1)
    answer = client.request("set", mhz=1005)
    assert (answer["code"], keeper.uuids[number] in answer["error"]) == ("gpu", True)
    assert client.rejected("set", mhz=1005) == "lost"
    until(lambda: locks(machine) == [(705, 705), None])
    until(lambda: not keeper.status()["returning"])
    client.ok("release")
    client.ok("lease", gpus=keeper.uuids, ttl_s=LONG_S)
    client.ok("set", mhz=1005)
    assert locks(machine) == [(1005, 1005)] * 2


def test_a_group_that_can_be_neither_set_nor_restored_is_retried(keeper, client, machine):
    client.ok("lease", gpus=keeper.uuids, ttl_s=LONG_S)
    client.ok("set", mhz=900)
    machine.fault(LOCK, error=UNKNOWN, gpu=1, times=1)
    machine.fault(RESET, error=UNKNOWN, gpu=0, times=2)
    assert client.rejected("set", mhz=1005) == "gpu"
    until(lambda: machine.gpus[1].lock is None)
    until(lambda: locks(machine) == [None, None])


def test_a_gpu_whose_lock_failed_is_restored_too(keeper, client, machine):
    client.ok("lease", gpus=keeper.uuids, ttl_s=LONG_S)
    machine.fault(LOCK, error=UNKNOWN, gpu=1, times=1)
    assert client.rejected("set", mhz=900) == "gpu"
    until(lambda: keeper.journal == {})
    assert {write.gpu for write in machine.writes() if write.op is Op.UNLOCK} == {0, 1}


def test_a_lease_without_heartbeats_ends(keeper, machine):
    with keeper.holds(mhz=900, ttl_s=TTL_S) as client:
        begun_s = time.monotonic()
        until(lambda: locks(machine) == [None, None])
        assert TTL_S - SWEEP_S < time.monotonic() - begun_s < TTL_S + 1.0
        assert client.rejected("beat") == "lost"
    assert "no heartbeat for 0.3 s" in keeper.logged


@pytest.mark.parametrize("what", [{"op": "beat"}, {"op": "set", "mhz": 900}])
def test_a_heartbeat_extends_it_and_so_does_a_set(keeper, machine, what):
    with keeper.holds(mhz=900, ttl_s=0.5) as client:
        for _ in range(4):
            time.sleep(0.15)
            assert client.request(**what)["ok"]
        assert locks(machine) == [(900, 900)] * 2


def test_status_is_no_heartbeat(keeper, machine):
    with keeper.holds(mhz=900, ttl_s=TTL_S) as client:
        until(lambda: client.ok("status") and locks(machine) == [None, None])


def test_a_late_heartbeat_is_rejected(keeper, machine):
    with keeper.holds(mhz=900, ttl_s=TTL_S) as client:
        time.sleep(TTL_S + 4 * SWEEP_S)
        assert client.rejected("beat") == "lost"
        assert client.rejected("set", mhz=1005) == "lost"
    until(lambda: locks(machine) == [None, None])


def test_disconnecting_ends_it(keeper, machine):
    keeper.holds(mhz=900).close()
    until(lambda: locks(machine) == [None, None])
    assert "its client disconnected" in keeper.logged


def test_closing_one_direction_ends_it(keeper, machine):
    with keeper.holds(mhz=900) as client:
        client.socket.shutdown(1)
        until(lambda: locks(machine) == [None, None])


def test_a_gpu_that_was_not_set_is_not_restored(keeper, machine):
    with keeper.holds(0, mhz=900):
        keeper.holds(1).close()
        time.sleep(2 * SWEEP_S)
    until(lambda: locks(machine) == [None, None])
    assert {write.gpu for write in machine.writes()} == {0}, "the lease on GPU 1 never set it"


def test_a_lease_that_set_nothing_leaves_locks_of_other_programs(keepers, machine):
    keeper = keepers(baselines={0: (300, 1200)})
    machine.gpus[1].lock_by_other(810, 810)
    keeper.holds().ok("release")
    assert (locks(machine), machine.writes()) == ([None, (810, 810)], [])


def test_sigterm_restores_everything(keepers, machine):
    keeper = keepers(baselines={0: (705, 705)})
    with keeper.holds(0, mhz=900), keeper.holds(1, mhz=1005):
        assert keeper.stop() == 0
    assert "Traceback" not in keeper.logged
    assert locks(machine) == [(705, 705), None]
    assert keeper.journal == {}


def test_a_reloaded_driver_is_opened_again(keeper, client, machine):
    client.ok("lease", gpus=keeper.uuids, ttl_s=LONG_S)
    client.ok("set", mhz=900)
    machine.driver(loaded=False)
    assert client.rejected("set", mhz=900) == "gpu"
    assert client.rejected("beat") == "lost"
    machine.driver(loaded=True)
    until(lambda: not keeper.status()["returning"])
    client.ok("release")
    client.ok("lease", gpus=keeper.uuids, ttl_s=LONG_S)
    client.ok("set", mhz=1005)
    assert locks(machine) == [(1005, 1005)] * 2


def test_a_lost_gpu_is_restored_when_it_comes_back(keeper, machine):
    with keeper.holds(mhz=900):
        machine.gpus[0].lost(True)
    until(lambda: machine.gpus[1].lock is None)
    until(lambda: keeper.status()["returning"] == keeper.uuids[:1])
    with keeper.client() as client:
        assert client.rejected("lease", gpus=keeper.uuids[:1], ttl_s=1) == "held", "no client gets it meanwhile"
    until(lambda: keeper.journal == {keeper.uuids[0]: None})  # a keeper that starts now would restore it
    machine.gpus[0].lost(False)
    until(lambda: locks(machine) == [None, None])
    until(lambda: keeper.journal == {})


def test_a_refused_restore_is_logged_once_and_retried(keeper, machine):
    with keeper.holds(0, mhz=900):
        machine.fault(RESET, error=NO_PERMISSION, times=2)
    until(lambda: machine.gpus[0].lock is None)
    assert keeper.logged.count("not restored yet") == 1
    refused = [write for write in machine.writes() if write.op is Op.UNLOCK and write.result == NO_PERMISSION]
    assert len(refused) == 2


def test_a_call_that_hangs_is_undone_when_it_returns_and_the_lease_ends_in_time(keeper, machine):
    with keeper.holds(ttl_s=TTL_S) as client:
        machine.fault(LOCK, sleep_s=0.6, gpu=0, times=1)
        client.send({"op": "set", "mhz": 900})
        until(lambda: keeper.status()["returning"], 0.55)
        until(lambda: machine.gpus[1].lock is None, 0.3)
        assert client.receive()["code"] == "lost"
    until(lambda: locks(machine) == [None, None] and not keeper.status()["returning"])
    assert [write.op for write in machine.writes() if write.gpu == 0] == [Op.LOCK, Op.UNLOCK], "in this order"


def test_a_first_check_that_hangs_locks_nothing(keeper, machine):
    with keeper.holds(ttl_s=TTL_S) as client:
        machine.fault("nvmlDeviceGetMigMode", sleep_s=0.45, gpu=0, times=1)
        assert client.rejected("set", mhz=900) == "lost"
    assert keeper.status()["held"] == {}
    assert [machine.writes(), keeper.status()["before"]] == [[], {}]


def test_a_client_that_is_stopped_loses_it(keeper, processes, machine):
    given = {"socket": str(keeper.socket), "gpus": keeper.uuids, "mhz": 900, "ttl_s": TTL_S, "fork": False}
    pid, log = keeper.begun("hold_on", **given)
    until(lambda: log.exists() and "held" in log.read_text())
    os.kill(pid, signal.SIGSTOP)
    until(lambda: locks(machine) == [None, None])
    os.kill(pid, signal.SIGKILL)
    assert processes.wait(pid) == -signal.SIGKILL


def test_a_keeper_that_stops_gives_no_lease(keeper, machine):
    client = keeper.client()
    client.ok("status")
    with keeper.holds(0, mhz=900):
        machine.fault(RESET, sleep_s=0.5, gpu=0, times=1)
        keeper.signal(signal.SIGTERM)
        until(lambda: client.ok("status")["returning"])
        assert not client.request("lease", gpus=keeper.uuids[1:], ttl_s=LONG_S)["ok"]
    assert keeper.wait() == 0
    assert locks(machine) == [None, None]


def test_a_lease_that_expires_while_its_set_fails_is_freed_once(keeper, machine):
    machine.gpus[0].mig(True)
    machine.fault("nvmlDeviceGetMigMode", sleep_s=0.29, gpu=0, times=1)
    with keeper.holds(0, ttl_s=TTL_S) as client:
        assert client.rejected("set", mhz=900) in ("gpu", "lost")
        machine.gpus[0].mig(False)
        until(lambda: not keeper.status()["held"])
        with keeper.holds(0, mhz=900, ttl_s=TTL_S):
            until(lambda: machine.gpus[0].lock is None)
