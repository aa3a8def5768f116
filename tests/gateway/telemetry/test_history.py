"""Samples of the last minutes: what they hold, how many are kept, and those that a page does not know."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

import pytest

from gateway.statuses import STATUS, Still, status_of_still  # noqa: F401 (a fixture)
from throttllem.gateway.telemetry.history import History


def test_a_sample_holds_what_the_charts_draw() -> None:
    history = History()
    history.note(STATUS)
    (sample,) = history.since()
    engine, model = sample.engines["a100-0"], sample.models["llama"]
    assert (sample.at_s, engine.clock_mhz, engine.planned_mhz, engine.watts) == (432.5, 1050, 1065, 187.0)
    assert (engine.running, engine.pending, engine.kv_blocks, engine.total_j) == (17, 2, 1234, 81_000.0)
    assert (model.queue, model.attainment, model.generated_tokens) == (5, 0.985, 180_000)
    down = next(one for name, one in sample.engines.items() if name != "a100-0")
    assert (down.clock_mhz, down.planned_mhz, down.running) == (None, None, None)


def test_it_keeps_few_samples_however_often_it_notes_one() -> None:
    history, models = History(period_s=1.0, kept_s=10.0), Still()
    for tick in range(1000):
        models.at(tick * 0.1)
        history.note(models.status())
    kept = history.since()
    assert 10 <= len(kept) <= 21
    assert 89.0 <= kept[0].at_s <= 91.0 and kept[-1].at_s > 99.0


def test_only_new_samples_are_returned() -> None:
    history, models = History(), Still()
    for second in range(5):
        models.at(float(second))
        history.note(models.status())
    assert [sample.at_s for sample in history.since(2.0)] == [3.0, 4.0]
    assert history.since(9.0) == []
    assert History().run_id != history.run_id


def test_it_runs_until_it_is_cancelled() -> None:
    class Ticking(Still):
        def status(self):
            self.at(self.gateway.now_s + 1.0)
            return self.gateway

    async def run() -> int:
        history = History(period_s=0.001)
        task = asyncio.create_task(history.run(Ticking()))
        async with asyncio.timeout(5):
            while len(history.since()) < 3:
                await asyncio.sleep(0.001)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return len(history.since())

    assert asyncio.run(run()) >= 3


def test_a_gateway_without_requests_is_looked_at_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            raise asyncio.CancelledError
        models.gateway = replace(STATUS, models=())

    models = Still()
    monkeypatch.setattr("throttllem.gateway.telemetry.history.asyncio.sleep", pause)
    with suppress(asyncio.CancelledError):
        asyncio.run(History(period_s=1.0).run(models))
    assert pauses == [1.0, 5.0]
