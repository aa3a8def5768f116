"""The ledger, by hand and against a naive division of every iteration."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.core.energy import EnergyLedger


def test_by_hand():
    ledger = EnergyLedger()
    ledger.idle(5.0)
    # Prompts of 6 and 2 tokens share 16 J: 2 J a token.
    ledger.iteration(16.0, 0, ((0, 6), (1, 2)))
    ledger.join(0)
    ledger.join(1)
    ledger.iteration(10.0, 2, ())
    # Two sequences and 3 prompt tokens share 10 J.
    ledger.iteration(10.0, 2, ((2, 3),))
    assert ledger.leave(0) == pytest.approx(12.0 + 5.0 + 2.0)
    ledger.pause(1)
    ledger.iteration(8.0, 0, ((1, 4),))
    ledger.join(1)
    ledger.iteration(1.0, 1, ())
    assert ledger.leave(1) == pytest.approx(4.0 + 5.0 + 2.0 + 8.0 + 1.0)
    assert (ledger.total_j, ledger.idle_j, ledger.leave(2)) == (50.0, 5.0, pytest.approx(6.0))


def test_an_iteration_without_tokens_is_idle():
    ledger = EnergyLedger()
    ledger.iteration(3.0, 0, ())
    assert (ledger.total_j, ledger.idle_j) == (3.0, 3.0)


steps = st.lists(
    st.tuples(
        st.floats(0.0, 100.0),
        st.integers(0, 3),
        st.lists(st.integers(1, 9), max_size=2),
        st.integers(0, 3),
        st.booleans(),
    ),
    max_size=40,
)
"""(joules, prompts that start, prompt tokens of newcomers, requests that leave, whether one is paused)"""


@given(steps)
def test_total_is_idle_and_what_requests_used(steps):
    ledger, naive, decoding, prompts, ended, idle = EnergyLedger(), {}, [], [], {}, 0.0
    for joules, starts, newcomers, leaves, pauses in steps:
        if pauses and decoding:
            ledger.pause(decoding[-1])
            prompts.append(decoding.pop())
        prompts += [len(naive) + n for n in range(len(newcomers))]
        naive |= {key: naive.get(key, 0.0) for key in prompts}
        chunks = [(key, 1 + key % 4) for key in prompts]
        ledger.iteration(joules, len(decoding), chunks)
        tokens = len(decoding) + sum(share for _, share in chunks)
        idle += 0.0 if tokens else joules
        for key, share in [(key, 1) for key in decoding] + chunks:
            naive[key] += joules * share / tokens
        for _ in range(min(starts, len(prompts))):
            decoding.append(prompts.pop(0))
            ledger.join(decoding[-1])
        for _ in range(min(leaves, len(decoding))):
            key = decoding.pop(0)
            ended[key] = ledger.leave(key)
            assert ended[key] == pytest.approx(naive[key], abs=1e-9)
    for key in naive.keys() - ended.keys():
        ended[key] = ledger.leave(key)
    assert ended == pytest.approx(naive, abs=1e-9)
    assert ledger.idle_j == pytest.approx(idle)
    assert ledger.total_j == pytest.approx(sum(ended.values()) + ledger.idle_j, abs=1e-9)


@given(st.lists(st.floats(0.0, 1e3), min_size=1, max_size=20), st.integers(1, 5))
def test_iterations_that_only_decode_may_be_counted_together(joules, sequences):
    together, single = EnergyLedger(), EnergyLedger()
    for ledger in (together, single):
        for key in range(sequences):
            ledger.join(key)
    together.iterations(joules, sequences)
    for each_j in joules:
        single.iteration(each_j, sequences, ())
    assert (together.total_j, together.leave(0)) == (single.total_j, single.leave(0))
