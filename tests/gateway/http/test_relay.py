"""An engine's reply on its way to the client: the same bytes, tokens counted, the session finished, metrics added."""

import asyncio
import gzip
import json
import zlib
from types import SimpleNamespace

import pytest

from tests.gateway.fakes import running, until
from tests.gateway.upstream import chat_chunk, chat_events, sse
from throttllem.config import LimitOptions, ServerOptions
from throttllem.engines.base import Reply
from throttllem.gateway.control.session import Receipt
from throttllem.gateway.http.relay import relay
from throttllem.openai_api.requests import Api

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
GIVEN = {"queue_time_ms": 1.5, "time_to_first_token_ms": 2.5, "energy_joules": 0.25, "clock_mhz": 1410}


def chat(**fields):
    return {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True, **fields}


def complete(**fields):
    return {"model": "tiny", "prompt": "x", **fields}


def served(path, body, headers=(), **options):
    """The answer, the engine and the session of one request."""

    async def main():
        async with running(**options) as there:
            answer = await there.post(path, body, headers)
            return *answer, there.engine, there.session

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "body", "tokens", "used"),
    [
        (CHAT, chat(max_tokens=40), 40, None),
        (CHAT, chat(max_tokens=5, stream_options={"include_usage": True}), 5, 5),
        (CHAT, chat(play="agent"), 11, 11),
        (COMPLETIONS, complete(max_tokens=7, stream=True), 7, None),
        (COMPLETIONS, complete(max_tokens=7), 0, 7),
        ("/v2/models/tiny/generate_stream", {"text_input": "x", "max_tokens": 6, "stream": True}, 6, None),
    ],
)
def test_the_client_gets_the_engines_bytes_and_tokens_are_counted(path, body, tokens, used):
    status, headers, got, engine, session = served(path, body)
    assert (status, got) == (200, engine.sent)
    assert headers["x-engine"] == "yes" and headers["x-request-id"]
    assert (session.counted, session.finished, session.ends) == (tokens, used, ["finished"])


def test_a_stream_that_is_no_stream_counts_nothing():
    body = {"text_input": "x", "max_tokens": 1}
    *_, session = served("/v2/models/tiny/generate_stream", body)
    assert (session.counted, session.streams, session.ends) == (0, False, ["finished"])


@pytest.mark.parametrize("where", ["header", "body"])
@pytest.mark.parametrize("usage", [False, True])
def test_metrics_come_in_the_last_event_of_data(where, usage):
    body = chat(max_tokens=4, stream_options={"include_usage": usage})
    headers = {"x-throttllem-metrics": "1"} if where == "header" else {}
    body |= {} if headers else {"throttllem": {"metrics": True}}
    _, _, got, engine, session = served(CHAT, body, headers)
    *front, last, done, rest = got.split(b"\n\n")
    *front_sent, last_sent, done_sent, _ = engine.sent.split(b"\n\n")
    assert (front, done, rest) == (front_sent, done_sent, b"")
    assert json.loads(last[6:]) == json.loads(last_sent[6:]) | {"metrics": GIVEN}
    assert session.counted == 4
    assert b"throttllem" not in engine.seen[0][3]


def test_metrics_in_an_answer_that_is_not_streamed():
    _, headers, got, engine, _ = served(COMPLETIONS, complete(throttllem={"metrics": True}))
    assert json.loads(got) == json.loads(engine.sent) | {"metrics": GIVEN}
    assert int(headers["content-length"]) == len(got)


def test_an_engines_error_passes_and_leaves_the_session_unfinished():
    status, headers, got, _, session = served(CHAT, chat(play="refuse"))
    assert (status, headers["retry-after"]) == (503, "7")
    assert json.loads(got) == {"error": {"message": "too many"}}
    assert session.ends == ["cancelled"]


def test_a_stream_without_done_is_complete():
    _, _, got, engine, session = served(CHAT, chat(play="no-done"))
    assert got == engine.sent and session.ends == ["finished"]


@pytest.mark.parametrize("metrics", [False, True])
def test_a_stream_that_ends_before_its_output_is_an_error(metrics):
    _, _, got, engine, session = served(CHAT, chat(play="cut-off", throttllem={"metrics": metrics}))
    assert got.startswith(engine.sent + b'data: {"error":') and b"the engine broke off" in got
    assert (session.counted, session.ends) == (3, ["cancelled"])


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/files"])
def test_an_engine_sends_no_client_elsewhere(path):
    async def main():
        async with running() as there:
            return await there.post(path, complete(play="redirect"))

    status, headers, got = asyncio.run(main())
    assert status == 502 and "location" not in headers and b"redirects" in got and b"10.0.0.1" not in got


@pytest.mark.parametrize("metrics", [False, True])
@pytest.mark.parametrize("play", ["done-hang", "done-cut", "done-more"])
def test_done_ends_a_stream_whatever_the_engine_does_then(play, metrics):
    async def main():
        async with running() as there:
            async with asyncio.timeout(2):
                *_, got = await there.post(CHAT, chat(play=play, throttllem={"metrics": metrics}))
            session = there.session
            await until(lambda: there.engine.left == 1)
            return got, session

    got, session = asyncio.run(main())
    events = got.split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""] and len(events) == 6
    assert (b"metrics" in events[-3]) is metrics
    assert (session.counted, session.ends) == (3, ["finished"])


def test_a_connection_is_used_again_after_done():
    async def main():
        async with running() as there:
            for _ in range(3):
                await there.post(CHAT, chat())
                await until(lambda: not there.gateway._open)
            return len(there.models.engine.upstream._all)

    assert asyncio.run(main()) == 1


def test_an_error_in_the_stream_leaves_the_session_unfinished():
    _, _, got, engine, session = served(CHAT, chat(play="error-event"))
    assert got == engine.sent and session.ends == ["cancelled"]


@pytest.mark.parametrize(("play", "gap"), [("break-off", b""), ("break-event", b"\n\n")])
def test_an_engine_that_breaks_off_is_an_error_event(play, gap):
    status, _, got, engine, session = served(CHAT, chat(play=play))
    assert status == 200
    assert got.startswith(engine.sent + gap + b'data: {"error":')
    error = json.loads(got.rstrip().rpartition(b"data: ")[2])["error"]
    assert error["type"] == "engine_error" and b"[DONE]" not in got
    assert session.ends == ["cancelled"]


def test_an_engine_that_sends_garbage():
    status, _, got, _, session = served(COMPLETIONS, complete(play="garbage"))
    assert (status, json.loads(got)["error"]["code"]) == (502, "engine_error")
    assert session.ends == ["cancelled"]


def test_an_answer_too_long_to_be_held_passes_unread():
    status, _, got, engine, session = served(
        COMPLETIONS, complete(max_tokens=3000), limits=LimitOptions(body_bytes=1024)
    )
    assert (status, got) == (200, engine.sent)
    assert (session.finished, session.ends) == (None, ["finished"])


# ---- compressed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("coding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_compressed_body_is_read_and_goes_on_plain(coding, compress):
    body = json.dumps(complete(max_tokens=4)).encode()
    status, _, _, engine, session = served(COMPLETIONS, compress(body), {"content-encoding": coding})
    _, _, headers, got = engine.seen[0]
    assert (status, got, session.finished) == (200, body, 4) and "content-encoding" not in headers


def test_a_compressed_body_over_the_limit_is_refused():
    async def main():
        async with running(limits=LimitOptions(body_bytes=4096)) as there:
            found = []
            for body, coding in ((gzip.compress(bytes(100_000)), "gzip"), (b"{}", "zstd"), (b"{}", "gzip")):
                status, headers, got = await there.post(COMPLETIONS, body, {"content-encoding": coding})
                found.append((status, json.loads(got)["error"]["code"], headers.get("accept-encoding")))
            return found, there.engine.seen

    refused = [(413, "body_too_large", None), (415, "unsupported_encoding", "gzip, deflate"), (400, None, None)]
    assert asyncio.run(main()) == (refused, [])


@pytest.mark.parametrize(
    ("tokens", "accepted", "coded"), [(3000, "gzip", True), (3000, "br", False), (3, "gzip", False)]
)
def test_long_replies_in_one_piece_are_compressed_for_clients_that_accept_it(tokens, accepted, coded):
    _, headers, got, engine, session = served(COMPLETIONS, complete(max_tokens=tokens), {"accept-encoding": accepted})
    assert ("content-encoding" in headers) is ("vary" in headers) is coded
    assert got == engine.sent and session.finished == tokens  # the client of this test decompresses
    assert (int(headers["content-length"]) < len(got)) is coded
    assert engine.seen[0][2]["accept-encoding"] == "identity"


def test_a_stream_is_never_compressed():
    _, headers, got, engine, _ = served(CHAT, chat(max_tokens=500), {"accept-encoding": "gzip"})
    assert "content-encoding" not in headers and got == engine.sent


def test_what_the_engine_compressed_passes():
    """A proxy in front of it may compress whatever is requested."""
    status, headers, got, engine, session = served(CHAT, chat(play="compressed"))
    assert (status, headers["content-encoding"], got) == (200, "gzip", gzip.decompress(engine.sent))
    assert session.ends == ["finished"] and session.finished is None


# ---- kept alive ------------------------------------------------------------------------------------------------

COMMENT = b": keep-alive\n\n"
KEPT = ServerOptions(keep_alive_s=0.1)


def test_a_silent_stream_is_kept_alive_before_its_first_byte():
    status, headers, got, engine, session = served(CHAT, chat(play="late"), server=KEPT)
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    comments, rest = got[: -len(engine.sent)], got[-len(engine.sent) :]
    assert rest == engine.sent and comments == COMMENT * comments.count(COMMENT) and 2 <= comments.count(COMMENT) <= 7
    assert session.ends == ["finished"] and session.counted == 3


def test_a_stream_is_kept_alive_while_it_waits_for_a_place():
    async def main():
        async with running(server=KEPT) as there:
            there.models.open.clear()
            asking = asyncio.create_task(there.post(CHAT, chat()))
            await asyncio.sleep(0.3)
            there.models.open.set()
            return await asking, there.engine.sent

    (status, _, got), sent = asyncio.run(main())
    assert status == 200 and got.endswith(sent) and got.startswith(COMMENT)


@pytest.mark.parametrize(
    ("play", "message"), [("late-refuse", "too many"), ("late-whole", "the engine did not stream plain events")]
)
def test_an_error_behind_a_comment_is_an_event(play, message):
    status, _, got, _, session = served(CHAT, chat(play=play), server=KEPT)
    event = got.replace(COMMENT, b"")
    assert status == 200 and event.startswith(b"data: ") and event.endswith(b"\n\n")
    assert json.loads(event[6:])["error"]["message"] == message and session.ends == ["cancelled"]


def test_a_slow_reply_in_one_piece_is_no_event_stream():
    status, headers, got, *_ = served(CHAT, chat(play="slow-whole"), server=KEPT)
    assert (status, headers["content-type"], got) == (200, "application/json", b'{"choices":[]}')


@pytest.mark.parametrize(("play", "kept"), [("hang", True), ("hang-event", False)])
def test_comments_stand_between_events_only(play, kept):
    async def main():
        async with running(server=KEPT) as there, there.http.post(there.url + CHAT, json=chat(play=play)) as response:
            await asyncio.sleep(0.4)
            return await response.content.readany(), there.engine.sent

    got, sent = asyncio.run(main())
    assert got.startswith(sent) and (COMMENT in got[len(sent) :]) is kept


def test_errors_that_come_at_once_keep_their_status_and_what_is_no_stream_its_bytes():
    async def main():
        async with running(server=ServerOptions(keep_alive_s=0.5)) as there:
            found = [await there.post(CHAT, chat(play="refuse")), await there.post(CHAT, chat(messages=[]))]
            return [status for status, _, _ in found], await there.post(CHAT, chat(stream=False)), there.engine.sent

    statuses, (_, _, got), sent = asyncio.run(main())
    assert statuses == [503, 400] and got == sent


# ---- event by event, without sockets ---------------------------------------------------------------------------


class Client:
    """Takes what an Exchange would send, piece by piece; `order` notes that and what the session does."""

    def __init__(self):
        self.pieces, self.order, self.last, self.blocked, self.moves = [], [], b"", False, 0
        self.started = False

    async def start(self, status, headers, *, events=False):
        self.status, self.headers = status, headers

    async def send(self, message):
        assert message["type"] == "http.response.body" and message["more_body"]
        assert self.blocked and self.last == message["body"]
        self._took(message["body"])

    async def write(self, chunk):
        self._took(chunk)

    async def finish(self, chunk=b""):
        self._took(chunk)

    def _took(self, chunk):
        self.pieces.append(chunk)
        self.order.append("sent")


class Session:
    """`before`: the pieces that the client had when the session was finished."""

    streams = True
    request = SimpleNamespace(max_tokens=100, sequences=1)

    def __init__(self, client):
        self.client = client
        self.before = None

    def attended(self, client):
        assert client is self.client

    def received(self):
        """Nothing is noted."""

    def tokens(self, count=1):
        self.client.order.append("counted")

    async def read_counters(self):
        assert self.before is None, "what it was given is settled already"

    def finish(self, tokens=None, usage=None):
        self.client.order.append("finished")
        self.before = list(self.client.pieces)
        return Receipt(
            queue_time_ms=None, time_to_first_token_ms=None, mean_itl_ms=2.0, energy_joules=None, clock_mhz=None
        )


def relayed(chunks, *, metrics):
    """The client after a stream of these chunks, and the pieces that it had when the session was finished."""

    async def main():
        coming = iter(chunks)

        async def read():
            return next(coming, b"")

        client = Client()
        session = Session(client)
        reply = Reply(status=200, headers=(("content-type", "text/event-stream"),), read=read)
        await relay(client, reply, session, api=Api.CHAT, metrics=metrics, held_bytes=100)
        return client, session.before

    return asyncio.run(main())


def test_a_chunk_goes_to_the_client_before_its_tokens_are_counted():
    """What the control core makes of a token can wait; the client cannot."""
    client, _ = relayed(chat_events(3), metrics=False)
    chunks = ["sent"] + ["sent", "counted"] * 3  # the first opens the message
    assert client.order == [*chunks, "finished", "sent"]


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_nothing_is_held_back_and_the_session_is_finished_before_the_end(size):
    data = b"".join(chat_events(5))
    chunks = [data[at : at + size] for at in range(0, len(data), size)]
    client, before = relayed(chunks, metrics=False)
    assert client.pieces[:-1] == chunks[: len(client.pieces) - 1] == before
    assert b"".join(client.pieces) == data
    assert data.endswith(b"[DONE]" + data[len(b"".join(before)) :][-2:])


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_with_metrics_one_event_is_held_back(size):
    events = [*chat_events(5)[:-1], b": still here\n\n", b"data: [DONE]\n\n"]
    data = b"".join(events)
    client, _ = relayed([data[at : at + size] for at in range(0, len(data), size)], metrics=True)
    got = b"".join(client.pieces).split(b"\n\n")
    assert json.loads(got[-4][6:]) == json.loads(events[-3][6:]) | {"metrics": {"mean_itl_ms": 2.0}}
    assert [part + b"\n\n" for part in got[:-4]] == events[:-3]
    assert got[-3:] == [b": still here", b"data: [DONE]", b""]


def test_metrics_join_those_of_the_engine():
    client, _ = relayed([sse(chat_chunk({}, metrics={"steps": 3})), b"data: [DONE]\n\n"], metrics=True)
    assert json.loads(b"".join(client.pieces).split(b"\n\n")[0][6:])["metrics"] == {"steps": 3, "mean_itl_ms": 2.0}


def test_an_endless_event_is_not_held_back():
    chunks = [sse(chat_chunk({"content": "x"})), b"data: " + b"x" * (1 << 20), b"y" * 70_000, b"\n\ndata: [DONE]\n\n"]
    client, before = relayed(chunks, metrics=True)
    assert b"".join(client.pieces) == b"".join(chunks)
    assert before[0] == chunks[0] + chunks[1]


def test_an_event_that_is_no_json_gets_no_metrics():
    chunks = [b"data: x\n\n", b"data: [DONE]\n\n"]
    assert b"".join(relayed(chunks, metrics=True)[0].pieces) == b"".join(chunks)
