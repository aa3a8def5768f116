"""Engines that answer garbage: to completions, and in the pages that describe them."""

from __future__ import annotations

from tools.evaluation.faults.bed import Bed, Found
from tools.testbed.client import Answer, tallied
from tools.testbed.engines.garbage_engine import ANSWERS, CHUNK, MODEL, PAGES, GarbageEngine, garbage_engine
from tools.testbed.inspected_gateway import Inspected, eventually

GOOD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + CHUNK + b"data: [DONE]\n\n"
SETTINGS = ("limits.engine_wait_s=2", "limits.silence_s=3", "engines.0.max_batch=8")


async def answers(bed: Bed) -> list[Found]:
    """Every kind of garbage in place of an answer, to a stream and to another."""
    engine = GarbageEngine(answer=GOOD)
    found = []
    async with (
        garbage_engine(engine) as url,
        bed.gateway(*SETTINGS, url=url, model=MODEL, ready=False) as gateway,
    ):
        await gateway.ready()
        for name, answer in ({**ANSWERS, "endless headers": None}).items():
            engine.answer = answer
            answers = [await gateway.client.ask(stream=stream, hang_s=20) for stream in (True, False)]
            for one in answers:
                _cleared(one)
            engine.answer = GOOD
            left = await gateway.left()
            found.append(Found(fault=f"engine answers garbage: {name}", client=tallied(answers), left=left))
    return found


def _cleared(answer: Answer) -> None:
    """What is no JSON but whole HTTP passes as it is; anything else is an error in shape."""
    if answer.status == 200 and not answer.events and answer.body == b"<html>":
        return
    answer.check()


async def pages(bed: Bed) -> list[Found]:
    """Garbage in the pages of an engine: from the start, and from one moment on. It must come back by itself."""
    found = []
    for name, (path, page) in PAGES.items():
        engine = GarbageEngine(answer=GOOD, pages={path: page})
        async with (
            garbage_engine(engine) as url,
            bed.gateway(*SETTINGS, url=url, model=MODEL, ready=False) as gateway,
        ):
            early = await gateway.client.ask(hang_s=20)
            early.check()
            engine.pages.clear()
            await _recovers(gateway)
            engine.pages[path] = page
            later = await gateway.client.ask(hang_s=20, prompt="another prompt")
            later.check()
            engine.pages.clear()
            await _recovers(gateway)
            left = await gateway.left()
        seen = f"from the start: {early.outcome}; later: {later.outcome}"
        found.append(Found(fault=f"engine answers garbage: {name}", client=seen, left=left))
    return found


async def _recovers(gateway: Inspected) -> None:
    async def served() -> bool:
        return (await gateway.client.ask(hang_s=20)).served

    await eventually(served, 20, "a good engine is used again")


FAULTS = (answers, pages)
