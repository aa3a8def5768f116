"""Step reports: what is no true datagram of the engine changes nothing."""

from dataclasses import replace

from hypothesis import strategies as st

from tests.fuzz.properties import fuzzed, mutated
from throttllem.engines.step_reports import MOST_REQUESTS, MOST_STEPS, MOST_TOKENS, StepReceiver, StepStats, unpack

SECRET = b"0123456789abcdef"
STEP = StepStats(boot=7, sequence=1, step=0, monotonic_s=5.0, running=2, waiting=1, kv_usage=0.25, generated_tokens=2)
NEXT = replace(STEP, sequence=2, step=1, drafted_tokens=3, accepted_tokens=1, decode_sequences=2, seconds=0.5)
SIGNED = [STEP.pack(SECRET), NEXT.pack(SECRET)]
PLAIN = [STEP.pack(), NEXT.pack()]


def state(receiver):
    return receiver.boot, receiver.received, receiver.lost, receiver.preemptions, receiver.last, receiver._numbered


@fuzzed(datagrams=st.lists(mutated(*SIGNED, *PLAIN), max_size=8))
def test_what_the_engine_did_not_sign_changes_nothing(datagrams):
    receiver = StepReceiver("127.0.0.1:0", kv_blocks=100, secret=SECRET)
    assert receiver.take(SIGNED[0], 1.0) is not None
    before = state(receiver)
    for datagram in datagrams:
        if datagram not in SIGNED:
            assert receiver.take(datagram, 1.0) is None and state(receiver) == before
    assert receiver.take(SIGNED[1], 1.0) is not None


@fuzzed(datagrams=st.lists(mutated(*PLAIN, tokens=[b"\xff" * 8, b"\x00" * 8, b"\x7f\xf0" + bytes(6)]), max_size=8))
def test_numbers_stay_within_what_an_engine_can_report(datagrams):
    receiver = StepReceiver("127.0.0.1:0", kv_blocks=100, boot=7)
    for number, datagram in enumerate(datagrams, start=1):
        before = state(receiver)
        report = receiver.take(datagram, 1.0)
        assert receiver.received + receiver.garbage + receiver.other_boots == number
        if report is None:
            assert state(receiver) == before
            continue
        step = unpack(datagram)
        assert step.boot == 7 and (before[4] is None or step.sequence > before[4].sequence)
        assert report.step is None or 0 <= report.step < MOST_STEPS
        assert 0 <= report.kv_blocks <= 100 and max(report.running, report.waiting) <= MOST_REQUESTS
        tokens = (report.prompt_tokens, report.generated_tokens, report.drafted_tokens, report.accepted_tokens)
        assert all(count is None or 0 <= count <= MOST_TOKENS for count in tokens)
