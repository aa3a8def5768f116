"""The gateway's side of a lease, against keepers in processes of their own: it lives, ends, and is taken anew."""

import asyncio
import inspect
import signal
import time
from contextlib import asynccontextmanager

import pytest

from tests.keeper.rig import folder, keeper, keepers, library, locks, machine, nursery, until
from throttllem.gpu.keeper_client import KeeperError, KeptClocks, keeper_status

__all__ = ["folder", "keeper", "keepers", "library", "machine", "nursery"]
TTL_S = 0.3


@asynccontextmanager
async def clocks_of(keeper, *numbers, ttl_s=TTL_S):
    """The clocks of these GPUs, given back at the end if that is still to do."""
    uuids = tuple(keeper.uuids[number] for number in numbers or (0, 1))
    made = KeptClocks(keeper.socket, uuids, ttl_s)
    try:
        yield made
    finally:
        if made.held:
            await made.give_back()


def run(test):
    """A test that is a coroutine."""

    def whole(**given):
        asyncio.run(asyncio.wait_for(test(**given), 20))

    whole.__signature__ = inspect.signature(test)  # its fixtures
    return whole


async def soon(true, within_s=2.0):
    """As `until`, while the loop goes on."""
    ends_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < ends_s
        await asyncio.sleep(0.01)


@run
async def test_set_and_given_back(keeper, machine):
    async with clocks_of(keeper) as clocks:
        assert not clocks.held
        assert await clocks.set(1005) == 1005
        assert (clocks.held, locks(machine)) == (True, [(1005, 1005)] * 2)
        await clocks.give_back()
        assert (clocks.held, locks(machine)) == (False, [None, None])
        await clocks.give_back()
        assert await clocks.set(900) == 900, "and anew"


@run
async def test_the_nearest_clock_that_all_may_have(keeper, machine):
    async with clocks_of(keeper) as clocks:  # GPU 0: 210 to 1410, GPU 1: 600 to 1410
        assert await clocks.set(300) == 600
        assert locks(machine) == [(600, 600)] * 2
        assert await clocks.set(2000) == 1410


@run
async def test_who_is_told_when_it_is_on_its_way(keeper, machine):
    machine.fault("nvmlDeviceSetGpuLockedClocks", sleep_s=0.1, times=1)
    async with clocks_of(keeper, 0) as clocks:
        told = []
        await clocks.set(900, lambda: told.append(machine.gpus[0].lock))
        assert told == [None]


@run
async def test_heartbeats_hold_it(keeper, machine):
    async with clocks_of(keeper, ttl_s=0.7) as clocks:
        await clocks.set(900)
        await asyncio.sleep(1.0)
        assert (clocks.held, locks(machine)) == (True, [(900, 900)] * 2)


@run
async def test_a_loop_that_stood_still_takes_it_anew(keeper, machine):
    async with clocks_of(keeper) as clocks:
        await clocks.set(900)
        until(lambda: locks(machine) == [None, None])  # blocks this loop, and so the heartbeats
        until(lambda: not keeper.status()["returning"])
        assert await clocks.set(1005) == 1005
        assert locks(machine) == [(1005, 1005)] * 2


@run
async def test_it_is_noticed_that_it_was_lost(keeper, machine):
    async with clocks_of(keeper) as clocks:
        await clocks.set(900)
        until(lambda: locks(machine) == [None, None])
        await soon(lambda: not clocks.held)


@run
async def test_a_keeper_that_is_started_again(keepers, machine):
    first = keepers()
    async with clocks_of(first) as clocks:
        await clocks.set(900)
        first.kill()
        with pytest.raises(KeeperError, match=f"`throttllem doctor --socket {first.socket}` tells") as error:
            await clocks.set(1005)
        assert error.value.code == "unreachable"
        assert not clocks.held
        second = keepers()
        until(lambda: not second.status()["returning"])
        assert await clocks.set(1005) == 1005


@run
async def test_a_keeper_that_was_restarted_meanwhile_is_not_even_noticed(keepers, machine):
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
    clocks = KeptClocks(folder / "keeper.sock", ("GPU-a",), TTL_S)
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
async def test_what_a_gpu_refuses_ends_the_lease_and_the_next_set_takes_it_anew(keeper, machine):
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
async def test_too_many_sets_are_refused_and_the_lease_is_held(keeper, machine):
    async with clocks_of(keeper, ttl_s=3.0) as clocks:
        with pytest.raises(KeeperError) as error:
            for _ in range(100):
                await clocks.set(900)
        assert (error.value.code, clocks.held) == ("rate", True)
        assert locks(machine) == [(900, 900)] * 2


@run
async def test_what_another_holds(keeper):
    with keeper.holds(0, mhz=900):
        async with clocks_of(keeper) as clocks:
            with pytest.raises(KeeperError, match="is held by process") as error:
                await clocks.set(1005)
            assert (error.value.code, clocks.held) == ("held", False)


@run
async def test_a_set_that_is_given_up(keeper, machine):
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
async def test_many_at_once_come_one_after_the_other(keeper, machine):
    async with clocks_of(keeper) as clocks:
        done = await asyncio.gather(*(clocks.set(600 + 15 * step) for step in range(10)))
        assert done == [600 + 15 * step for step in range(10)]
        assert locks(machine) == [(735, 735)] * 2


@run
async def test_status(keeper):
    status = await keeper_status(keeper.socket)
    assert status["allowed"][keeper.uuids[1]] == [600, 1410]
