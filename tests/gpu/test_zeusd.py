"""Clocks through zeusd: a fake with its HTTP interface (zeus 0.16), which rejects any other request."""

import asyncio
import http.server
import os
import socket
import socketserver
import threading
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.keeper.rig import NOBODY, needs_root
from throttllem.gpu.hardware import HardwareGpu, Mode
from throttllem.gpu.setters import clock_setter
from throttllem.gpu.zeusd import ZeusdError, reach

FIELDS = {
    "/gpu/set_gpu_locked_clocks": {"gpu_ids", "min_clock_mhz", "max_clock_mhz", "block"},
    "/gpu/reset_gpu_locked_clocks": {"gpu_ids", "block"},
}


class Zeusd(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    machine = None
    requests = ()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        url = urlsplit(self.path)
        fields = {name: value for name, (value,) in parse_qs(url.query).items()}
        self.server.requests += ((url.path, tuple(sorted(fields.items()))),)
        if FIELDS.get(url.path) != set(fields):
            return self.send_error(400, "no such request")
        for number in map(int, fields["gpu_ids"].split(",")):
            gpu = self.server.machine.gpus[number]
            if gpu.control.permission_denied:
                return self.send_error(500, "Insufficient Permissions")
            if "reset" in url.path:
                gpu.unlock_by_other()
            else:
                gpu.lock_by_other(int(fields["min_clock_mhz"]), int(fields["max_clock_mhz"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        return self.end_headers()

    def log_message(self, *_):
        pass

    def address_string(self):
        return "unix"


@pytest.fixture
def zeusd(machine, tmp_path):
    with Zeusd(str(tmp_path / "zeusd.sock"), Handler) as server:
        server.machine = machine
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def hardware(path):
    return HardwareGpu(
        ("0", "1"), mode=Mode.ON, setter=clock_setter(keeper=path, zeusd=path), clocks_mhz=(900, 1200, 1410)
    )


def test_it_sets_and_resets(machine, zeusd, tmp_path):
    """A lock that another program set is reset, too: nothing is inferred from a clock."""

    async def run():
        machine.gpus[1].lock_by_other(1005, 1005)
        async with hardware(tmp_path / "zeusd.sock") as gpu:
            read = await gpu.set_clock(900), [one.lock for one in machine.gpus]
            await gpu.set_clock(1200)
        return read

    assert asyncio.run(run()) == (900, [(900, 900)] * 2)
    assert [one.lock for one in machine.gpus] == [None, None]
    assert [path for path, _ in zeusd.requests] == [*FIELDS][:1] * 2 + [*FIELDS][1:] * 2


def test_without_it_it_is_a_dry_run(machine, tmp_path):
    async def run():
        async with hardware(tmp_path / "none.sock") as gpu:
            return await gpu.set_clock(900), gpu.read()

    read, reading = asyncio.run(run())
    assert read == 900 and "is it running" in reading.trouble and reading.dry_run_mhz == 900


@needs_root
def test_a_socket_of_another_user_is_not_used(tmp_path):
    """The process that listens counts, not the owner of the file, which that user's folder may have lent."""
    path = tmp_path / "zeusd.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        os.seteuid(NOBODY)
        try:
            listener.listen(1)
        finally:
            os.seteuid(0)
        with pytest.raises(ZeusdError, match=f"user {NOBODY} listens there"):
            reach(path)


@pytest.mark.parametrize("denied", [0, 1])
def test_a_failed_set_is_reported_and_all_gpus_are_reset(machine, zeusd, tmp_path, denied):
    async def run():
        machine.gpus[denied].permission(False)
        async with hardware(tmp_path / "zeusd.sock") as gpu:
            await gpu.set_clock(900)
            return gpu.read().trouble

    assert "HTTP 500" in asyncio.run(run())
    assert [one.lock for one in machine.gpus] == [None, None]


def test_a_set_that_failed_half_way_is_reset_at_the_end(machine, zeusd, tmp_path):
    async def run():
        async with hardware(tmp_path / "zeusd.sock") as gpu:
            await gpu.set_clock(900)
            (tmp_path / "zeusd.sock").rename(tmp_path / "away")
            await gpu.set_clock(1200)
            (tmp_path / "away").rename(tmp_path / "zeusd.sock")
            return [one.lock for one in machine.gpus]

    assert asyncio.run(run()) == [(900, 900)] * 2
    assert [one.lock for one in machine.gpus] == [None, None]
