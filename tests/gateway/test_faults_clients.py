"""Clients that leave at every stage or send garbage, before a whole gateway: nothing of them is left."""

import asyncio
import json
import random

import pytest

from tests.gateway.peer import asks, told, until, whole, with_peer
from tools.evaluation.fault_client import connection, head
from tools.evaluation.faults_client import generated


def request(there, **more):
    body = json.dumps(there.client.fields(**more)).encode()
    return head(len(body)) + body


@pytest.mark.parametrize("stage", ["body", "half", "queued", "first token", "stream", "end"])
def test_client_is_gone(tmp_path, stage):
    async def check(there, peer):
        if stage in ("queued", "first token"):
            peer.held.clear()
        full = asks(there, 2, 3) if stage == "queued" else []
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
        assert all(answer.served for answer in await told(full))

    with_peer(check, tmp_path, "engines.0.max_batch=2")


def test_malformed_bodies_and_headers(tmp_path):
    async def main():
        async with whole(tmp_path) as there:
            await there.up()
            dice = random.Random(7)
            answers = [await generated(there.client, dice) for _ in range(150)]
            await there.empty()
            return answers

    for found in asyncio.run(main()):
        assert found.status is not None and found.status < 500, found
        found.check()
