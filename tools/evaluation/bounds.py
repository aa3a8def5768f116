"""What clients can make the gateway hold: its longest stall under hostile bodies, its memory under uploads and queued
bodies, its descriptors. Beside it the commit before the bounds, where it can be run without filling the machine.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from tools.testbed.engines.openai_engine import MODEL, openai_engine
from tools.testbed.gateway import THROTTLLEM, Gateway, gateway
from tools.testbed.processes import answers
from tools.testbed.report import ROOT, Section, Table, Workspace

BEFORE = "d0c84ed"
MB = 1_000_000
LIMIT = 1024
_HEAD = b'{"model":"' + MODEL.encode() + b'","max_tokens":1,'
ZOO = {
    "`[1,1,...` unread": (b'"prompt":"x","other":[', b"1,", b"1]"),
    "`[1,1,...` prompt": (b'"prompt":[', b"1,", b"1]"),
    "`[[],[],...`": (b'"prompt":"x","other":[', b"[],", b"1]"),
    '`[{"a":1},...`': (b'"prompt":"x","other":[', b'{"a":1},', b"1]"),
    "many keys": (b'"prompt":"x",', b'"a":1,', b'"b":1'),
    "one text": (b'"prompt":"', b"word ", b'"'),
    "escapes": (b'"prompt":"', b"\\n", b'"'),
    "surrogates": (b'"prompt":"', b"\\ud83d\\ude00", b'"'),
    "many texts": (b'"prompt":[', b'"a",', b'"a"]'),
    "own field": (b'"throttllem":{"metrics":true},"prompt":"', b"word ", b'"'),
}
"""Bodies by the part that is repeated: what stands before it, the part, and what stands behind."""


def body_of(name: str, size: int) -> bytes:
    """A body of the zoo with about `size` bytes."""
    before, part, behind = ZOO[name]
    return _HEAD + before + part * ((size - len(_HEAD) - len(before) - len(behind) - 1) // len(part)) + behind + b"}"


def section(workspace: Workspace) -> Section:
    """Everything, now and before."""
    sources = {"now": None, "before": _source_before(workspace.folder)}
    found = {version: _measured(workspace, version, source) for version, source in sources.items()}
    sizes = (8,) if workspace.quick else (8, 32)
    stalls = [
        [f"{name}, {size} MB", *(found[version]["stalls"].get(f"{name} {size}", "-") for version in found)]
        for name in ZOO
        for size in sizes
    ]
    names = list(dict.fromkeys(name for version in found.values() for name in version["rest"]))
    rest = [[name, *(found[version]["rest"].get(name, "-") for version in found)] for name in names]
    head = ("", "now", f"before ({BEFORE})")
    return Section(
        title="Bounds in total",
        text=(
            "One small engine (context 4,096 tokens), one gateway, its clients on the same machine. A stall is the "
            "longest time that `GET /health` took on an open connection, requested without a pause, while one body was "
            "sent and answered: the work of other processes on two cores is in it. Memory is the peak of the resident "
            f"set (`VmHWM`). `limits.held_bytes` is 1 GiB. Descriptors: the gateway under a hard limit of {LIMIT}."
        ),
        tables=(
            Table(caption="Longest stall, ms (status of the body)", head=head, rows=stalls),
            Table(caption="Memory and descriptors", head=head, rows=rest),
        ),
        results=found,
    )


def _source_before(folder: Path) -> Path:
    source = folder / "before"
    source.mkdir()
    archive = subprocess.run(["git", "archive", BEFORE, "src"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", source], input=archive, check=True)
    return source / "src"


def _measured(workspace: Workspace, version: str, source: Path | None) -> dict[str, dict[str, str]]:
    folder = workspace.folder / version
    folder.mkdir(exist_ok=True)
    stalls, rest = dict[str, str](), dict[str, str]()
    with openai_engine(folder / "engine.log") as (engine, _):

        @contextmanager
        def served(name: str, *flags: str, limit: int | None = None) -> Iterator[Gateway]:
            workspace.report(f"{version}: {name}")
            prefix = [] if limit is None else ["prlimit", f"--nofile={limit}:{limit}"]
            environment = {} if source is None else {"PYTHONPATH": str(source)}
            arguments = ("--engine", engine, "--set", "engines.0.max_batch=256", *flags)
            command: list[str | Path] = [*prefix, THROTTLLEM, "serve"]
            with gateway(arguments, folder / name, command=command, environment=environment) as it:
                yield it

        with served("stalls") as it:
            for size in (8,) if workspace.quick else (8, 32):
                if source is not None and size > 8:
                    continue
                for name in ZOO:
                    stall_ms, status = _stall(it.url, body_of(name, size * MB))
                    stalls[f"{name} {size}"] = f"{stall_ms:.0f} ({status})"
        with served("refused") as it:
            before = _memory_mb(it)
            asyncio.run(
                _many(it.url, 60, body_of("one text", 8 * MB).replace(b'"max_tokens":1', b'"max_tokens":-1'), 4)
            )
            rest["60 refused bodies of 8 MB: MB held afterwards"] = f"{_memory_mb(it) - before:.0f}"
        count = 25 if source is not None else 500
        with served("queued", "--set", "engines.0.max_batch=1") as it:
            statuses = asyncio.run(_queued(it.url, count))
            rest[f"{count} queued bodies of 8 MB: peak MB (statuses)"] = f"{_memory_mb(it, 'VmHWM'):.0f} ({statuses})"
        count = 256 if source is not None else 4096
        with served("uploads", "--set", "limits.connections=5000") as it:
            statuses = asyncio.run(_uploads(it.url, count, 4 * MB))
            rest[f"{count} uploads that stop at 4 MB: peak MB (statuses)"] = (
                f"{_memory_mb(it, 'VmHWM'):.0f} ({statuses})"
            )
        with served("idle", limit=LIMIT) as it:
            rest["1,100 idle sockets: next requests"] = asyncio.run(_behind_idle(it.url, 1100))
        with served("streams", limit=LIMIT) as it:
            statuses = asyncio.run(_many(it.url, 900, _HEAD + b'"prompt":"x","stream":true}', 900))
            rest["900 streams at once: statuses"] = f"{statuses}; engine up: {answers(it.url + '/health', b'ok')()}"
    return {"stalls": stalls, "rest": rest}


def _stall(url: str, body: bytes) -> tuple[float, int]:
    """The longest answer of /health while a body is served, in ms, and the body's status."""
    at, over, longest_s = urlsplit(url), threading.Event(), 0.0

    def watch() -> None:
        nonlocal longest_s
        connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=60)
        while not over.is_set():
            began_s = time.perf_counter()
            connection.request("GET", "/health")
            connection.getresponse().read()
            longest_s = max(longest_s, time.perf_counter() - began_s)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    time.sleep(0.1)
    longest_s = 0.0
    connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=60)
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    status = connection.getresponse().status
    over.set()
    watcher.join()
    return longest_s * 1e3, status


async def _open(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    at = urlsplit(url)
    return await asyncio.open_connection(at.hostname, at.port)


def _request(size: int) -> bytes:
    return b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % size


async def _status(reader: asyncio.StreamReader, within_s: float) -> str:
    """The status of an answer; what happened in place of one."""
    try:
        async with asyncio.timeout(within_s):
            head = await reader.readuntil(b"\r\n")
            await reader.read()
            return head[9:12].decode()
    except TimeoutError:
        return "waits"
    except (OSError, asyncio.IncompleteReadError):
        return "closed"


def _shown(statuses: Sequence[str]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(Counter(statuses).items()))


async def _many(url: str, count: int, body: bytes, at_once: int) -> str:
    """Statuses of requests, so many at once."""
    free = asyncio.Semaphore(at_once)

    async def one() -> str:
        async with free:
            try:
                reader, writer = await _open(url)
                writer.writelines([_request(len(body)), body])
                return await _status(reader, 60)
            except OSError:
                return "closed"

    return _shown(await asyncio.gather(*(one() for _ in range(count))))


async def _queued(url: str, count: int) -> str:
    """Bodies of 8 MB behind a stream that fills the engine."""
    long = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 3000, "stream": True, "min_tokens": 3000}).encode()
    _, first = await _open(url)
    first.write(_request(len(long)) + long)
    await asyncio.sleep(0.5)
    body = body_of("one text", 8 * MB)
    free = asyncio.Semaphore(8)

    async def one() -> str:
        try:
            async with free:
                reader, writer = await _open(url)
                writer.writelines([_request(len(body)), body])
                await writer.drain()
            return await _status(reader, 20)
        except OSError:
            return "closed"

    return _shown(await asyncio.gather(*(one() for _ in range(count))))


async def _uploads(url: str, count: int, size: int) -> str:
    """Clients that send `size` bytes of 8 MB, and stop."""
    part, free = b" " * size, asyncio.Semaphore(16)

    async def one() -> str:
        try:
            reader, writer = await _open(url)
            async with free:
                writer.writelines([_request(8 * MB), part])
                async with asyncio.timeout(10):
                    await writer.drain()
            return await _status(reader, 10)
        except (OSError, TimeoutError):
            return "closed"

    return _shown(await asyncio.gather(*(one() for _ in range(count))))


async def _behind_idle(url: str, count: int) -> str:
    """Statuses of requests one after the other while so many sockets are open and silent."""
    idle = []
    for _ in range(count):
        try:
            idle.append(await _open(url))
        except OSError:
            break
    await asyncio.sleep(8)  # three checks of the engine fail in this time
    statuses = [await _many(url, 1, _HEAD + b'"prompt":"x"}', 1) for _ in range(20)]
    for _, writer in idle:
        writer.close()
    return _shown([status.split()[1] for status in statuses])


def _memory_mb(it: Gateway, field: str = "VmRSS") -> float:
    text = Path(f"/proc/{it.process.pid}/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024 / MB
