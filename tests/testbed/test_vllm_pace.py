"""The plug-in without vLLM: what a step computes, and how long it lasts at clocks that change."""

import json
from types import SimpleNamespace

import pytest

from tools.testbed.engines.vllm_pace import GRACE_S, VARIABLE, Batch, Batches, Pacer, Settings, _pacer, install

IDLE_W, BUSY_W = 50.0, {1000: 450.0, 500: 250.0}
BATCH = Batch(decode_sequences=1, kv_tokens=100, prefill_tokens=0, prefill_pairs=0.0)


def law(mhz, *batch):
    """10 ms at 1,000 MHz, 20 ms at 500 MHz, at full power."""
    return 10.0 / mhz, BUSY_W[mhz]


class World:
    """A clock that goes on where somebody sleeps, and a GPU whose MHz change at a time."""

    def __init__(self, change_s=float("inf")):
        self.now_s, self.change_s, self.told = 100.0, change_s, []

    def now(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds + 0.0001

    def clock_mhz(self):
        return 1000 if self.now_s < self.change_s else 500

    def work(self, util, valid_s):
        self.told.append((util, valid_s))

    def pacer(self):
        return Pacer(law, self, IDLE_W, BUSY_W, now=self.now, sleep=self.sleep)

    def step(self, pacer, *, real_s=0.002, last=False):
        pacer.begin(BATCH, last)
        self.now_s += real_s
        return pacer.finish()


def test_a_step_lasts_as_long_as_the_law_says():
    world = World()
    step = world.step(world.pacer())
    assert step.seconds == pytest.approx(0.010)
    assert step.joules == pytest.approx(4.5)
    assert (step.real_s, step.over, step.clock_mhz) == (pytest.approx(0.002), 0, 1000)
    assert world.now_s == pytest.approx(100.010, abs=0.0003)


def test_the_host_between_two_steps_is_part_of_the_second():
    world = World()
    pacer = world.pacer()
    first = world.step(pacer)
    world.now_s += 0.003
    second = world.step(pacer)
    assert second.ended_s - first.ended_s == pytest.approx(0.010)
    assert second.waited_s == pytest.approx(0.003, abs=0.0003)


def test_after_the_last_request_a_step_begins_when_it_is_asked_for():
    world = World()
    pacer = world.pacer()
    first = world.step(pacer, last=True)
    world.now_s += 0.003
    second = world.step(pacer)
    assert second.waited_s == 0
    assert second.ended_s - first.ended_s == pytest.approx(0.013, abs=0.0003)


def test_an_engine_that_was_idle_for_long_begins_anew():
    world = World()
    pacer = world.pacer()
    world.step(pacer)
    world.now_s += 2 * GRACE_S
    assert world.step(pacer).waited_s == 0


def test_a_clock_that_changes_in_the_midst_changes_the_rest():
    world = World(change_s=100.005)
    step = world.step(world.pacer())
    assert step.seconds == pytest.approx(0.015, abs=0.0025)
    assert step.clock_mhz == 500
    assert step.joules == pytest.approx(0.005 * 450 + 0.010 * 250, rel=0.15)
    assert [round(util, 6) for util, _ in world.told] == [1.0, 1.0]


def test_a_step_that_takes_longer_than_the_gpu_would_is_an_overrun():
    world = World()
    step = world.step(world.pacer(), real_s=0.02)
    assert (step.over, step.seconds) == (1, pytest.approx(0.02))


def test_the_gpu_stays_busy_while_the_engine_has_work():
    world = World()
    pacer = world.pacer()
    world.step(pacer)
    world.step(pacer, last=True)
    (_, between_s), (_, after_s) = world.told
    assert between_s == pytest.approx(0.010 + GRACE_S)
    assert after_s == pytest.approx(0.010, abs=0.0003)


def output(new=(), cached=(), finished=()):
    """As vLLM's scheduler tells it: (name, computed, scheduled, prompt, max_tokens), (name, computed, scheduled,
    answered).
    """
    return SimpleNamespace(
        finished_req_ids=set(finished),
        scheduled_new_reqs=[
            SimpleNamespace(
                req_id=name,
                num_computed_tokens=computed,
                prompt_token_ids=[0] * prompt,
                sampling_params=SimpleNamespace(max_tokens=most),
            )
            for name, computed, _, prompt, most in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[row[0] for row in cached],
            num_computed_tokens=[row[1] for row in cached],
            num_output_tokens=[row[3] for row in cached],
        ),
        num_scheduled_tokens={row[0]: row[2] for row in (*new, *cached)},
    )


def test_prompts_chunks_and_rows_are_told_apart():
    batches = Batches()
    batch, last = batches.take(output(new=[("a", 0, 10, 10, 3), ("b", 0, 6, 8, 1)]))
    assert (batch, last) == (Batch(0, 0, 16, 10 * 5 + 6 * 3), False)
    batch, last = batches.take(output(cached=[("a", 10, 1, 1), ("b", 6, 2, 0)]))
    assert (batch, last) == (Batch(1, 11, 2, 2 * 7), False)
    batch, last = batches.take(output(cached=[("a", 11, 1, 2)], finished=["b"]))
    assert (batch, last) == (Batch(1, 12, 0, 0), True)


def test_the_last_token_of_a_prompt_on_its_own_is_no_row():
    batches = Batches()
    batches.take(output(new=[("a", 0, 9, 10, 5)]))
    assert batches.take(output(cached=[("a", 9, 1, 0)]))[0] == Batch(0, 0, 1, 9.5)


def test_what_was_thrown_out_is_a_prompt_again():
    batches = Batches()
    batches.take(output(new=[("a", 0, 10, 10, 5)]))
    assert batches.take(output(cached=[("a", 0, 12, 2)]))[0] == Batch(0, 0, 12, 72.0)


def test_vllm_finds_it_where_it_was_put(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    settings = Settings(line=(0.01, 0.001, 0.0001))
    environment = install(settings, tmp_path)
    assert environment == {"PYTHONPATH": str(tmp_path), VARIABLE: str(tmp_path / "settings.json")}
    assert "vllm_pace = vllm_pace:register" in (tmp_path / "vllm_pace-0.dist-info/entry_points.txt").read_text()
    assert (tmp_path / "vllm_pace.py").is_file()
    assert Settings(*json.loads((tmp_path / "settings.json").read_text())).line == list(settings.line)


def test_a_line_is_a_law_without_a_gpu():
    pacer = _pacer(Settings(line=(0.01, 0.001, 0.0001)))
    pacer.begin(Batch(decode_sequences=2, kv_tokens=100, prefill_tokens=30, prefill_pairs=0.0), last=True)
    assert pacer.finish().seconds == pytest.approx(0.015, abs=0.001)
