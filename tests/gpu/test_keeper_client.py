"""The gateway's side of a lease, against real keepers: it is extended, ends, and is taken again."""

import asyncio
import inspect
import signal
import socket
import time
from contextlib import asynccontextmanager

import pytest

from tests.keeper.rig import folder, keeper, keepers, library, locks, machine, processes, until
from throttllem.gpu.keeper_client import KeeperClient, KeeperError, keeper_status

__all__ = ["folder", "keeper", "keepers", "library", "machine", "processes"]
TTL_S = 0.3


@asynccontextmanager
async def clocks_of(keeper, *numbers, ttl_s=TTL_S):
    """A client for the clocks of these GPUs, which are restored at the end."""
    uuids = tuple(keeper.uuids[number] for number in numbers or (0, 1))
    made = KeeperClient(keeper.socket, uuids, ttl_s)
    try:
        yield made
    finally:
        if made.held:
            await made.restore()


def run(test):
    """Runs a test that is a coroutine."""

    def whole(**given):
        asyncio.run(asyncio.wait_for(test(**given), 20))

    whole.__signature__ = inspect.signature(test)  # its fixtures
    return whole


async def soon(true, within_s=2.0):
    """As `until`, while the event loop runs."""
    ends_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < ends_s
        await asyncio.sleep(0.01)


@run
async def test_set_and_restore(keeper, machine):
    async with clocks_of(keeper) as clocks:
        assert not clocks.held
        assert await clocks.set(1005) == 1005
        assert (clocks.held, locks(machine)) == (True, [(1005, 1005)] * 2)
        await clocks.restore()
        assert (clocks.held, locks(machine)) == (False, [None, None])
        await clocks.restore()
        assert await clocks.set(900) == 900, "with another lease"


@run
async def test_the_nearest_clock_that_is_allowed_for_all(keeper, machine):
    async with clocks_of(keeper) as clocks:  # GPU 0: 210 to 1410, GPU 1: 600 to 1410
        assert await clocks.set(300) == 600
        assert locks(machine) == [(600, 600)] * 2
        assert await clocks.set(2000) == 1410


@run
async def test_sent_is_called_before_the_clock_is_set(keeper, machine):
    machine.fault("nvmlDeviceSetGpuLockedClocks", sleep_s=0.1, times=1)
    async with clocks_of(keeper, 0) as clocks:
        locks_when_sent = []
        await clocks.set(900, lambda: locks_when_sent.append(machine.gpus[0].lock))
        assert locks_when_sent == [None]


@run
async def test_heartbeats_extend_it(keeper, machine):
    async with clocks_of(keeper, ttl_s=0.7) as clocks:
        await clocks.set(900)
        await asyncio.sleep(1.0)
        assert (clocks.held, locks(machine)) == (True, [(900, 900)] * 2)


@run
async def test_a_lease_lost_by_a_blocked_event_loop_is_taken_again(keeper, machine):
    async with clocks_of(keeper) as clocks:
        await clocks.set(900)
        until(lambda: locks(machine) == [None, None])  # blocks this loop, and so the heartbeats
        until(lambda: not keeper.status()["returning"])
        assert await clocks.set(1005) == 1005
        assert locks(machine) == [(1005, 1005)] * 2


@run
async def test_a_lease_that_has_expired_is_noticed_by_the_heartbeat(keeper, machine):
    losses = []
    clocks = KeeperClient(keeper.socket, tuple(keeper.uuids), TTL_S, losses.append)
    await clocks.set(900)
    until(lambda: locks(machine) == [None, None])
    await soon(lambda: losses, 0.2)
    assert "no heartbeat" in losses[0] and not clocks.held


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@run
async def test_a_lease_that_ends_while_nothing_is_sent_is_noticed_at_once(keeper, how):
    losses = []
    clocks = KeeperClient(keeper.socket, tuple(keeper.uuids), 60.0, losses.append)  # the next heartbeat is in 20 s
    await clocks.set(900)
    keeper.signal(how)
    await soon(lambda: losses, 1.0)
    assert "closed the connection" in losses[0] and not clocks.held


@run
async def test_a_lease_that_was_given_up_is_not_lost(keeper):
    losses = []
    clocks = KeeperClient(keeper.socket, tuple(keeper.uuids), TTL_S, losses.append)
    await clocks.set(900)
    await clocks.restore()
    until(lambda: not keeper.status()["returning"])
    await clocks.set(900)
    clocks.close()
    await asyncio.sleep(0.05)
    assert losses == []


@run
async def test_a_keeper_that_is_restarted_later(keepers, machine):
    first = keepers()
    async with clocks_of(first) as clocks:
        await clocks.set(900)
        first.kill()
        with pytest.raises(KeeperError, match=f"`throttllem doctor --socket {first.socket}` shows") as error:
            await clocks.set(1005)
        assert error.value.code == "unreachable"
        assert not clocks.held
        second = keepers()
        until(lambda: not second.status()["returning"])
        assert await clocks.set(1005) == 1005


@run
async def test_a_keeper_that_was_restarted_between_two_sets(keepers, machine):
    first = keepers()
    async with clocks_of(first, ttl_s=3.0) as clocks:
        await clocks.set(900)
        first.kill()
        second = keepers()
        until(lambda: not second.status()["returning"])
        assert await clocks.set(1005) == 1005
        assert locks(machine) == [(1005, 1005)] * 2


@run
async def test_no_keeper(folder):
    clocks = KeeperClient(folder / "keeper.sock", ("GPU-a",), TTL_S)
    with pytest.raises(KeeperError, match="No such file") as error:
        await clocks.set(900)
    assert (error.value.code, clocks.held) == ("unreachable", False)


@run
async def test_a_keeper_that_does_not_answer(keeper):
    async with clocks_of(keeper) as clocks:
        keeper.signal(signal.SIGSTOP)
        begun_s = time.monotonic()
        with pytest.raises(KeeperError, match=r"no answer in 0\.3 s"):
            await clocks.set(900)
        assert time.monotonic() - begun_s < TTL_S + 0.5


@run
async def test_a_gpu_that_fails_ends_the_lease_and_the_next_set_takes_another(keeper, machine):
    async with clocks_of(keeper) as clocks:
        await clocks.set(900)
        machine.fault("nvmlDeviceSetGpuLockedClocks", error=999, gpu=1, times=1)
        with pytest.raises(KeeperError) as error:
            await clocks.set(1005)
        assert error.value.code == "gpu"
        until(lambda: locks(machine) == [None, None] and not keeper.status()["returning"])
        assert await clocks.set(1005) == 1005
        assert locks(machine) == [(1005, 1005)] * 2


@run
async def test_too_many_sets_are_rejected_and_the_lease_is_held(keeper, machine):
    async with clocks_of(keeper, ttl_s=3.0) as clocks:
        with pytest.raises(KeeperError) as error:
            for _ in range(100):
                await clocks.set(900)
        assert (error.value.code, clocks.held) == ("rate", True)
        assert locks(machine) == [(900, 900)] * 2


@run
async def test_a_gpu_that_another_client_holds(keeper):
    with keeper.holds(0, mhz=900):
        async with clocks_of(keeper) as clocks:
            with pytest.raises(KeeperError, match="is held by process") as error:
                await clocks.set(1005)
            assert (error.value.code, clocks.held) == ("held", False)


@run
async def test_a_set_that_is_cancelled(keeper, machine):
    async with clocks_of(keeper) as clocks:
        await clocks.set(900)
        machine.fault("nvmlDeviceSetGpuLockedClocks", sleep_s=0.2, times=1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(clocks.set(1005), 0.05)
        await soon(lambda: locks(machine) == [None, None])
        until(lambda: not keeper.status()["returning"])
        assert await clocks.set(1200) == 1200, "on a new connection, with a lease"
        assert locks(machine) == [(1200, 1200)] * 2


@run
async def test_sets_at_once_are_made_in_order(keeper, machine):
    async with clocks_of(keeper) as clocks:
        done = await asyncio.gather(*(clocks.set(600 + 15 * step) for step in range(10)))
        assert done == [600 + 15 * step for step in range(10)]
        assert locks(machine) == [(735, 735)] * 2


@run
async def test_a_full_queue_is_waited_for(folder):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "keeper.sock"))
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(folder / "keeper.sock"))
            status = asyncio.create_task(keeper_status(folder / "keeper.sock"))
            await asyncio.sleep(0.02)
            listener.accept()[0].close()
            accepted = await asyncio.to_thread(listener.accept)
            with accepted[0] as end:
                end.sendall(b'{"ok": true, "allowed": {}}\n')
                assert (await status)["allowed"] == {}


@run
async def test_status(keeper):
    status = await keeper_status(keeper.socket)
    assert status["allowed"][keeper.uuids[1]] == [600, 1410]
