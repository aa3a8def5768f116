"""Real GPUs of one engine: three modes, what holds a clock, what is not let, and that all of it is given back."""

import asyncio
import contextlib
import os
import time
from types import SimpleNamespace

import pytest

from throttllem.gpu.device import Gpu
from throttllem.gpu.hardware import AGAIN_S, HardwareGpu, Mode, check_apart
from throttllem.gpu.setters import clock_setter

CLOCKS = (600, 900, 1200, 1410)


def hardware(house, mode=Mode.ON, names=("0", "1"), clocks=CLOCKS, ttl_s=1.0):
    return HardwareGpu(names, mode=mode, setter=clock_setter(keeper=house.socket, ttl_s=ttl_s), clocks_mhz=clocks)


async def until(condition, within_s=3.0):
    """Wait until it holds; its value."""
    end_s = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < end_s, "it did not come to that"
        await asyncio.sleep(0.01)
    return found


def locks(house):
    return [gpu.lock for gpu in house.machine.gpus]


def test_on_sets_all_of_them_and_restores_the_baseline(house):
    async def run():
        async with house.keeper("--normally", f"{house.machine.gpus[1].uuid}=1005-1005"):
            async with hardware(house) as device:
                gpu: Gpu = device
                heard = []
                read = await gpu.set_clock(900, lambda: heard.append(locks(house)))
                at_900, reading = locks(house), gpu.read()
                await gpu.set_clock(1200)
                at_1200 = locks(house)
                await gpu.set_clock(None)
                free = locks(house)
                await gpu.set_clock(600)
            return read, at_900, reading, at_1200, free, locks(house), heard

    read, at_900, reading, at_1200, free, after, heard = asyncio.run(run())
    assert (read, at_900, at_1200) == (900, [(900, 900)] * 2, [(1200, 1200)] * 2)
    assert (reading.clock_mhz, reading.planned_on_mhz, reading.limit_mhz, reading.held) == (900, 900, None, None)
    assert free == after == [None, (1005, 1005)]
    assert len(heard) == 1


@pytest.mark.parametrize(("mode", "planned"), [(Mode.DRY_RUN, 900), (Mode.OFF, 1410)])
def test_advise_and_off_set_nothing(house, mode, planned):
    async def run():
        async with house.keeper(), hardware(house, mode) as gpu:
            read = await gpu.set_clock(900)
            return read, gpu.read(), gpu.advising

    read, reading, advising = asyncio.run(run())
    assert (read, reading.clock_mhz, reading.planned_on_mhz) == (planned, 1410, planned)
    assert advising == (mode is Mode.DRY_RUN)
    assert all(gpu.attempted == 0 for gpu in house.machine.gpus)


def test_energy_and_watts_are_those_of_all(house):
    async def run():
        async with hardware(house, Mode.OFF) as gpu:
            before_j, began_s = gpu.read().energy_j, time.monotonic()
            await asyncio.sleep(0.4)
            reading = gpu.read()
            return reading.energy_j - before_j, reading.watts * (time.monotonic() - began_s), reading.watts

    joules, expected, watts = asyncio.run(run())
    assert watts == pytest.approx(sum(gpu.watts for gpu in house.machine.gpus), rel=0.01)
    assert joules == pytest.approx(expected, rel=0.15)


def test_without_a_keeper_it_is_advice_until_there_is_one(house, caplog):
    async def run():
        async with hardware(house) as gpu:
            read = await gpu.set_clock(900)
            alone = gpu.read(), gpu.advising, locks(house)
            async with house.keeper():
                await until(lambda: locks(house) == [(900, 900)] * 2)
                await until(lambda: not gpu.advising)
                return read, alone, gpu.read()

    read, (alone, advising, untouched), later = asyncio.run(run())
    assert read == alone.planned_on_mhz == 900 and advising and untouched == [None, None]
    assert "doctor" in alone.trouble and alone.clock_mhz == 1410
    assert (later.trouble, later.clock_mhz, later.advised_mhz) == (None, 900, None)
    assert "clocks are not set, only advised" in caplog.text and "clocks are set again" in caplog.text


def test_a_keeper_that_goes_and_comes_back_is_asked_again(house):
    async def run():
        async with hardware(house) as gpu:
            async with house.keeper():
                await gpu.set_clock(900)
            gone = locks(house)
            async with house.keeper():
                await gpu.set_clock(600)
                await until(lambda: locks(house) == [(600, 600)] * 2)
            return gone

    assert asyncio.run(run()) == [None, None]


@pytest.mark.parametrize(
    ("hold", "free", "words"),
    [
        (lambda gpu: gpu.limit_w(150.0), lambda gpu: gpu.limit_w(None), "power cap"),
        (lambda gpu: gpu.thermal(705), lambda gpu: gpu.thermal(None), "thermal"),
        (lambda gpu: gpu.lock_by_other(510, 510), lambda gpu: gpu.lock_by_other(1200, 1200), "another controller"),
    ],
)
def test_what_holds_a_clock_down_is_found_and_said_and_forgotten(house, caplog, hold, free, words):
    async def run():
        async with house.keeper(), hardware(house) as gpu:
            assert await gpu.set_clock(1200) == 1200
            hold(house.machine.gpus[1])
            held = await until(lambda: gpu.read() if gpu.read().held else None)
            free(house.machine.gpus[1])
            await until(lambda: gpu.read().held is None)
            return held, gpu.read()

    held, later = asyncio.run(run())
    assert words in held.held and held.limit_mhz < 1200 and held.clock_mhz == held.limit_mhz
    assert (later.limit_mhz, later.clock_mhz) == (None, 1200)
    assert f"clocks do not follow: {held.limit_mhz} MHz where 1200" in caplog.text


def test_a_clock_that_never_gets_there_is_said_at_once(house):
    async def run():
        house.machine.gpus[0].thermal(705)
        async with house.keeper(), hardware(house) as gpu:
            return await gpu.set_clock(1410), gpu.read()

    read, reading = asyncio.run(run())
    assert (read, reading.limit_mhz, reading.held) == (705, 705, "thermal")


def test_an_idle_gpu_follows_though_it_is_at_rest(house):
    async def run():
        async with house.keeper(), hardware(house) as gpu:
            await gpu.set_clock(1200)
            for one in house.machine.gpus:
                one.work(0.0, 1.0)
                one.lock_by_other(210, 1200)
            await asyncio.sleep(0.6)
            return gpu.read()

    assert asyncio.run(run()).held is None


def test_what_the_keeper_does_not_allow_is_a_limit(house):
    async def run():
        async with house.keeper(clocks="900-1200"), hardware(house) as gpu:
            low = await gpu.set_clock(600), locks(house)
            high = await gpu.set_clock(1410), gpu.read(), locks(house)
            await gpu.set_clock(1200)
            return low, high, gpu.read()

    (low, at_low), (high, reading, at_high), fine = asyncio.run(run())
    assert (low, at_low, high, at_high) == (600, [(900, 900)] * 2, 1200, [(1200, 1200)] * 2)
    assert (reading.limit_mhz, reading.held) == (1200, "the keeper allows no more")
    assert fine.limit_mhz is None


def test_a_gpu_that_is_lost_cannot_be_read_and_the_rest_goes_on(house):
    async def run():
        async with house.keeper(), hardware(house) as gpu:
            await gpu.set_clock(900)
            house.machine.gpus[0].lost(True)

            def fails():
                with contextlib.suppress(OSError):
                    gpu.read()
                    return False
                return True

            await until(fails)
            house.machine.gpus[0].lost(False)
            await until(lambda: not fails())
            return await gpu.set_clock(1200), locks(house)

    assert asyncio.run(run()) == (1200, [(1200, 1200)] * 2)


def test_of_many_clocks_at_once_the_last_counts(house):
    async def run():
        async with house.keeper(), hardware(house) as gpu:
            await asyncio.gather(*(gpu.set_clock(mhz) for mhz in (600, 900, 1200, 900, 600)))
            return locks(house), house.machine.gpus[0].effective

    at_last, sets = asyncio.run(run())
    assert at_last == [(600, 600)] * 2 and sets <= 3


@pytest.mark.parametrize(
    ("break_it", "options", "words"),
    [
        (lambda machine: machine.gpus[1].mig(True), {}, "MIG is on"),
        (lambda machine: machine.gpus[1].mps([os.getpid()]), {}, "MPS shares it"),
        (lambda machine: None, {"names": ("0", "7")}, "7 is not here; here are 0 = GPU-"),
        (lambda machine: None, {"clocks": (600, 1411)}, "has no 1411 MHz"),
        (lambda machine: None, {"clocks": (600, 1200)}, "goes up to 1410 MHz, and the engine's `gpu` goes up to 1200"),
        (lambda machine: machine.driver(False), {}, "load the NVIDIA driver"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_set(house, break_it, options, words):
    async def run():
        break_it(house.machine)
        async with hardware(house, **options):
            pass

    with pytest.raises((ValueError, OSError), match=words):
        asyncio.run(run())
    assert all(gpu.attempted == 0 for gpu in house.machine.gpus)


def test_a_shared_gpu_may_be_read(house):
    async def run():
        house.machine.gpus[0].mig(True)
        async with hardware(house, Mode.OFF) as gpu:
            return gpu.read().clock_mhz

    assert asyncio.run(run()) == 1410


def test_a_clock_is_set_right_after_the_host_has_started(house, monkeypatch):
    """Its monotonic clock may begin near 0: nothing has failed a moment ago for that."""
    began_s = time.monotonic()
    monkeypatch.setattr("throttllem.gpu.hardware.time", SimpleNamespace(monotonic=lambda: time.monotonic() - began_s))

    async def run():
        async with house.keeper(), hardware(house) as gpu:
            await gpu.set_clock(900)
            return locks(house), time.monotonic() - began_s

    set_to, after_s = asyncio.run(run())
    assert set_to == [(900, 900)] * 2 or after_s > AGAIN_S


def test_nothing_can_be_read_before_it_was_found(house):
    with pytest.raises(OSError, match="not been found"):
        hardware(house).read()


def test_a_clock_that_another_controller_moved_is_asked_for_again(house):
    async def run():
        async with house.keeper(), hardware(house) as gpu:
            await gpu.set_clock(1200)
            house.machine.gpus[0].lock_by_other(510, 510)
            await until(lambda: gpu.read().held)
            await until(lambda: locks(house) == [(1200, 1200)] * 2)
            await until(lambda: gpu.read().held is None)

    asyncio.run(run())


def test_a_gpu_is_named_once(house):
    async def run():
        async with hardware(house, names=("0", house.machine.gpus[0].uuid)):
            pass

    with pytest.raises(ValueError, match="named twice"):
        asyncio.run(run())


def test_two_engines_have_no_gpu_in_common(house):
    async def run():
        async with hardware(house, Mode.OFF, names=("0",)) as one, hardware(house, Mode.OFF, names=("1",)) as other:
            check_apart((one, other))
            async with hardware(house, Mode.OFF, names=("1",)) as third:
                check_apart((one, other, third))

    with pytest.raises(ValueError, match=r"named for two engines"):
        asyncio.run(run())
