"""Triton's own streams under load: `generate_stream` in a closed loop, timed event by event."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from itertools import pairwise

import aiohttp

from tools.evaluation.figures import Figures, percentiles_ms

TOKENS = 60


@dataclass(slots=True)
class _Seen:
    ttfts_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    means_s: list[float] = field(default_factory=list)
    tokens: int = 0
    errors: int = 0


async def run_native(url: str, path: str, *, requests: int, concurrency: int) -> Figures:
    """Figures of so many streams of `TOKENS` tokens."""
    seen, left, began = _Seen(), iter(range(requests)), time.perf_counter()

    async def one_after_another(session: aiohttp.ClientSession) -> None:
        for number in left:
            await _stream(session, f"{url}{path}", number, seen)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        await asyncio.gather(*(one_after_another(session) for _ in range(concurrency)))
    wall_s = time.perf_counter() - began
    ttft, itl = percentiles_ms(seen.ttfts_s), percentiles_ms(seen.gaps_s)
    return Figures(
        requests=requests - seen.errors,
        errors=seen.errors,
        ttft_p50_ms=ttft[0],
        ttft_p99_ms=ttft[1],
        itl_p50_ms=itl[0],
        itl_p99_ms=itl[1],
        tpot_p50_ms=percentiles_ms(seen.means_s)[0],
        tokens_per_s=seen.tokens / wall_s,
    )


async def _stream(session: aiohttp.ClientSession, url: str, number: int, seen: _Seen) -> None:
    body = {"text_input": f"question {number}", "max_tokens": TOKENS, "min_length": TOKENS, "stream": True}
    sent, times = time.perf_counter(), []
    async with session.post(url, json=body) as response:
        async for line in response.content:
            if line.startswith(b"data:"):
                times.append(time.perf_counter())
    if response.status != 200 or len(times) != TOKENS:
        seen.errors += 1
        return
    seen.tokens += len(times)
    seen.ttfts_s.append(times[0] - sent)
    seen.gaps_s += [after - before for before, after in pairwise(times)]
    seen.means_s.append((times[-1] - times[0]) / (len(times) - 1))
