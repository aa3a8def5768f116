"""The simulated engine in real time: its timing, requests that join and leave, and its reports."""

import asyncio
from itertools import accumulate, pairwise

import pytest

from engines.contract import Subject, events_of, text_of
from engines.live import CLOCKS, answer, asked, call, engine
from throttllem.engines.base import EngineError
from throttllem.engines.simulated import realtime
from throttllem.engines.simulated.text import count_tokens
from throttllem.gpu.simulated import SimulatedGpu


def watched(run, subject, reports=None):
    """All reports made while `run(subject)` runs, and what that returns."""
    reports = [] if reports is None else reports

    async def both():
        watching = asyncio.ensure_future(subject.watch(reports.append))
        await asyncio.sleep(0)
        found = await run(subject)
        # The last report follows the last token.
        for _ in range(4):
            await asyncio.sleep(0)
        watching.cancel()
        return reports, found

    return asyncio.run(both())


# ---- time ----------------------------------------------------------------------------------------------------


class Time:
    """A clock that only sleeping moves, and now and then a delay."""

    def __init__(self, monkeypatch, late_s=()):
        self.now_s = 100.0
        self.ends_s = []
        self.late_s = list(late_s)
        real = asyncio.sleep

        async def sleep(seconds, *_):
            if seconds > 0:
                self.now_s += seconds
            await real(0)

        monkeypatch.setattr(realtime.asyncio, "sleep", sleep)

    def __call__(self):
        return self.now_s

    def take(self, report):
        self.ends_s.append(self.now_s)
        if self.late_s:
            self.now_s += self.late_s.pop(0)


def paced(monkeypatch, late_s):
    time = Time(monkeypatch, late_s)

    async def run():
        subject = engine(seconds=0.5, now=time)
        watching = asyncio.ensure_future(subject.watch(time.take))
        await asyncio.sleep(0)
        await answer(subject, asked(max_tokens=8, ignore_eos=True))
        watching.cancel()

    asyncio.run(run())
    return time.ends_s


def test_each_iteration_ends_when_the_one_before_did_plus_its_seconds(monkeypatch):
    assert paced(monkeypatch, []) == pytest.approx([100.5 + 0.5 * step for step in range(8)])


def test_what_is_a_little_late_catches_up(monkeypatch):
    ends_s = paced(monkeypatch, [0.0, 0.9])
    assert ends_s == pytest.approx([100.5, 101.0, 101.9, 102.0, 102.5, 103.0, 103.5, 104.0])


def test_what_is_very_late_lets_the_past_go(monkeypatch):
    ends_s = paced(monkeypatch, [0.0, 40.0])
    assert ends_s == pytest.approx([100.5, 101.0, 141.0, 141.5, 142.0, 142.5, 143.0, 143.5])


def test_the_clock_of_the_gpu_holds_from_the_next_step_on():
    gpu = SimulatedGpu(CLOCKS, switch_latency_s=0.0, watts=lambda mhz, work: 0.0, idle_w=50.0)

    async def run(subject):
        await answer(subject, asked(max_tokens=2, ignore_eos=True))
        await gpu.set_clock(700)
        await answer(subject, asked(max_tokens=2, ignore_eos=True))

    reports, _ = watched(run, engine(gpu=gpu))
    assert [report.seconds for report in reports] == [0.001, 0.001, 0.002, 0.002]
    assert [report.joules for report in reports] == pytest.approx([0.14, 0.14, 0.14, 0.14])


# ---- requests that join and leave ----------------------------------------------------------------------------


def test_a_request_that_leaves_within_an_iteration_is_out_at_its_end():
    async def run(subject):
        staying = asyncio.ensure_future(answer(subject, asked(max_tokens=10, ignore_eos=True)))
        async with subject.open(asked(max_tokens=900, stream=True, ignore_eos=True)) as reply:
            await reply.read()
            await asyncio.sleep(0.002)
        left = len(reports)
        await staying
        return left

    reports = []
    subject = engine(seconds=0.005)
    seen, left = watched(run, subject, reports)
    assert seen[0].running == 2
    assert {report.running for report in seen[left:-1]} == {1}
    assert (seen[-1].running, seen[-1].waiting, seen[-1].kv_blocks) == (0, 0, 0)
    assert [subject._engine.ledger.leave(key) for key in (-1, -2)] == [0, 0]  # nothing is kept of either


def test_a_request_that_leaves_while_it_waits_never_runs():
    async def run(subject):
        async with subject.open(asked(max_tokens=900, stream=True, ignore_eos=True)) as first:
            await first.read()
            async with subject.open(asked(max_tokens=8, stream=True)):
                while reports[-1].waiting == 0:
                    await asyncio.sleep(0.001)
            while reports[-1].waiting == 1:
                await asyncio.sleep(0.001)
            await first.read()

    reports = []
    watched(run, engine(max_batch=1), reports)
    assert [key for report in reports for key in report.started] == [-1]


def test_a_request_may_not_be_in_the_engine_twice():
    async def run():
        subject = engine()
        async with subject.open(asked(max_tokens=900, ignore_eos=True, stream=True, request_id=4)):
            with pytest.raises(EngineError, match="already") as refused:
                await answer(subject, asked(stream=True, request_id=4))
        return refused.value.status

    def asked(**more):
        key = more.pop("request_id")
        return call(prompt="Hello", request_id=key, **more)

    assert asyncio.run(run()) == 503


def test_preempted_sequences_get_no_tokens_meanwhile_and_keep_their_words():
    body = {"prompt": "One two three four five six seven", "max_tokens": 60, "ignore_eos": True, "temperature": 0}
    texts = {}

    async def read(subject, key):
        texts[key] = ""
        async with subject.open(call(stream=True, request_id=key, **body)) as reply:
            while chunk := await reply.read():
                texts[key] += "".join(map(text_of, events_of(chunk)))

    async def run(subject):
        behind = []
        watching = asyncio.ensure_future(subject.watch(lambda _: behind.append(sum(map(count_tokens, texts.values())))))
        await asyncio.sleep(0)
        await asyncio.gather(*(read(subject, key) for key in range(4)))
        watching.cancel()
        return behind

    reports, behind = watched(run, engine(seconds=0, kv_blocks=16, block_tokens=8))
    assert any(report.preempted for report in reports)
    given = [0, *accumulate(report.generated_tokens for report in reports)]
    assert behind == given[:-1]
    assert len(set(texts.values())) == 1
    assert count_tokens(texts[0]) == 60


def test_a_slow_reader_finds_all_tokens_in_one_chunk():
    async def run():
        subject = engine(seconds=0)
        async with subject.open(asked(max_tokens=50, ignore_eos=True, stream=True)) as reply:
            while len(subject._generations):
                await asyncio.sleep(0)
            return [await reply.read(), await reply.read()]

    chunk, end = asyncio.run(run())
    assert (len(events_of(chunk)), end) == (51, b"")


# ---- reports -------------------------------------------------------------------------------------------------


def test_reports_name_everything_and_add_up():
    async def run(subject):
        it = Subject(engine=subject, kill=subject.close)
        calls = [await it.call(max_tokens=5, ignore_eos=True), asked(max_tokens=3, ignore_eos=True)]
        await asyncio.gather(*(answer(subject, each) for each in calls))
        return calls[0].prompt_tokens

    reports, prompt = watched(run, engine(seconds=0))
    assert all(after.step - before.step == 1 for before, after in pairwise(reports))
    assert [key for report in reports for key in report.started] == [1, -2]
    assert sorted(key for report in reports for key in report.finished) == [-2, 1]
    assert sum(report.generated_tokens for report in reports) == 8
    assert reports[0].prefills == ((1, prompt), (-2, count_tokens("Hello there.")))
    assert reports[0].prompt_tokens == sum(tokens for _, tokens in reports[0].prefills)
    assert [report.decode_sequences for report in reports] == [0, 2, 2, 1, 1]


def test_a_step_is_reported_before_any_of_its_tokens_is_read():
    seen, at_report = [], []

    async def run():
        subject = engine(seconds=0)
        watching = asyncio.ensure_future(subject.watch(lambda report: at_report.append(len(seen))))
        await asyncio.sleep(0)
        async with subject.open(asked(max_tokens=12, ignore_eos=True, stream=True)) as reply:
            while chunk := await reply.read():
                seen.extend(event for event in events_of(chunk) if event != "[DONE]")
        await asyncio.sleep(0)
        watching.cancel()

    asyncio.run(run())
    assert (at_report, len(seen)) == (list(range(12)), 12)


def test_an_engine_whose_gpu_fails_ends_its_requests_and_its_watch(caplog):
    class Broken:
        def read(self):
            raise OSError("the GPU is gone")

    async def run():
        subject = engine(gpu=Broken())
        watching = asyncio.ensure_future(subject.watch(lambda report: None))
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="the GPU is gone"):
            await answer(subject, asked())
        with pytest.raises(EngineError, match="the GPU is gone"):
            await watching

    asyncio.run(run())
    assert "failed" in caplog.text
