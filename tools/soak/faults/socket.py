"""What can come in through the keeper's socket, or keep everything from coming in."""

from __future__ import annotations

import asyncio
import json
import os
import time
from contextlib import AsyncExitStack
from typing import Any

from throttllem.keeper.leases import SETS_AT_ONCE, SETS_PER_S
from tools.soak.bed import SoakBed
from tools.soak.connection import Connection, connected
from tools.soak.evidence import Loss
from tools.soak.faults.kind import Kind, lasting
from tools.soak.other_user import NOBODY
from tools.soak.schedule import Fault

_RUBBISH = (
    b"\n",
    b"\x00\xff\xfe{}\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"[1, 2]\n",
    b'"set"\n',
    b"{}\n",
    b'{"op": 7}\n',
    b'{"op": "lease", "gpus": 3, "ttl_s": "long"}\n',
    b'{"op": "lease", "gpus": ["x", "x"], "ttl_s": 1}\n',
    b'{"op": "lease", "gpus": [], "ttl_s": 1e309}\n',
    b'{"op": "set", "mhz": NaN}\n',
    b'{"op": "beat"}\n',
    b'{"op": "release"}\n',
)
_OVERSIZED_BYTES = (4_097, 20_000, 200_000)
_OTHER_USER_S = 3.0


async def _socket_gone(bed: SoakBed, fault: Fault) -> None:
    bed.socket.unlink(missing_ok=True)


async def _rubbish(bed: SoakBed, fault: Fault) -> None:
    for _ in range(fault.count):
        async with connected(bed.socket) as connection:
            if connection is not None:
                data = bed.draw.choice((*_RUBBISH, bed.draw.randbytes(300) + b"\n"))
                await connection.send(data)
                await asyncio.sleep(0.01)


async def _oversized(bed: SoakBed, fault: Fault) -> None:
    async with connected(bed.socket) as connection:
        if connection is not None:
            await connection.send(b'{"op": "' + b"x" * bed.draw.choice(_OVERSIZED_BYTES) + b'"}\n')
            await asyncio.sleep(0.02)


async def _half_line(bed: SoakBed, fault: Fault) -> None:
    async with connected(bed.socket) as connection:
        if connection is not None:
            await connection.send(b'{"op": "stat')
            await lasting(bed, fault)


async def _many(bed: SoakBed, fault: Fault) -> None:
    """More connections than the keeper takes."""
    async with AsyncExitStack() as stack:
        for _ in range(fault.count):
            await stack.enter_async_context(connected(bed.socket))
        await lasting(bed, fault)


async def _other_user(bed: SoakBed, fault: Fault) -> None:
    """Another user's process."""
    if os.geteuid() != 0:
        return
    received: list[dict[str, Any]] = []
    other = bed.start("other user", on_line=received.append, socket=str(bed.socket), gpus=bed.uuids(bed.opted))
    await asyncio.wait_for(other.dead.wait(), _OTHER_USER_S)
    for line in received:
        bed.evidence.other_users += bool(line["came_in"])
        if line["answers"]:
            bed.evidence.troubles.append(f"user {NOBODY} was answered: {line['answers']}")


async def _outside_range(bed: SoakBed, fault: Fault) -> None:
    """By the holder of the lease."""
    async with connected(bed.socket) as connection:
        if connection is not None and await _leased(bed, connection, fault.gpu):
            low, high = bed.schedule.gpus[fault.gpu].allowed or (1, 1)
            for mhz in (low - 15, high + 15, 0, -1, 10**9):
                answer = await connection.ask(op="set", mhz=mhz)
                if answer is not None and answer["ok"]:
                    bed.evidence.troubles.append(f"GPU {fault.gpu}: {mhz} MHz were set, allowed are {low} to {high}")


async def _outside_list(bed: SoakBed, fault: Fault) -> None:
    not_ours = [index for index, gpu in enumerate(bed.schedule.gpus) if gpu.allowed is None]
    for gpus in ([*bed.uuids(tuple(not_ours))], ["GPU-0"], [*bed.uuids(bed.opted[-1:] + tuple(not_ours[:1]))]):
        async with connected(bed.socket) as connection:
            if connection is not None:
                answer = await connection.ask(op="lease", gpus=gpus, ttl_s=1.0)
                if answer is not None and answer["ok"]:
                    bed.evidence.troubles.append(f"a lease on {gpus}, which are not opted in")
                await connection.ask(op="set", mhz=1005)


async def _beats(bed: SoakBed, fault: Fault) -> None:
    async with connected(bed.socket) as connection:
        if connection is not None:
            leased = await _leased(bed, connection, fault.gpu)
            line = json.dumps({"op": "beat" if leased else "status"}).encode() + b"\n"
            await connection.send(line * fault.count)
            for _ in range(fault.count):
                if await connection.receive() is None:
                    break


async def _sets(bed: SoakBed, fault: Fault) -> None:
    """Far more than may be set; then it is silent, or hangs up."""
    async with connected(bed.socket) as connection:
        if connection is None or not await _leased(bed, connection, fault.gpu):
            return
        low, high = bed.schedule.gpus[fault.gpu].allowed or (1, 1)
        began_s = time.monotonic()
        asks = [{"op": "set", "mhz": bed.draw.randrange(low, high + 1)} for _ in range(fault.count)]
        await connection.send(b"".join(json.dumps(ask).encode() + b"\n" for ask in asks))
        answers = [answer for _ in asks if (answer := await connection.receive()) is not None]
    now_s = time.monotonic()
    done, most = sum(bool(answer["ok"]) for answer in answers), SETS_AT_ONCE + SETS_PER_S * (now_s - began_s) + 1
    if done > most:
        bed.evidence.troubles.append(f"{done} sets in {now_s - began_s:.2f} s, {most:.0f} are allowed")
    bed.evidence.losses.append(Loss(at_s=now_s, from_s=now_s, why=fault.kind, gpus=(fault.gpu,)))


async def _gateway_sets(bed: SoakBed, fault: Fault) -> None:
    low, high = bed.schedule.gpus[bed.held[0]].allowed or (1, 1)
    bed.gateway.send_line(do="flood", mhz=[bed.draw.randrange(low, high + 1) for _ in range(fault.count)])


async def _leased(bed: SoakBed, connection: Connection, gpu: int) -> bool:
    """Of a GPU that is not the gateway's, if there is one."""
    answer = await connection.ask(op="lease", gpus=bed.uuids((gpu,)), ttl_s=bed.schedule.ttl_s)
    return answer is not None and bool(answer["ok"])


KINDS = (
    Kind(name="socket: deleted", inject=_socket_gone),
    Kind(name="socket: rubbish", inject=_rubbish, counts=(1, 12)),
    Kind(name="socket: a line without end", inject=_oversized),
    Kind(name="socket: half a line", inject=_half_line, lasts_s=(0.1, 0.8)),
    Kind(name="socket: many connections", inject=_many, lasts_s=(0.1, 0.6), counts=(30, 60)),
    Kind(name="socket: another user", inject=_other_user),
    Kind(name="asks: clocks outside the range", inject=_outside_range, spare=True),
    Kind(name="asks: GPUs that are not opted in", inject=_outside_list),
    Kind(name="asks: a flood of heartbeats", inject=_beats, counts=(100, 400), spare=True),
    Kind(name="asks: a flood of sets", inject=_sets, counts=(60, 90), spare=True),
    Kind(name="asks: the gateway floods", inject=_gateway_sets, counts=(50, 80)),
)
