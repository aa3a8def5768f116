"""Forged step reports at the plug-in's address: requests are served after any of them. Real sockets."""

import asyncio
import json
import struct
from dataclasses import replace

import pytest

from tests.engines.test_step_reports import send, the_time_of_the_steps  # noqa: F401
from tests.gateway.peer import Peer, answers, stream_and_whole, until, whole
from throttllem.engines.step_reports import PACKED, StepStats

NAN, INF = float("nan"), float("inf")
STEP = StepStats(boot=7, sequence=1, step=1, monotonic_s=5.0, running=0, waiting=0, kv_usage=0.0)


def forged(**numbers):
    """A datagram with these numbers in it; those that the format cannot hold are put in as bits."""
    names = ["magic", "boot", "sequence", "flags", "step", "monotonic_s", "running", "waiting", "kv_usage"]
    names += ["prompt_tokens", "generated_tokens", "preemptions", "decode_sequences"]
    names += ["prefix_queries", "prefix_hits", "drafted_tokens", "accepted_tokens", "seconds"]
    fields = dict(zip(names, PACKED.unpack(STEP.pack()), strict=True)) | {"sequence": 2}
    return PACKED.pack(*(fields | numbers).values())


def text(value):
    """JSON as long as a datagram of the format."""
    return b"tls2" + json.dumps({"step": value}).encode()[: PACKED.size - 4].ljust(PACKED.size - 4)


FORGED = {
    "2**62": [forged(step=2**62)],
    "2**63 - 1": [forged(step=2**63 - 1)],
    "2**63": [forged(step=-(2**63))],
    "-1": [forged(step=-1)],
    "as far as a number may go": [forged(step=2**40 - 1)],
    "ahead of the time that passed": [forged(step=10**9)],
    "ahead again and again": [forged(step=10**9 * n, sequence=1 + n) for n in range(1, 9)],
    "bits of a NaN": [forged(step=struct.unpack("<q", struct.pack("<d", NAN))[0])],
    "bits of a float": [forged(step=struct.unpack("<q", struct.pack("<d", 1.5))[0])],
    "text": [text(value) for value in (10**30, 2**63, NAN, 1.5, True, "1", None)],
    "sequence": [forged(sequence=2**64 - 1)],
    "counts": [forged(running=2**32 - 1, waiting=2**32 - 1, sequence=n) for n in range(2, 8)],
    "tokens": [forged(prompt_tokens=2**32 - 1, generated_tokens=2**32 - 1)],
    "times": [forged(monotonic_s=value, flags=3, seconds=value) for value in (NAN, INF, -INF, -1.0, 1e300)],
    "another boot first": [replace(STEP, boot=8, sequence=n, step=10**6 * n).pack() for n in range(1, 4)],
    "usage": [forged(kv_usage=value) for value in (NAN, INF, -1.0, 1.5)],
}


async def health(there):
    status, page = await there.client.get("/health")
    return status, json.loads(page)["status"]


def with_steps(check, folder, address):
    async def main():
        async with Peer() as peer:
            peer.info = {"engines": 1, "servers": 1, "stats": address}
            async with whole(folder, f"engines.0.stats={address}", url=peer.url) as there:
                await there.up()
                await until(lambda: there.backend.engine.steps is not None and there.backend.engine.steps.is_listening)
                await check(there, peer)
                await there.empty(peer)
                assert await health(there) == (200, "ok")

    asyncio.run(main())


def received(there, more):
    steps = there.backend.engine.steps
    return steps.received + steps.garbage + steps.other_boots >= more


@pytest.mark.parametrize("name", FORGED)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_requests_are_served_after_forged_steps(tmp_path, name, busy, caplog):
    address = str(tmp_path / "steps.sock")

    first = name == "another boot first"

    async def check(there, peer):
        running = stream_and_whole(there, 4, 400) if busy else []
        await until(lambda: peer.open == len(running))
        send(address, *(FORGED[name] if first else ()), STEP.pack(), *(() if first else FORGED[name]))
        await until(lambda: received(there, 1 + len(FORGED[name])))
        for requests in (running, stream_and_whole(there, 4, 3), stream_and_whole(there, 4, 3)):
            assert all(answer.served for answer in await answers(requests))
        assert abs(there.backend.progress.iteration) < 10**6

    with_steps(check, tmp_path, address)
    assert "the control core failed" not in caplog.text
