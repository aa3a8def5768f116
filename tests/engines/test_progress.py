"""From tokens to iterations, by hand, for each kind of engine; the one record of each request in flight."""

from throttllem.core.types import Observed, Progressed, RateChanged, Stepped
from throttllem.engines.base import Report
from throttllem.engines.progress import JUMP_STEPS, STEPS_PER_S, Progress


def stepped(iteration, started=(), finished=(), preempted=(), assumed=False):
    return Stepped(
        engine=3, iteration=iteration, started=started, finished=finished, preempted=preempted, assumed=assumed
    )


def progressed(key, tokens):
    return Progressed(engine=3, request_id=key, tokens=tokens)


def sent(progress, *keys, streams=True, sequences=1):
    for key in keys:
        progress.dispatched(key, streams=streams, sequences=sequences)


# ---- engines that report nothing -----------------------------------------------------------------------------


def test_one_stream_is_one_iteration_a_token():
    progress = Progress(3, exact=False)
    sent(progress, 7)
    assert progress.iteration == -1
    assert progress.token(7) == [stepped(0, started=(7,))]
    assert progress.token(7) == [stepped(1)]
    assert progress.ended(7, 2) == [stepped(1, finished=(7,))]
    sent(progress, 8)
    assert progress.token(8) == [stepped(2, started=(8,))]


def test_sequences_of_one_burst_share_an_iteration_in_whatever_order_they_come():
    progress = Progress(3, exact=False)
    sent(progress, 1, 2)
    assert [*progress.token(1), *progress.token(2)] == [stepped(0, started=(1,)), stepped(0, started=(2,))]
    for iteration, (first, second) in enumerate([(2, 1), (1, 2), (1, 2), (2, 1)], start=1):
        events = [*progress.token(first), *progress.token(second)]
        # The place of the second trails by the one token that a late burst could explain.
        assert [event.iteration for event in events] in ([iteration], [])
        assert progress.iteration in (iteration - 1, iteration)


def test_a_merged_chunk_advances_by_all_its_tokens():
    progress = Progress(3, exact=False)
    sent(progress, 1)
    progress.token(1)
    assert progress.token(1, 4) == [stepped(4)]
    assert progress.ended(1, None) == [stepped(4, finished=(1,))]


def test_a_preempted_sequence_is_corrected_but_not_at_every_token():
    progress = Progress(3, exact=False)
    sent(progress, 1, 2)
    progress.token(1)
    progress.token(2)
    for _ in range(5):
        progress.token(1)
    assert progress.token(2)[-1] == progressed(2, 2)
    assert progress.token(1) == [stepped(6)]
    quiet = []
    for _ in range(6):
        quiet += progress.token(1)
    assert quiet == [stepped(iteration) for iteration in range(7, 13)]
    assert progress.token(2) == [], "corrected 7 iterations ago"
    progress.token(1)
    assert progress.token(2) == [progressed(2, 4)]


def test_when_the_request_that_leads_ends_another_leads():
    progress = Progress(3, exact=False)
    sent(progress, 1, 2)
    for key in (1, 2, 1, 2, 1, 2):
        progress.token(key)
    progress.ended(1, 3)
    progress.left(1)
    before = progress.iteration
    for _ in range(10):
        progress.token(2)
    assert before + 9 <= progress.iteration <= before + 10
    assert progress.ended(2, 13)[-1] == stepped(progress.iteration, finished=(2,))


def test_the_engines_own_count_at_the_end_is_reported():
    progress = Progress(3, exact=False)
    sent(progress, 1)
    progress.token(1)
    assert progress.ended(1, 40) == [progressed(1, 40), stepped(0, finished=(1,))]


def test_an_output_without_tokens_only_ends():
    progress = Progress(3, exact=False)
    sent(progress, 1)
    assert progress.ended(1, 0) == [stepped(0), stepped(0, finished=(1,))]


def test_several_sequences_count_by_their_mean():
    progress = Progress(3, exact=False)
    sent(progress, 1, sequences=4)
    assert [event for _ in range(4) for event in progress.token(1)] == [stepped(0, started=(1,))]
    assert [event for _ in range(4) for event in progress.token(1)] == [stepped(1)]
    assert progress.ended(1, 8) == [stepped(1, finished=(1,))]


def test_a_request_that_left_or_is_unknown_reports_nothing():
    progress = Progress(3, exact=False)
    sent(progress, 1)
    progress.token(1)
    assert progress.left(1).tokens == 1
    assert (progress.left(1), progress.left(9)) == (None, None)
    events = [progress.token(1), progress.token(9), progress.ended(1, 4), progress.ended(9, None)]
    assert [list(each) for each in events] == [[], [], [], []]


def test_a_request_is_in_flight_until_it_left():
    progress = Progress(3, exact=False)
    progress.dispatched(1, streams=True, sequences=2, prompt_tokens=10)
    progress.token(1, 4)
    progress.ended(1, 6)
    (flight,) = progress.in_flight.values()
    assert (flight.request_id, flight.sequences, flight.prompt_tokens, flight.tokens, flight.length) == (1, 2, 10, 6, 3)
    assert progress.left(1) is flight
    assert progress.in_flight == {}


# ---- requests that do not stream -----------------------------------------------------------------------------


def test_a_silent_request_starts_with_the_next_iteration_of_others():
    progress = Progress(3, exact=False)
    sent(progress, 1)
    progress.token(1)
    sent(progress, 2, streams=False)
    assert progress.token(1) == [stepped(1, started=(2,))]
    for _ in range(3):
        progress.token(1)
    assert progress.ended(2, 4) == [stepped(4, finished=(2,))]


def test_a_silent_request_starts_when_the_engine_runs_more_sequences_than_are_known():
    progress = Progress(3, exact=False)
    sent(progress, 1)
    progress.token(1)
    sent(progress, 2, 3, streams=False)
    assert progress.report(Report(running=1, waiting=2)) == [Observed(engine=3, running=1, waiting=2)]
    assert progress.report(Report(running=2, waiting=1))[0] == stepped(0, started=(2,))
    assert progress.token(1) == [stepped(1)]
    assert progress.report(Report(running=3, waiting=0))[0] == stepped(1, started=(3,))


def test_a_timer_advances_iterations_while_all_requests_are_silent():
    progress = Progress(3, exact=False)
    assert not progress.needs_timer
    assert list(progress.tick()) == []
    sent(progress, 1, streams=False)
    assert progress.needs_timer
    assert progress.tick() == [stepped(0, started=(1,), assumed=True)]
    assert progress.tick() == [stepped(1, assumed=True)]
    assert progress.ended(1, 2) == [stepped(1, finished=(1,))]
    progress.left(1)
    assert not progress.needs_timer
    assert list(progress.tick()) == []


def test_no_timer_where_a_stream_or_step_numbers_show_the_iterations():
    streams, steps = Progress(3, exact=False), Progress(3, exact=False)
    sent(streams, 1)
    streams.token(1)
    sent(streams, 2, streams=False)
    assert not streams.needs_timer and list(streams.tick()) == []
    streams.token(1)
    streams.ended(1, 2)
    streams.left(1)
    assert streams.needs_timer and streams.tick() == [stepped(2, assumed=True)]
    sent(steps, 1, streams=False)
    steps.report(Report(running=1, waiting=0, step=5))
    assert not steps.needs_timer and list(steps.tick()) == []


def test_a_timer_waits_for_a_report_that_the_request_runs_where_there_are_reports():
    progress = Progress(3, exact=False)
    progress.report(Report(running=0, waiting=0))
    sent(progress, 1, streams=False)
    assert not progress.needs_timer
    progress.report(Report(running=1, waiting=0))
    assert progress.needs_timer and progress.tick() == [stepped(1, assumed=True)]


def test_a_silent_request_that_ends_before_it_was_seen_starts_and_ends():
    progress = Progress(3, exact=False)
    sent(progress, 1, 2, streams=False)
    assert progress.ended(2, 5) == [stepped(0, started=(2, 1)), progressed(2, 5), stepped(0, finished=(2,))]
    progress.left(2)
    assert progress.ended(1, None) == [stepped(0, finished=(1,))]


# ---- engines with step numbers -------------------------------------------------------------------------------


def test_step_numbers_count_from_the_first_and_may_jump():
    progress = Progress(3, exact=False)
    assert progress.report(Report(running=0, waiting=0, step=100))[0] == stepped(0)
    sent(progress, 1)
    assert progress.report(Report(running=1, waiting=0, kv_blocks=4, step=101)) == [
        stepped(1),
        Observed(engine=3, running=1, waiting=0, kv_blocks=4),
    ]
    assert progress.token(1) == [stepped(1, started=(1,))]
    assert progress.report(Report(running=1, waiting=0, step=101)) == [Observed(engine=3, running=1, waiting=0)]
    assert progress.report(Report(running=1, waiting=0, step=121))[0] == stepped(21)
    assert progress.token(1) == []  # one event of several tokens, as a busy engine sends them
    assert progress.ended(1, 2) == [progressed(1, 2), stepped(21, finished=(1,))]


def test_a_token_may_come_before_the_report_of_its_step():
    progress = Progress(3, exact=False)
    progress.report(Report(running=0, waiting=0, step=10))
    sent(progress, 1)
    assert progress.token(1) == [stepped(1, started=(1,))]
    assert progress.report(Report(running=1, waiting=0, step=11)) == [Observed(engine=3, running=1, waiting=0)]
    assert progress.token(1) == [stepped(2)]


def test_streams_with_several_tokens_a_step_do_not_carry_the_iteration_away():
    progress = Progress(3, exact=False)
    progress.report(Report(running=0, waiting=0, step=0))
    sent(progress, 1)
    events = []
    for step in range(1, 60):
        events += progress.token(1, 3)
        events += progress.report(Report(running=1, waiting=0, step=step))
    iterations = [event.iteration for event in events if isinstance(event, Stepped)]
    assert iterations == sorted(iterations)
    # Trusted as long as the report could be the one that is late, then held until step numbers show it.
    assert progress.iteration <= 59 + 12
    corrections = [event for event in events if isinstance(event, Progressed)]
    assert 59 / 12 <= len(corrections) <= 59 / 8 + 1


def test_step_numbers_that_start_again_go_on_from_the_iteration_at_hand():
    progress = Progress(3, exact=False)
    for step in (500, 501, 502):
        progress.report(Report(running=1, waiting=0, step=step))
    assert progress.report(Report(running=0, waiting=0, step=0)) == [Observed(engine=3, running=0, waiting=0)]
    assert progress.report(Report(running=1, waiting=0, step=1))[0] == stepped(3)
    sent(progress, 1)
    assert progress.token(1) == [stepped(4, started=(1,))], "its streams prove what they did before"


# ---- engines that name the requests of each step -------------------------------------------------------------


def test_named_reports_become_one_event_each_and_nothing_else_does():
    progress = Progress(3, exact=True)
    sent(progress, 1, 2)
    first = Report(running=2, waiting=0, step=40, started=(1, 2, -1), finished=(2,), preempted=(5,))
    assert [list(each) for each in (progress.token(1), progress.ended(2, 1), progress.tick())] == [[], [], []]
    assert progress.report(first) == [stepped(0, started=(1, 2, -1), finished=(2,), preempted=(5,))]
    assert list(progress.report(Report(running=1, waiting=0))) == []
    assert progress.report(Report(running=1, waiting=0, step=41, started=(), finished=())) == [stepped(1)]
    assert progress.iteration == 1
    assert not progress.needs_timer


def test_output_tokens_are_the_steps_in_which_a_request_ran():
    """Preempted before step 2, started again in step 4, finished in step 5; two sequences."""
    progress = Progress(3, exact=True)
    progress.dispatched(1, streams=False, sequences=2, prompt_tokens=8)
    (flight,) = progress.in_flight.values()
    found = [progress.output_tokens(flight)]
    for step, named in enumerate(
        ({"started": (1,)}, {}, {"preempted": (1,)}, {}, {"started": (1,)}, {"finished": (1,)})
    ):
        progress.report(Report(**{"running": 1, "waiting": 0, "step": step, "started": (), "finished": ()} | named))
        found.append(progress.output_tokens(flight))
    assert found == [0, 2, 4, 4, 4, 6, 8]
    assert progress.seen_tokens(1) == 8


def test_output_tokens_are_those_of_the_stream_where_nothing_else_shows_them():
    progress = Progress(3, exact=False)
    sent(progress, 1)
    for _ in range(3):
        progress.token(1)
    (flight,) = progress.in_flight.values()
    assert (progress.output_tokens(flight), progress.seen_tokens(1), progress.seen_tokens(9)) == (3, 3, 0)


def test_output_tokens_of_a_silent_request_are_the_iterations_in_which_it_ran():
    progress = Progress(3, exact=False)
    sent(progress, 1, streams=False, sequences=2)
    for _ in range(4):
        progress.tick()
    (flight,) = progress.in_flight.values()
    assert progress.output_tokens(flight) == 8
    assert progress.seen_tokens(1) == 0, "a timer shows no tokens"


def test_output_tokens_are_those_of_the_steps_where_events_hold_several():
    progress = Progress(3, exact=False)
    progress.dispatched(1, streams=True)
    progress.report(Report(running=1, waiting=0, step=100))
    progress.token(1)
    start = progress.iteration
    progress.report(Report(running=1, waiting=0, step=110))
    progress.token(1)
    ran = progress.iteration - start + 1
    (flight,) = progress.in_flight.values()
    assert progress.seen_tokens(1) == progress.output_tokens(flight) == ran > 2
    assert [event for event in progress.ended(1, None) if isinstance(event, Progressed)] == []
    progress.left(1)
    progress.dispatched(2, streams=True)
    progress.token(2)
    assert progressed(2, 5) in progress.ended(2, 5)


# ---- impossible step numbers ----------------------------------------------------------------------------------


def at(progress, step, elapsed_s=0.0):
    """The iteration after a report of this step."""
    progress.report(Report(running=0, waiting=0, step=step), elapsed_s=elapsed_s)
    return progress.iteration


def test_a_jump_further_than_time_allows_starts_the_numbering_again():
    for exact in (False, True):
        progress = Progress(3, exact=exact)
        assert [at(progress, step) for step in (5, 6, 7)] == [0, 1, 2]
        assert [at(progress, 7 + JUMP_STEPS + 1), at(progress, 7 + JUMP_STEPS + 2)] == [2, 3]
        assert [at(progress, 2**62), at(progress, 10**30), at(progress, 9), at(progress, 10)] == [3, 3, 3, 4]


def test_a_jump_that_time_allows_is_followed():
    progress = Progress(3, exact=False)
    assert at(progress, 0) == 0
    assert at(progress, JUMP_STEPS) == JUMP_STEPS
    assert at(progress, 2 * JUMP_STEPS + STEPS_PER_S * 60, 60.0) == 2 * JUMP_STEPS + STEPS_PER_S * 60


# ---- engines that speculate --------------------------------------------------------------------------------------


def speculated(step, generated, accepted):
    return Report(running=2, waiting=0, step=step, generated_tokens=generated, accepted_tokens=accepted)


def test_steps_of_several_tokens_are_as_many_iterations():
    progress = Progress(3, exact=False)
    sent(progress, 1, 2)
    progress.report(speculated(0, 2, 0))
    progress.token(1)
    progress.token(2)
    began = progress.iteration
    for number in range(1, 101):  # 3, then 4 tokens for each sequence
        tokens = 3 + number % 2
        progress.report(speculated(number, 2 * tokens, 2 * tokens - 2))
        for key in (1, 2):
            progress.token(key, tokens)
    assert progress.iteration == began + 350
    assert [progress.output_tokens(progress.in_flight[key]) for key in (1, 2)] == [351, 351]


def test_the_rate_is_reported_when_it_changes_and_not_else():
    progress = Progress(3, exact=False)
    found = []
    for number in range(300):
        accepted = 4 if 100 <= number < 200 else 0
        found += [
            event.tokens_per_step
            for event in progress.report(speculated(number, 2 + accepted, accepted))
            if isinstance(event, RateChanged)
        ]
    assert 2.0 < max(found) <= 3.0
    assert found[-1] < 1.1
    assert len(found) < 40


def test_streams_whose_tokens_are_not_counted_are_of_the_mean_length():
    progress = Progress(3, exact=False)
    sent(progress, 1)
    progress.report(speculated(0, 1, 0))
    progress.token(1)
    for number in range(1, 91):
        progress.report(speculated(number, 4, 3))
        assert not any(isinstance(event, Progressed) for event in progress.token(1))
    (*_, finished) = progress.ended(1, None)
    assert finished.iteration - progress.in_flight[1].start + 1 == 361


def test_an_engine_that_drafts_in_vain_is_one_that_does_not_speculate():
    plain, drafts = Progress(3, exact=False), Progress(3, exact=False)
    for number in range(50):
        expected = plain.report(Report(running=2, waiting=0, step=number, generated_tokens=2))
        assert drafts.report(speculated(number, 2, 0)) == expected


def test_a_stream_that_ended_since_the_last_report_has_the_tokens_of_its_events():
    progress = Progress(3, exact=False)
    for number in range(50):
        progress.report(speculated(number, 6, 4))
    sent(progress, 1)
    for _ in range(20):
        progress.token(1)
    assert progress.seen_tokens(1) == 60
