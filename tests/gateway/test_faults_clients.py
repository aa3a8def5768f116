"""Clients that disconnect at every stage or send garbage, before a whole gateway: nothing of them is left."""

import asyncio
import json
import random

import pytest

from tests.gateway.peer import answers, stream_and_whole, until, whole, with_peer
from tools.evaluation.faults.clients import generated
from tools.testbed.client import connection, head


def request(there, **more):
    body = json.dumps(there.client.fields(**more)).encode()
    return head(len(body)) + body


@pytest.mark.parametrize("stage", ["body", "half", "queued", "first token", "stream", "end"])
def test_client_disconnects(tmp_path, stage):
    async def check(there, peer):
        if stage in ("queued", "first token"):
            peer.held.clear()
        full = stream_and_whole(there, 2, 3) if stage == "queued" else []
        await until(lambda: peer.open == len(full))
        async with connection(there.client.url) as (reader, writer):
            sent = request(there, tokens=3 if stage == "end" else 2000)
            writer.write({"body": head(99), "half": sent[:-9]}.get(stage, sent))
            if stage == "queued":
                await until(lambda: there.loop.controller.snapshot().queue == 1)
            elif stage == "first token":
                await until(lambda: peer.open == 1)
            elif stage in ("stream", "end"):
                await reader.readuntil({"stream": b"data:", "end": b"[DONE]\n\n"}[stage])
        if stage == "queued":
            await until(lambda: not there.loop.controller.snapshot().queue)
        peer.held.set()
        assert all(answer.served for answer in await answers(full))

    with_peer(check, tmp_path, "engines.0.max_batch=2")


def test_malformed_bodies_and_headers(tmp_path):
    async def main():
        async with whole(tmp_path) as there:
            await there.up()
            dice = random.Random(7)
            found = [await generated(there.client, dice) for _ in range(150)]
            await there.empty()
            return found

    for answer in asyncio.run(main()):
        assert answer.status is not None and answer.status < 500, answer
        answer.check()
