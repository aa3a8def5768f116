"""GPUs of another host through an agent: set, read, metered, and free again whatever ends."""

import asyncio
import contextlib
import socket
import ssl

import pytest

from throttllem.agent.messages import PROTOCOL, Hello, Refused, closed, from_agent, line
from throttllem.agent.secured import client_context
from throttllem.gpu.device import Gpu, Work
from throttllem.gpu.hardware import HardwareGpu, Mode

from .conftest import CLOCKS_MHZ, agent_at, new_secret, readable, remote, unreadable, until


def locks(testbed):
    return [gpu.lock for gpu in testbed.machine.gpus]


def test_clocks_are_set_there_and_free_when_the_gateway_ends(testbed, secret):
    async def run():
        async with testbed.keeper(), agent_at(testbed.socket, secret) as port:
            async with remote(port, secret) as made:
                gpu: Gpu = made
                await readable(gpu)
                sent = []
                read = await gpu.set_clock(900, lambda: sent.append(True))
                at_900, reading = locks(testbed), gpu.read()
                await gpu.set_clock(None)
                free = locks(testbed)
                await gpu.set_clock(600)
                named = made.uuids, made.ladder_mhz[-1]
            await until(lambda: locks(testbed) == [None, None])
            return read, at_900, reading, free, sent, named

    read, at_900, reading, free, sent, (uuids, top) = asyncio.run(run())
    assert (read, at_900, free, sent) == (900, [(900, 900)] * 2, [None, None], [True])
    assert (reading.clock_mhz, reading.planned_on_mhz, reading.trouble) == (900, 900, None)
    assert top == 1410 and len(uuids) == 2


@pytest.mark.parametrize("machine", [5.0], indirect=True)
def test_what_a_switch_took_is_measured_there(testbed, secret):
    async def run():
        async with testbed.keeper(), agent_at(testbed.socket, secret) as port, remote(port, secret) as gpu:
            await readable(gpu)
            switches = []
            for mhz in (900, 600, 600, 1200):
                await gpu.set_clock(mhz)
                switches.append(gpu.read().switch)
            return switches

    first, second, same, third = asyncio.run(run())
    assert [switch.mhz for switch in (first, second, third)] == [900, 600, 1200]
    assert same is second and first is not second
    assert all(0.004 < switch.seconds < 0.5 for switch in (first, second, third))


def test_joules_count_on_over_a_lost_connection_and_never_back(testbed, secret):
    async def run():
        async with testbed.keeper(), remote(port := free_port(), secret, mode=Mode.OFF) as gpu:
            async with agent_at(testbed.socket, secret, port):
                await readable(gpu)
                await asyncio.sleep(0.6)
                first = gpu.read()
            why = await unreadable(gpu)
            async with agent_at(testbed.socket, secret, port):
                again = await readable(gpu)
                await asyncio.sleep(0.6)
                return first, why, again, gpu.read()

    first, why, again, last = asyncio.run(run())
    assert 0.0 < first.energy_j <= again.energy_j < last.energy_j
    assert first.watts == pytest.approx(last.watts, rel=0.1)
    assert "agent 127.0.0.1" in why


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_gateway_that_hangs_leaves_no_clock_behind(testbed, secret):
    """Its connection stays, and its beats do not come."""

    async def run():
        async with testbed.keeper(), agent_at(testbed.socket, secret) as port, remote(port, secret, ttl_s=0.4) as gpu:
            await readable(gpu)
            await gpu.set_clock(600)
            held = locks(testbed)
            gpu._send = lambda message: None
            await until(lambda: locks(testbed) == [None, None])
            return held

    assert asyncio.run(run()) == [(600, 600)] * 2


def test_an_agent_that_ends_leaves_no_clock_behind_and_is_found_again(testbed, secret):
    async def run():
        async with testbed.keeper(), remote(port := free_port(), secret) as gpu:
            with pytest.raises(OSError, match=f"agent 127.0.0.1:{port}: "):
                await gpu.set_clock(900)
            async with agent_at(testbed.socket, secret, port):
                await readable(gpu)
                await gpu.set_clock(600)
                held = locks(testbed)
            gone = locks(testbed)
            await unreadable(gpu)
            assert await gpu.set_clock(None) is None, "an agent that is gone restored it"
            async with agent_at(testbed.socket, secret, port):
                await readable(gpu)
                return held, gone, await gpu.set_clock(900), locks(testbed)

    held, gone, read, again = asyncio.run(run())
    assert (held, gone, read, again) == ([(600, 600)] * 2, [None, None], 900, [(900, 900)] * 2)


def test_without_a_keeper_there_it_is_a_dry_run(testbed, secret):
    async def run():
        async with agent_at(testbed.socket, secret) as port, remote(port, secret) as gpu:
            await readable(gpu)
            return await gpu.set_clock(900), gpu.read()

    read, reading = asyncio.run(run())
    assert read == reading.planned_on_mhz == 900
    assert reading.clock_mhz == 1410 and "doctor" in reading.trouble


def test_one_gateway_holds_a_gpu_and_another_takes_over_when_it_is_gone(testbed, secret):
    async def run():
        async with testbed.keeper(), agent_at(testbed.socket, secret) as port:
            async with remote(port, secret, names=("1",)) as first, remote(port, secret, names=("0",)) as beside:
                await readable(first)
                await readable(beside)
                async with remote(port, secret) as second:
                    refused = ""
                    while "another gateway holds" not in refused:
                        refused = await unreadable(second)
                        await asyncio.sleep(0.01)
                    await first.__aexit__(None, None, None)
                    await beside.__aexit__(None, None, None)
                    await readable(second)
            return True

    assert asyncio.run(run())


def test_gpus_that_are_not_there_are_named(testbed, secret):
    async def run():
        async with agent_at(testbed.socket, secret) as port, remote(port, secret, names=("7",)) as gpu:
            why = ""
            while "not here" not in why:
                why = await unreadable(gpu)
                await asyncio.sleep(0.01)
            return why

    assert "engines: gpus: 7 is not here; here are 0 = " in asyncio.run(run())


async def hello_of(port, secret, **changes):
    """The agent's first answer to a hello."""
    told = {
        "protocol": PROTOCOL,
        "version": "2",
        "gpus": ["0"],
        "mode": "on",
        "clocks_mhz": list(CLOCKS_MHZ),
        "ttl_s": 1.0,
    }
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client_context(secret))
    writer.write(line(Hello(**(told | changes))))
    answer = from_agent(await reader.readline())
    writer.close()
    return answer


def test_another_protocol_is_refused_with_both_versions(testbed, secret):
    async def run():
        async with agent_at(testbed.socket, secret) as port:
            return await hello_of(port, secret, protocol=PROTOCOL + 1)

    answer = asyncio.run(run())
    assert isinstance(answer, Refused)
    speaks = f"this agent (1) speaks protocol {PROTOCOL}, the gateway (2) {PROTOCOL + 1}"
    assert answer.why == f"{speaks}: install the same version at both ends"


def test_who_has_not_the_secret_is_neither_served_nor_believed(testbed, secret, tmp_path, caplog):
    other = new_secret(tmp_path)
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE

    async def answers(port, context):
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        except OSError:
            return b""
        try:
            writer.write(
                line(Hello(protocol=PROTOCOL, version="2", gpus=["0"], mode="on", clocks_mhz=[1410], ttl_s=1.0))
            )
            return await reader.readline()
        except OSError:
            return b""
        finally:
            writer.close()

    async def run():
        async with agent_at(testbed.socket, secret) as port, remote(port, other) as gpu:
            await asyncio.sleep(0.5)
            why = await unreadable(gpu)
            return why, await answers(port, bare), await answers(port, client_context(other))

    why, bare_answer, other_answer = asyncio.run(run())
    assert "do both ends have the same pool secret?" in why
    assert bare_answer == other_answer == b""


@pytest.mark.parametrize(
    "text",
    [b"\n", b"{}\n", b'{"kind":"set","number":1,"mhz":900}\n', b"x" * 70_000 + b"\n", b'{"kind":"beat"}', b"\xff\n"],
)
def test_what_is_no_hello_ends_the_connection_and_nothing_else(testbed, secret, text):
    async def run():
        async with agent_at(testbed.socket, secret) as port, remote(port, secret, mode=Mode.OFF) as gpu:
            before = await readable(gpu)
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client_context(secret))
            writer.write(text)
            writer.write_eof() if writer.can_write_eof() else writer.close()
            with contextlib.suppress(OSError):
                await asyncio.wait_for(reader.read(), 5.0)
            writer.close()
            await asyncio.sleep(0.3)
            return before, gpu.read()

    before, after = asyncio.run(run())
    assert after.energy_j > before.energy_j


class Heard(HardwareGpu):
    """It notes for how long its engine worked."""

    seconds = ()

    def worked(self, work):
        Heard.seconds = (*Heard.seconds, work.seconds)
        super().worked(work)


def test_a_probe_that_says_nothing_is_no_fault(testbed, secret, caplog):
    async def run():
        async with agent_at(testbed.socket, secret) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client_context(secret))
            await closed(writer)
            await until(lambda: "it sent no hello" in caplog.text)

    caplog.set_level("INFO")
    asyncio.run(run())
    assert "Traceback" not in caplog.text


def test_an_unexpected_failure_is_logged_and_the_agent_reached_again(testbed, secret, caplog):
    async def run():
        async with agent_at(testbed.socket, secret) as port, remote(port, secret, mode=Mode.OFF) as gpu:
            await readable(gpu)
            take, gpu._take = gpu._take, lambda text: 1 / 0
            await unreadable(gpu)
            gpu._take = take
            return await readable(gpu)

    assert asyncio.run(run()).watts > 0
    assert "the connection failed" in caplog.text


def test_work_is_told_so_that_an_idle_gpu_shows(testbed, secret):
    async def run():
        async with agent_at(testbed.socket, secret, kind=Heard) as port, remote(port, secret, ttl_s=0.3) as gpu:
            await readable(gpu)
            for _ in range(4):
                gpu.worked(Work(seconds=2.0, decode_sequences=1, kv_tokens=1, prefill_tokens=0, prefill_pairs=0.0))
            await until(lambda: sum(Heard.seconds) >= 8.0)
            await asyncio.sleep(0.5)
            return sum(Heard.seconds)

    assert asyncio.run(run()) == 8.0
