"""The `openai` package as a client under load: runs in the environment of the clients, not in the project's.

`python openai_client.py URL MODEL JOBS CONCURRENCY`: JOBS is a file of JSON lines `{"at_s", "chat", "stream",
"prompt_tokens", "answer_tokens"}`; prints one JSON object with the figures of each request. Requests begin at their
time, and never more than CONCURRENCY at once.
"""

# The package that it needs may have another version, or none, where the types are checked.
# mypy: ignore-errors

import asyncio
import json
import random
import sys
import time
from itertools import pairwise
from pathlib import Path

import openai

TRIES = 0
"""An error is to be seen, not tried again."""


async def main():
    """Run every job and print what came of it."""
    url, model, jobs, concurrency = sys.argv[1:]
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=TRIES, timeout=120)
    asked = [json.loads(line) for line in Path(jobs).read_text().splitlines()]
    places = asyncio.Semaphore(int(concurrency))
    began = time.perf_counter()
    async with client:
        found = await asyncio.gather(*(one(client, model, job, places, began, n) for n, job in enumerate(asked)))
    wall_s = time.perf_counter() - began
    print(json.dumps({"wall_s": wall_s, "openai": openai.__version__, "requests": found}))


async def one(client, model, job, places, began, number):
    """One request at its time: what it got and when."""
    await asyncio.sleep(max(0.0, began + job["at_s"] - time.perf_counter()))
    async with places:
        sent = time.perf_counter()
        try:
            times, tokens = await (streamed if job["stream"] else whole)(client, **fields(model, job, number))
        except openai.OpenAIError as error:
            return {"error": f"{type(error).__name__}: {error}"[:300]}
    ended = time.perf_counter()
    return {
        "chat": job["chat"],
        "stream": job["stream"],
        "tokens": tokens,
        "e2e_s": ended - sent,
        "ttft_s": times[0] - sent if times else None,
        "gaps_s": [after - before for before, after in pairwise(times)],
        "wanted": job["output_tokens"],
    }


def fields(model, job, number):
    """The request of a job: its own prompt, an answer of exactly the length that was asked for."""
    draw = random.Random(number)
    common = {"model": model, "max_tokens": job["output_tokens"], "temperature": 0.0, "stream": job["stream"]}
    if job["stream"]:
        common["stream_options"] = {"include_usage": True}
    common["extra_body"] = job.get("extra", {"ignore_eos": True})
    if job["chat"]:
        words = " ".join(f"w{draw.randrange(1000)}" for _ in range(max(1, job["prompt_tokens"] // 4)))
        return common | {"messages": [{"role": "user", "content": words}]}
    if job.get("text"):
        return common | {"prompt": " ".join(f"w{draw.randrange(1000)}" for _ in range(job["prompt_tokens"]))}
    return common | {"prompt": [draw.randrange(300, 8000) for _ in range(job["prompt_tokens"])]}


def endpoint(client, body):
    """Chat or completions."""
    return client.chat.completions if "messages" in body else client.completions


async def streamed(client, **body):
    """Times of the chunks that brought text, and the tokens that the engine counted."""
    times, tokens = [], None
    async for chunk in await endpoint(client, body).create(**body):
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            text = choice.delta.content if "messages" in body else choice.text
            if text:
                times.append(time.perf_counter())
    return times, tokens


async def whole(client, **body):
    """The tokens that the engine counted."""
    answer = await endpoint(client, body).create(**body)
    return [], answer.usage.completion_tokens


if __name__ == "__main__":
    asyncio.run(main())
