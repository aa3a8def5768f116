"""The keeper's protocol: no client's bytes leave a lease behind, or keep the next client out."""

import asyncio
import json
import logging
import os
import socket
import zlib

from hypothesis import strategies as st

from tests.fuzz.properties import cuts, fuzzed, mutated, pieces
from throttllem.gpu.clock_range import ClockRange
from throttllem.gpu.locks import LockableGpu
from throttllem.keeper.journal import Journal
from throttllem.keeper.leases import Leases
from throttllem.keeper.server import LINE_BYTES, Server
from tools.testbed.private import private_folder

UUIDS = ("GPU-1", "GPU-2")
LEASE = {"op": "lease", "gpus": list(UUIDS), "ttl_s": 5}
EXCHANGES = [
    b"".join(json.dumps(each).encode() + b"\n" for each in some)
    for some in (
        [{"op": "status"}, LEASE, {"op": "set", "mhz": 900}, {"op": "beat"}, {"op": "release"}, LEASE],
        [LEASE, {"op": "set", "mhz": 1410}, {"op": "set", "mhz": 600}],
        [LEASE | {"gpus": ["GPU-2"], "ttl_s": 0.2}, {"op": "lease"}, {"op": "set"}],
    )
]
TOKENS = [
    b"\n", b"null", b"[]", b"{}", b"true", b"-1", b"9" * 5000, b"1e999", b"NaN", b'"\\ud800"', b'"GPU-1"', b"[" * 3000,
    b"\x00", b"\xff", b'"op":"set",', b"x" * LINE_BYTES, b'"mhz"', b"900.0", b'"\\n\\u001b[2J"',
]  # fmt: skip


class Called(Leases):
    """Leases whose GPUs are numbers in a dict: the range that each is locked to."""

    def __init__(self, journal):
        super().__init__(None, dict.fromkeys(UUIDS, ClockRange(600, 1410)), {}, journal)
        self.locked = {}

    def _call(self, uuid, call):
        done = asyncio.get_running_loop().create_future()
        gpu = Gpu(self.locked, uuid)
        done.set_result(gpu.check() if call is LockableGpu.check else call(gpu))
        return done


class Gpu:
    def __init__(self, locked, uuid):
        self.locked, self.uuid = locked, uuid

    def lock(self, clocks):
        self.locked[self.uuid] = clocks

    def restore(self, baseline):
        assert baseline is None
        self.locked.pop(self.uuid, None)

    def check(self):
        pass


async def _answers(server, data, cuts):
    """What a client gets that sends this and hangs up: the lines, or what came before the keeper closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    theirs.setblocking(False)
    serving = asyncio.create_task(server._serve(theirs, os.getpid(), 0))
    client, sender = await asyncio.open_unix_connection(sock=ours)
    got = b""
    try:
        for piece in pieces(data, cuts[:4]):
            sender.write(piece)
            await asyncio.sleep(0)
        sender.write_eof()
        got = await client.read(-1)
    except ConnectionError:
        pass
    await serving
    sender.transport.abort()
    return got


@fuzzed(data=mutated(*EXCHANGES, tokens=TOKENS), cuts=cuts)
def test_whatever_a_client_sends_its_lease_ends_with_it(data, cuts):
    logging.disable(logging.CRITICAL)

    async def run(folder):
        leases = Called(Journal((folder / "a", folder / "b"), "boot"))
        server = Server(leases, frozenset({0}))
        async with asyncio.timeout(5):
            got = await _answers(server, data, cuts)
            await leases.restored(UUIDS)
            assert leases.held == {} and leases.locked == {} and leases.restore_to == {}
            lines = got.split(b"\n")
            assert all(type(json.loads(line)["ok"]) is bool for line in lines[:-1])
            assert len(lines) - 1 <= data.count(b"\n") + 1
            status = json.loads(await _answers(server, b'{"op": "status"}\n', []))
            assert status["ok"] and status["held"] == {}

    try:
        with private_folder("fuzz") as folder:
            asyncio.run(run(folder))
    finally:
        logging.disable(logging.NOTSET)


BODY = b'[3, "boot", {"GPU-1": null, "GPU-2": [600, 900]}, true]'


@fuzzed(body=mutated(BODY, tokens=TOKENS), checked=st.booleans())
def test_any_journal_is_read_or_known_to_be_damaged(body, checked):
    logging.disable(logging.CRITICAL)
    try:
        with private_folder("fuzz") as folder:
            path = folder / "journal"
            path.write_bytes(b"%08x %s\n" % (zlib.crc32(body), body) if checked else body)
            journal = Journal((path,), "boot")
            found = journal.read()
        assert not journal.damaged or found == {}
        assert all(isinstance(uuid, str) and uuid.isprintable() for uuid in found)
        assert all(clocks is None or 0 < clocks.low_mhz <= clocks.high_mhz for clocks in found.values())
    finally:
        logging.disable(logging.NOTSET)
