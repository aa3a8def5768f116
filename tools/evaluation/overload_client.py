"""A client of an open loop, as a separate process: sends each request at its time, no matter how the others end.

`python -m tools.evaluation.overload_client URL JOBS RESULTS E2E_S TBT_S`: one JSON line per request in both files. An
answer ends of itself after `output_tokens`: end-of-text is forbidden until then and certain afterwards, which only the
engine knows of; `max_tokens` is a generous limit, as of a client that does not know.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

END_OF_TEXT = 1
"""Of the tiny model's tokenizer."""
LONGEST_S = 300.0


async def main(url: str, jobs: Path, results: Path, e2e_s: float, tbt_s: float) -> None:
    """Send all, wait for all, write what came of each."""
    waiting = [json.loads(line) for line in jobs.read_text().splitlines()]
    slos = {"x-slo-e2e-ms": f"{e2e_s * 1e3:.3f}", "x-slo-tpot-ms": f"{tbt_s * 1e3:.3f}"} if e2e_s else {}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=slos) as session:
        began = time.monotonic() + 0.5
        # Its SLO was violated long before: the backlog of an engine without a limit is not waited for.
        until = began + waiting[-1]["at_s"] + (1.5 * e2e_s or LONGEST_S)
        tasks = [asyncio.create_task(_ask(session, url, job, began, until)) for job in waiting]
        ended = await asyncio.gather(*tasks)
    results.write_text("".join(json.dumps(each) + "\n" for each in ended))


async def _ask(
    session: aiohttp.ClientSession, url: str, job: dict[str, Any], began: float, until: float
) -> dict[str, Any]:
    await asyncio.sleep(max(0.0, began + job["at_s"] - time.monotonic()))
    sent = time.monotonic()
    found: dict[str, Any] = {"at_s": job["at_s"], "late_s": sent - began - job["at_s"], "status": 0, "tokens": 0}
    body = {
        "model": "tiny",
        "prompt": job["prompt"],
        "max_tokens": job["max_tokens"],
        "min_tokens": job["output_tokens"] - 1,
        "logit_bias": {str(END_OF_TEXT): 100},
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        timeout = aiohttp.ClientTimeout(total=max(0.001, until - sent))
        async with session.post(f"{url}/v1/completions", json=body, timeout=timeout) as answer:
            found["status"] = answer.status
            if answer.status == 200:
                await _read(answer, sent, found)
            else:
                found["why"] = (await answer.text())[:300]
    except (aiohttp.ClientError, TimeoutError) as error:
        found["why"] = repr(error)
    found["ended_s"] = time.monotonic() - sent
    return found


async def _read(answer: aiohttp.ClientResponse, sent: float, found: dict[str, Any]) -> None:
    """Times of the first and the last text, and the tokens that the engine counted."""
    async for line in answer.content:
        if line.startswith(b'data: {"id"') and b'"choices":[]' not in line:
            now = time.monotonic() - sent
            found.setdefault("first_s", now)
            found["last_s"] = now
        elif line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:  # vLLM refuses some only when their stream has begun
                found["status"], found["why"] = event["error"].get("code"), event["error"].get("message")
                return
            if event.get("usage"):
                found["tokens"] = event["usage"]["completion_tokens"]
        elif line.startswith(b"data: [DONE]"):
            found["done"] = True


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5])))
