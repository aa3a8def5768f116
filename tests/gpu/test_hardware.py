"""Real GPUs of one engine: three modes, what limits a clock, what cannot be set, and that clocks are restored."""

import asyncio
import contextlib
import os
import time
from types import SimpleNamespace

import pytest

from throttllem.gpu.clock_limit import NOT_REACHED
from throttllem.gpu.device import Gpu
from throttllem.gpu.hardware import RETRY_S, HardwareGpu, Mode, check_apart
from throttllem.gpu.setters import clock_setter
from tools.nvml.machine import Op, rtx4090

CLOCKS = (600, 900, 1200, 1410)


def hardware(testbed, mode=Mode.ON, names=("0", "1"), clocks=CLOCKS, ttl_s=1.0):
    return HardwareGpu(names, mode=mode, setter=clock_setter(keeper=testbed.socket, ttl_s=ttl_s), clocks_mhz=clocks)


async def until(condition, within_s=3.0):
    """Wait until it holds; its value."""
    end_s = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < end_s, "it does not hold"
        await asyncio.sleep(0.01)
    return found


def locks(testbed):
    return [gpu.lock for gpu in testbed.machine.gpus]


def test_on_sets_all_of_them_and_restores_the_baseline(testbed):
    async def run():
        async with testbed.keeper("--normally", f"{testbed.machine.gpus[1].uuid}=1005-1005"):
            async with hardware(testbed) as device:
                gpu: Gpu = device
                sent_at = []
                read = await gpu.set_clock(900, lambda: sent_at.append(locks(testbed)))
                at_900, reading = locks(testbed), gpu.read()
                await gpu.set_clock(1200)
                at_1200 = locks(testbed)
                await gpu.set_clock(None)
                free = locks(testbed)
                await gpu.set_clock(600)
            return read, at_900, reading, at_1200, free, locks(testbed), sent_at

    read, at_900, reading, at_1200, free, after, sent_at = asyncio.run(run())
    assert (read, at_900, at_1200) == (900, [(900, 900)] * 2, [(1200, 1200)] * 2)
    assert (reading.clock_mhz, reading.planned_on_mhz, reading.limit_mhz, reading.held) == (900, 900, None, None)
    assert free == after == [None, (1005, 1005)]
    assert len(sent_at) == 1


@pytest.mark.parametrize(("mode", "planned"), [(Mode.DRY_RUN, 900), (Mode.OFF, 1410)])
def test_dry_run_and_off_set_nothing(testbed, mode, planned):
    async def run():
        async with testbed.keeper(), hardware(testbed, mode) as gpu:
            read = await gpu.set_clock(900)
            return read, gpu.read(), gpu.dry_run

    read, reading, dry_run = asyncio.run(run())
    assert (read, reading.clock_mhz, reading.planned_on_mhz) == (planned, 1410, planned)
    assert dry_run == (mode is Mode.DRY_RUN)
    assert all(gpu.attempted == 0 for gpu in testbed.machine.gpus)


def test_energy_and_power_are_sums_over_the_gpus(testbed):
    async def run():
        async with hardware(testbed, Mode.OFF) as gpu:
            before_j, began_s = gpu.read().energy_j, time.monotonic()
            await asyncio.sleep(0.4)
            reading = gpu.read()
            return reading.energy_j - before_j, reading.watts * (time.monotonic() - began_s), reading.watts

    joules, expected, watts = asyncio.run(run())
    assert watts == pytest.approx(sum(gpu.watts for gpu in testbed.machine.gpus), rel=0.01)
    assert joules == pytest.approx(expected, rel=0.15)


def test_without_a_keeper_it_is_a_dry_run_until_there_is_one(testbed, caplog):
    async def run():
        async with hardware(testbed) as gpu:
            read = await gpu.set_clock(900)
            alone = gpu.read(), gpu.dry_run, locks(testbed)
            async with testbed.keeper():
                await until(lambda: locks(testbed) == [(900, 900)] * 2)
                await until(lambda: not gpu.dry_run and gpu.read().clock_mhz == 900)
                return read, alone, gpu.read()

    read, (alone, dry_run, untouched), later = asyncio.run(run())
    assert read == alone.planned_on_mhz == 900 and dry_run and untouched == [None, None]
    assert "doctor" in alone.trouble and alone.clock_mhz == 1410
    assert (later.trouble, later.clock_mhz, later.dry_run_mhz) == (None, 900, None)
    assert "clocks are not set (dry run)" in caplog.text and "clocks are set again" in caplog.text


def test_a_keeper_that_is_restarted_is_used_again(testbed):
    async def run():
        async with hardware(testbed) as gpu:
            async with testbed.keeper():
                await gpu.set_clock(900)
            gone = locks(testbed)
            async with testbed.keeper():
                await gpu.set_clock(600)
                await until(lambda: locks(testbed) == [(600, 600)] * 2)
            return gone

    assert asyncio.run(run()) == [None, None]


def test_a_lease_that_is_lost_is_reported_and_taken_again(testbed, caplog):
    """Nothing is decided meanwhile, and the next heartbeat is in 20 s."""

    async def run():
        async with hardware(testbed, ttl_s=60.0) as gpu:
            async with testbed.keeper():
                await gpu.set_clock(900)
            await until(lambda: gpu.read().trouble, 0.5)
            gone = locks(testbed), gpu.read()
            async with testbed.keeper():
                await until(lambda: locks(testbed) == [(900, 900)] * 2)
                await until(lambda: gpu.read().trouble is None)
            return gone, gpu.read()

    (free, reading), _ = asyncio.run(run())
    assert free == [None, None] and reading.dry_run_mhz == 900
    assert "keeper" in reading.trouble
    assert "clocks are no longer set: keeper" in caplog.text and "clocks are set again" in caplog.text


@pytest.mark.parametrize(
    ("limit", "lift", "reason"),
    [
        (lambda gpu: gpu.limit_w(150.0), lambda gpu: gpu.limit_w(None), "power cap"),
        (lambda gpu: gpu.thermal(705), lambda gpu: gpu.thermal(None), "thermal"),
        (lambda gpu: gpu.lock_by_other(510, 510), lambda gpu: gpu.lock_by_other(1200, 1200), "another controller"),
    ],
)
def test_a_limit_is_detected_logged_and_lifted(testbed, caplog, limit, lift, reason):
    async def run():
        async with testbed.keeper(), hardware(testbed) as gpu:
            assert await gpu.set_clock(1200) == 1200
            limit(testbed.machine.gpus[1])
            held = await until(lambda: gpu.read() if gpu.read().held else None)
            lift(testbed.machine.gpus[1])
            await until(lambda: gpu.read().held is None)
            return held, gpu.read()

    held, later = asyncio.run(run())
    assert reason in held.held and held.limit_mhz < 1200 and held.clock_mhz == held.limit_mhz
    assert (later.limit_mhz, later.clock_mhz) == (None, 1200)
    assert f"clocks do not follow: {held.limit_mhz} MHz instead of 1200" in caplog.text


def test_a_clock_that_is_never_reached_is_reported_by_the_set(testbed):
    async def run():
        testbed.machine.gpus[0].thermal(705)
        async with testbed.keeper(), hardware(testbed) as gpu:
            return await gpu.set_clock(1410), gpu.read()

    read, reading = asyncio.run(run())
    assert (read, reading.limit_mhz, reading.held) == (705, 705, "thermal")


def test_an_idle_gpu_follows_below_its_clock(testbed):
    async def run():
        async with testbed.keeper(), hardware(testbed) as gpu:
            await gpu.set_clock(1200)
            for one in testbed.machine.gpus:
                one.work(0.0, 1.0)
                one.lock_by_other(210, 1200)
            await asyncio.sleep(0.6)
            return gpu.read()

    assert asyncio.run(run()).held is None


def test_the_range_of_the_keeper_is_a_limit(testbed):
    async def run():
        async with testbed.keeper(clocks="900-1200"), hardware(testbed) as gpu:
            low = await gpu.set_clock(600), locks(testbed)
            high = await gpu.set_clock(1410), gpu.read(), locks(testbed)
            await gpu.set_clock(1200)
            return low, high, gpu.read()

    (low, at_low), (high, reading, at_high), fine = asyncio.run(run())
    assert (low, at_low, high, at_high) == (600, [(900, 900)] * 2, 1200, [(1200, 1200)] * 2)
    assert (reading.limit_mhz, reading.held) == (1200, "the keeper allows no more")
    assert fine.limit_mhz is None


def test_a_lost_gpu_cannot_be_read_and_is_set_when_it_comes_back(testbed):
    async def run():
        async with testbed.keeper(), hardware(testbed) as gpu:
            await gpu.set_clock(900)
            testbed.machine.gpus[0].lost(True)

            def fails():
                with contextlib.suppress(OSError):
                    gpu.read()
                    return False
                return True

            await until(fails)
            testbed.machine.gpus[0].lost(False)
            await until(lambda: not fails())
            return await gpu.set_clock(1200), locks(testbed)

    assert asyncio.run(run()) == (1200, [(1200, 1200)] * 2)


def test_of_many_clocks_at_once_the_last_is_set(testbed):
    async def run():
        async with testbed.keeper(), hardware(testbed) as gpu:
            await asyncio.gather(*(gpu.set_clock(mhz) for mhz in (600, 900, 1200, 900, 600)))
            return locks(testbed), testbed.machine.gpus[0].effective

    at_last, sets = asyncio.run(run())
    assert at_last == [(600, 600)] * 2 and sets <= 3


@pytest.mark.parametrize(
    ("break_it", "options", "error"),
    [
        (lambda machine: machine.gpus[1].mig(True), {}, "MIG is on"),
        (lambda machine: machine.gpus[1].mps([os.getpid()]), {}, "MPS shares it"),
        (lambda machine: None, {"names": ("0", "7")}, "7 is not here; here are 0 = GPU-"),
        (lambda machine: None, {"clocks": (600, 1411)}, "has no 1411 MHz"),
        (lambda machine: None, {"clocks": (600, 1200)}, "goes up to 1410 MHz, .* goes up to 1200"),
        (lambda machine: machine.driver(False), {}, "load the NVIDIA driver"),
    ],
)
def test_unsuitable_gpus_are_rejected_before_a_clock_is_set(testbed, break_it, options, error):
    async def run():
        break_it(testbed.machine)
        async with hardware(testbed, **options):
            pass

    with pytest.raises((ValueError, OSError), match=error):
        asyncio.run(run())
    assert all(gpu.attempted == 0 for gpu in testbed.machine.gpus)


def test_a_shared_gpu_may_be_read(testbed):
    async def run():
        testbed.machine.gpus[0].mig(True)
        async with hardware(testbed, Mode.OFF) as gpu:
            return gpu.read().clock_mhz

    assert asyncio.run(run()) == 1410


def test_a_clock_is_set_right_after_the_host_has_started(testbed, monkeypatch):
    """Its monotonic clock may begin near 0, which must not look like a recent failure."""
    began_s = time.monotonic()
    monkeypatch.setattr("throttllem.gpu.hardware.time", SimpleNamespace(monotonic=lambda: time.monotonic() - began_s))

    async def run():
        async with testbed.keeper(), hardware(testbed) as gpu:
            await gpu.set_clock(900)
            return locks(testbed), time.monotonic() - began_s

    set_to, after_s = asyncio.run(run())
    assert set_to == [(900, 900)] * 2 or after_s > RETRY_S


def test_reading_before_the_context_is_open_fails(testbed):
    with pytest.raises(OSError, match="not been found"):
        hardware(testbed).read()


def test_a_clock_that_another_controller_changed_is_set_again(testbed):
    async def run():
        async with testbed.keeper(), hardware(testbed) as gpu:
            await gpu.set_clock(1200)
            testbed.machine.gpus[0].lock_by_other(510, 510)
            await until(lambda: gpu.read().held)
            await until(lambda: locks(testbed) == [(1200, 1200)] * 2)
            await until(lambda: gpu.read().held is None)

    asyncio.run(run())


def test_a_gpu_that_is_named_twice_is_rejected(testbed):
    async def run():
        async with hardware(testbed, names=("0", testbed.machine.gpus[0].uuid)):
            pass

    with pytest.raises(ValueError, match="named twice"):
        asyncio.run(run())


def test_two_engines_have_no_gpu_in_common(testbed):
    async def run():
        async with hardware(testbed, Mode.OFF, names=("0",)) as one, hardware(testbed, Mode.OFF, names=("1",)) as other:
            check_apart((one, other))
            async with hardware(testbed, Mode.OFF, names=("1",)) as third:
                check_apart((one, other, third))

    with pytest.raises(ValueError, match=r"named for two engines"):
        asyncio.run(run())


def test_a_boost_that_ends_below_the_clock_is_no_lock(make_gpus_here, tmp_path):
    """A GeForce that was never locked and reaches 2,730 of 3,105 MHz: planned with, and nobody else is blamed."""
    machine = make_gpus_here(*rtx4090(1, switch_ms=(0, 0)))
    machine.gpus[0].work(0.5, 3600.0)

    async def run():
        bed = SimpleNamespace(socket=tmp_path / "none")
        async with hardware(bed, Mode.DRY_RUN, names=("0",), clocks=(2100, 3105)) as gpu:
            await gpu.set_clock(3105)
            return await until(lambda: gpu.read() if gpu.read().held else None)

    held = asyncio.run(run())
    assert (held.limit_mhz, held.held) == (2730, NOT_REACHED)
    assert machine.writes() == []


def test_another_controller_is_fought_less_and_less(testbed, monkeypatch):
    """It locks again whenever we do; the time between two of our sets doubles."""
    monkeypatch.setattr("throttllem.gpu.hardware.RETRY_S", 0.5)

    async def run():
        async with testbed.keeper(), hardware(testbed) as gpu:
            await gpu.set_clock(1200)
            end_s = time.monotonic() + 1.9
            while time.monotonic() < end_s:
                if testbed.machine.gpus[0].lock == (1200, 1200) and gpu.read().clock_mhz == 1200:
                    await asyncio.sleep(0.12)
                    testbed.machine.gpus[0].lock_by_other(510, 510)
                await asyncio.sleep(0.01)

    asyncio.run(run())
    ours = [write for write in testbed.machine.writes() if write.gpu == 0 and write.op is Op.LOCK]
    assert len(ours) == 3  # at 0, after 0.5 s, after 1 s more


def test_watts_without_a_power_reading(testbed):
    testbed.machine.gpus[1].power_reading(False)

    async def run():
        async with hardware(testbed, Mode.OFF) as gpu:
            return gpu.read().watts

    assert asyncio.run(run()) == pytest.approx(sum(gpu.watts for gpu in testbed.machine.gpus), rel=0.05)


def test_the_counter_of_a_module_is_replaced_by_power(testbed, monkeypatch):
    monkeypatch.setattr("throttllem.gpu.counter.COMPARED_S", 0.3)
    testbed.machine.gpus[0].counter_of_module(300.0)

    async def run():
        async with hardware(testbed, Mode.OFF) as gpu:
            return await until(lambda: gpu.read().counter_trouble)

    trouble = asyncio.run(run())
    assert testbed.machine.gpus[0].uuid in trouble and "covers more than the GPU" in trouble


@pytest.mark.parametrize(("machine", "switch_ms"), [(0.0, 0.0), (80.0, 80.0), (450.0, 450.0)], indirect=["machine"])
def test_the_latency_of_a_switch_is_measured(testbed, switch_ms):
    """From the command to the clock read back; also where that comes after `set_clock` has given up waiting."""

    async def run():
        async with testbed.keeper(), hardware(testbed) as gpu:
            await gpu.set_clock(900)
            first = await until(lambda: gpu.read().switch)
            await gpu.set_clock(900)
            again = gpu.read().switch
            await gpu.set_clock(600)
            other = await until(lambda: gpu.read().switch if gpu.read().switch is not first else None)
            return first, again, other

    first, again, other = asyncio.run(run())
    assert again is first, "the clock was set already: no switch"
    assert (first.mhz, other.mhz) == (900, 600)
    for switch in (first, other):
        assert switch_ms / 1e3 <= switch.seconds <= switch_ms / 1e3 + 0.25


def test_reaching_a_clock_that_was_held_down_is_no_switch(testbed):
    async def run():
        async with testbed.keeper(), hardware(testbed) as gpu:
            await gpu.set_clock(600)
            before = gpu.read().switch
            testbed.machine.gpus[1].thermal(705)
            await gpu.set_clock(1200)
            held = await until(lambda: gpu.read().held)
            testbed.machine.gpus[1].thermal(None)
            await until(lambda: gpu.read().clock_mhz == 1200 and not gpu.read().held)
            return before, held, gpu.read().switch

    before, held, after = asyncio.run(run())
    assert before.mhz == 600 and "thermal" in held
    assert after is before
