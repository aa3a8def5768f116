import asyncio
import gc
import gzip
import json
import tracemalloc

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.fakes import running, until
from throttllem.config import LimitOptions
from throttllem.gateway.bounds.held_bytes import SMALL_BYTES, HeldBytes
from throttllem.openai_api.content_coding import decoded
from throttllem.openai_api.errors import ApiError

MB = 1 << 20
COMPLETIONS = "/v1/completions"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.integers(0, 3 * MB)), max_size=60))
def test_no_history_holds_more_than_the_budget_and_every_byte_comes_back(history):
    budget, holdings = HeldBytes(8 * MB), {}
    for client, number, size in history:
        before = holdings.get((client, number), 0)
        try:
            budget.change(client, before, size)
            holdings[client, number] = size
        except ApiError as error:
            assert error.status == 503 and size > before
        assert budget.held_bytes == sum(holdings.values()) <= budget.most_bytes
        large = sum(size for size in holdings.values() if size > SMALL_BYTES)
        assert large <= budget.most_bytes * 7 // 8
    for (client, _), size in holdings.items():
        budget.change(client, size, 0)
    assert budget.held_bytes == 0


def test_one_client_leaves_room_for_others_and_large_bodies_for_small_ones():
    budget, taken = HeldBytes(16 * MB), []
    for client in ("greedy", "second", "third"):
        with pytest.raises(ApiError):
            for _ in range(100):
                budget.change(client, 0, MB)
                taken.append(client)
    assert taken.count("greedy") == 8 and taken.count("second") >= 4 and taken.count("third") >= 1
    budget.change("greedy", 0, SMALL_BYTES)


async def half_sent(there, size, rest=1):
    host, port = there.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-length: {size + rest}\r\n\r\n"
    writer.write(head.encode() + b" " * size)
    return reader, writer


def test_uploads_beyond_the_budget_are_refused_and_small_requests_served():
    async def main():
        async with running(limits=LimitOptions(held_bytes=8 * MB)) as there:
            uploads = [await half_sent(there, MB) for _ in range(10)]
            await until(lambda: len(there.gateway._open) == 4 or there.gateway._budget.held_bytes > 3 * MB)
            refused = await uploads[-1][0].readuntil(b"}}")
            status, _, _ = await there.post(COMPLETIONS, {"model": "tiny", "prompt": "x"})
            most = there.gateway._budget.held_bytes
            for _, writer in uploads:
                writer.close()
            await until(lambda: not there.gateway._open)
            return refused, status, most, there.gateway._budget.held_bytes

    refused, status, most, after = asyncio.run(main())
    assert refused.startswith(b"HTTP/1.1 503 ") and b"retry-after" in refused and b"too_many_bytes" in refused
    assert (status, after) == (200, 0) and most <= 5 * MB


def test_a_body_that_drips_is_408(monkeypatch):
    async def main():
        async with running(limits=LimitOptions(slow_reader_s=0.2, body_bytes_per_s=1000)) as there:
            reader, writer = await half_sent(there, 1, rest=10_000)
            answer = asyncio.create_task(reader.readuntil(b"}}"))
            for _ in range(100):
                writer.write(b" ")
                await asyncio.sleep(0.02)
                if answer.done():
                    break
            writer.close()
            return await answer

    assert asyncio.run(main()).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("fault", [{"max_tokens": -1}, {"model": "unknown"}, {"prompt": {}}])
def test_refused_bodies_are_forgotten_without_the_garbage_collector(fault):
    async def main():
        async with running() as there, aiohttp.ClientSession() as client:
            body = json.dumps({"model": "tiny", "prompt": "x", "padding": "y" * 900_000} | fault).encode()

            async def refused():
                async with client.post(there.url + COMPLETIONS, data=body) as answer:
                    return answer.status, await answer.read()

            await refused()
            gc.collect()
            gc.disable()
            tracemalloc.start()
            try:
                for _ in range(12):
                    status, _ = await refused()
                    assert status in (400, 404)
                await asyncio.sleep(0.05)
                return tracemalloc.get_traced_memory()[0]
            finally:
                tracemalloc.stop()
                gc.enable()

    assert asyncio.run(main()) < 2 * MB


def test_the_rest_of_a_long_reply_is_held_until_the_client_takes_it():
    async def main():
        async with running() as there:
            reply, taken = b"x" * (3 * MB), []

            async def whole(exchange):
                send = exchange.send

                async def counted(message):
                    taken.append(len(message.get("body", b"")))
                    await send(message)

                exchange.send = counted
                await exchange.reply(200, (), reply)

            there.gateway._route = whole
            _, _, body = await there.get("/", headers={"accept-encoding": "identity"})
            return body == reply, max(taken)

    same, largest = asyncio.run(main())
    assert same and largest <= 256 * 1024


@pytest.mark.parametrize("clients", [1, 8])
def test_of_uploads_that_exceed_the_budget_together_those_that_fit_are_served(clients):
    async def main():
        async with running(limits=LimitOptions(held_bytes=8 * MB)) as there:
            host, port = there.url.removeprefix("http://").split(":")
            body = json.dumps({"model": "tiny", "prompt": "x", "padding": "y" * MB}).encode()
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()

            async def upload(number):
                reader, writer = await asyncio.open_connection(
                    host, int(port), local_addr=(f"127.0.0.{2 + number % clients}", 0)
                )
                try:
                    writer.write(head)
                    for at in range(0, len(body), 16 * 1024):  # all grow together
                        writer.write(body[at : at + 16 * 1024])
                        await asyncio.sleep(0)
                    return (await reader.readuntil(b"\r\n"))[9:12]
                finally:
                    writer.close()

            return await asyncio.gather(*map(upload, range(16)))

    served = asyncio.run(main()).count(b"200")
    assert 3 <= served < 16


def test_a_refused_upload_is_given_back_while_its_rest_is_discarded():
    async def main():
        async with running(limits=LimitOptions(held_bytes=8 * MB)) as there:
            host, port = there.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode())
            for _ in range(80):
                writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
                await asyncio.sleep(0)
                if there.gateway._budget.held_bytes > 3 * MB:
                    break
            while (held := there.gateway._budget.held_bytes) and there.gateway._open:
                writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
                await asyncio.sleep(0.001)
            given_back = not held and len(there.gateway._open) == 1
            answer = await reader.readuntil(b"}}")
            writer.close()
            return given_back, answer

    given_back, answer = asyncio.run(main())
    assert given_back and answer.startswith(b"HTTP/1.1 503 ")


def test_room_for_a_compressed_body_is_held_before_it_is_decompressed(monkeypatch):
    async def main():
        async with running(limits=LimitOptions(held_bytes=8 * MB)) as there:
            held = []

            async def noted(*about):
                held.append(there.gateway._budget.held_bytes)
                return await decoded(*about)

            monkeypatch.setattr("throttllem.gateway.http.exchange.decoded", noted)
            body = gzip.compress(b'{"model":"tiny","prompt":"x"}' + b" " * MB)
            headers = {"content-encoding": "gzip"}
            async with there.http.post(there.url + COMPLETIONS, data=body, headers=headers) as response:
                await response.read()
            return response.status, held, there.gateway._budget.held_bytes

    status, held, after = asyncio.run(main())
    assert (status, after) == (200, 0) and held[0] > MB
