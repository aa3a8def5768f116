"""Iterations from step reports, timed by the engine or late, and from the arrival of tokens."""

from dataclasses import replace
from itertools import accumulate, pairwise

import pytest

from throttllem.engines.base import Report
from throttllem.profiling.live.iterations import (
    Decoding,
    decode_steps,
    decode_windows,
    lone_prompt,
    prefill_delays,
    prefill_steps,
)
from throttllem.profiling.live.load import Stream

BLOCK, BATCH, STEP_S = 16, 3, 0.01
LATE = Decoding(batch=BATCH, exact=False, decode_s=STEP_S)


def step(seconds=STEP_S, *, batch=BATCH, prompts=(), blocks=30, running=None, exact=None):
    """One reported step: `batch` sequences decode, and prompts of these lengths are processed."""
    return Report(
        running=batch + len(prompts) if running is None else running,
        waiting=0,
        kv_blocks=blocks,
        seconds=seconds,
        prompt_tokens=sum(prompts),
        generated_tokens=batch + len(prompts),
        decode_sequences=exact,
    )


def stream(gaps_s, *, prompt_tokens=20, start_s=1.0):
    """A stream with its first token at `start_s`, and one more after each gap."""
    times_s = list(accumulate(gaps_s, initial=start_s))
    return Stream(prompt_tokens=prompt_tokens, times_s=times_s, tokens=list(range(1, len(times_s) + 1)))


# ---- step reports ------------------------------------------------------------------------------------------------


def test_steps_timed_by_the_engine_are_an_iteration_each():
    reports = [step(0.01), step(0.012), step(0.03, prompts=(40,)), step(0.011, running=BATCH - 1), step(0.013)]
    found = decode_steps(reports, Decoding(batch=BATCH, exact=True))
    assert [each.seconds for each in found] == [0.01, 0.012, 0.013], "no prompt, and no sequence that ended"
    assert {(each.batch, each.kv_blocks, each.prompts, each.by) for each in found} == {(BATCH, 30, 0, "steps")}


@pytest.mark.parametrize("exact", [True, False])
def test_steps_of_an_engine_that_speculates_are_whole_steps(exact):
    reports = [replace(step(), generated_tokens=BATCH + 4, accepted_tokens=4) for _ in range(16)]
    found = decode_steps(reports, Decoding(batch=BATCH, exact=exact))
    assert [each.seconds for each in found] == [pytest.approx(STEP_S)] * (16 if exact else 3)
    assert [each.tokens_per_step for each in found] == [pytest.approx((BATCH + 4) / BATCH)] * len(found)
    assert {each.tokens_per_step for each in decode_steps([step()] * 16, LATE)} == {1.0}
    burst = [*reports[:2], replace(step(prompts=(40,)), generated_tokens=BATCH + 3, accepted_tokens=2), *reports[:2]]
    assert [each.prefill_tokens for each in prefill_steps(burst, [40], BLOCK, LATE)] == [40]


def test_late_reports_are_averaged_over_a_window():
    late = [step(seconds) for seconds in (0.015, 0.006, 0.011, 0.013, 0.007)] * 2
    found = decode_steps(late, LATE)
    assert [each.seconds for each in found] == [pytest.approx(0.0104)] * 2, "windows of 50 ms"
    assert len(decode_steps([step(0.001)] * 40, LATE)) == 2, "or of 16 steps"


def test_a_window_that_was_reported_all_at_once_is_dropped():
    reports = [step(0.01)] * 5 + [step(0.0005)] * 16 + [step(0.01)] * 5
    assert [each.seconds for each in decode_steps(reports, LATE)] == [pytest.approx(0.01)] * 2


def test_a_late_step_with_prompts_is_what_it_adds_to_its_neighbours():
    # The report of the step came 4 ms late, the next one 4 ms early; 2.5 steps fill 25 ms on each side.
    reports = [*[step()] * 4, step(0.044, prompts=(30, 30)), step(0.006), *[step()] * 3]
    (found,) = prefill_steps(reports, (30, 30), BLOCK, LATE)
    assert found.seconds == pytest.approx(0.04)
    assert (found.batch, found.prompts, found.prefill_tokens) == (BATCH + 2, 2, 60)
    assert found.kv_blocks == 30 + 2 * 2
    assert found.prefill_pairs == 900


@pytest.mark.parametrize(
    ("report", "lengths"),
    [
        (step(0.04, prompts=(30,)), (40,)),
        (step(0.04, prompts=(30,)), (30, 40)),
        (step(0.04, prompts=(30,), running=BATCH + 2), (30,)),
        (step(0.04, prompts=(30,), exact=BATCH - 1), (30,)),
    ],
    ids=["a part of a prompt", "one of two lengths", "another client's request", "fewer sequences decode"],
)
def test_a_step_whose_prompts_are_not_known_is_omitted(report, lengths):
    assert prefill_steps([step(), report, step()], lengths, BLOCK, LATE) == []


def test_a_lone_prompt_needs_no_batch_around_it():
    (found,) = prefill_steps([step(0.02, batch=0, prompts=(40,))], (40,), BLOCK, Decoding(batch=0, exact=False))
    assert (found.batch, found.seconds, found.kv_blocks) == (1, 0.02, 3)


# ---- streams -----------------------------------------------------------------------------------------------------


def jittered(seed, count=40):
    """Token times 10 ms apart, each up to 3 ms late."""
    late_s = [((place * 7 + seed * 5) % 4) / 1000 for place in range(count + 1)]
    return stream([STEP_S + after - before for before, after in pairwise(late_s)])


def test_windows_of_streams_are_the_median_over_the_batch():
    streams = [jittered(seed) for seed in range(5)]
    found = decode_windows(streams, BLOCK)
    assert len(found) >= 6
    assert [each.seconds for each in found] == pytest.approx([STEP_S] * len(found), rel=0.04)
    assert {(each.batch, each.by) for each in found} == {(5, "streams")}
    # 20 prompt tokens with a few tokens of output fill two blocks of 16 each, with 40 tokens of output four.
    assert (found[0].kv_blocks, found[-1].kv_blocks) == (10, 20)


def test_prompts_that_arrive_with_one_token_were_processed_together():
    gaps_s = [STEP_S] * 10 + [0.05] + [STEP_S] * 4 + [0.03] + [STEP_S] * 10
    streams = [stream(gaps_s), stream(gaps_s, start_s=1.001)]
    times_s = streams[0].times_s
    prompts = [
        Stream(prompt_tokens=tokens, times_s=[when_s + 0.002], tokens=[1])
        for tokens, when_s in ((40, times_s[11]), (50, times_s[11]), (60, times_s[16]))
    ]
    both, last = prefill_delays(streams, prompts, BLOCK, Decoding(batch=2, exact=False, decode_s=STEP_S))
    assert (both.batch, both.prompts, both.prefill_tokens) == (4, 2, 90)
    assert (last.batch, last.prompts, last.prefill_tokens) == (3, 1, 60)
    assert (both.seconds, last.seconds) == (pytest.approx(0.05), pytest.approx(0.03))


def test_a_prompt_alone_takes_its_first_token_less_the_overhead():
    alone = stream([STEP_S] * 7, prompt_tokens=40, start_s=1.05)
    alone.sent_s = 1.0
    found = lone_prompt([alone], 0.02, BLOCK)
    assert (found.seconds, found.batch, found.kv_blocks) == (pytest.approx(0.03), 1, 3)
    assert lone_prompt([alone], 0.05, BLOCK).seconds == pytest.approx(STEP_S), "at least a decode step"
    assert lone_prompt([Stream(prompt_tokens=4)], 0.0, BLOCK) is None
