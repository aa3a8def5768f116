from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.core.forecast.margins import LEAST, MOST, STEP, Cause, ClassMargins, Margins, Outcome

outcomes = st.builds(
    Outcome,
    met=st.booleans(),
    outgrown=st.booleans(),
    disturbed=st.booleans(),
    slowed=st.booleans(),
    in_time=st.booleans(),
)
runs = st.lists(st.tuples(outcomes, st.integers(1, 60)), max_size=30)
asked = st.sampled_from([0.9, 0.95, 0.99, 0.995])


def learned(q, outcomes_, **may):
    held = ClassMargins(asked=q)
    for outcome in outcomes_:
        held.learn(outcome, **({"clocks": True, "admission": True} | may))
    return held


PARTS = {
    "clocks": (lambda held: held.model + held.length, (Cause.MODEL, Cause.LENGTH)),
    "load": (lambda held: held.load, (Cause.LOAD,)),
}


@given(q=asked, run=runs, part=st.sampled_from(sorted(PARTS)))
def test_violations_stay_within_the_bound_in_any_window_whatever_the_errors(q, run, part):
    """The bound of the theory, in the worst window of an adversary's sequence of errors."""
    read, causes = PARTS[part]
    held, allowed = ClassMargins(asked=q), 1.0 - q
    # How far violations are above what is allowed in the worst window that ends here, and below it in the other one.
    above = below = worst_above = worst_below = 0.0
    for outcome, times in run:
        for _ in range(times):
            before = read(held)
            held.learn(outcome, clocks=True, admission=True)
            assert LEAST - 1e-9 <= read(held) <= MOST + 1e-9
            if outcome.cause not in causes:
                continue
            helpless, spare = before > MOST - STEP, before < LEAST + STEP
            above = max(0.0, above + (not outcome.met and not helpless) - allowed)
            below = 0.0 if spare else max(0.0, below + allowed - (not outcome.met))
            worst_above, worst_below = max(worst_above, above), max(worst_below, below)
    assert worst_above <= (MOST - LEAST) / STEP + 1e-6
    assert worst_below <= (MOST - LEAST) / STEP + 1e-6


@given(q=asked, good=st.integers(0, 400))
def test_what_is_allowed_is_used_where_errors_follow_the_margin(q, good):
    """Requests violate their SLO exactly where the margin is below 0.2: the share of violations comes to 1 - q."""
    held, violations, n = ClassMargins(asked=q), 0, 20_000
    for _ in range(good):
        held.learn(Outcome(met=True), clocks=True, admission=False)
    for _ in range(n):
        met = held.model + held.length >= 0.2
        violations += not met
        held.learn(Outcome(met=met), clocks=True, admission=False)
    assert abs(violations / n - (1 - q)) <= (MOST - LEAST) / (STEP * n) + 1e-9


@pytest.mark.parametrize(
    ("outcome", "cause"),
    [
        (Outcome(met=False), Cause.MODEL),
        (Outcome(met=False, outgrown=True), Cause.LENGTH),
        (Outcome(met=False, outgrown=True, disturbed=True), Cause.LOAD),
        (Outcome(met=False, slowed=False), Cause.ADMISSION),
    ],
)
def test_a_violation_raises_the_part_of_its_cause_alone(outcome, cause):
    held = learned(0.9, [outcome])
    moved = {one for one in Cause if getattr(held, one.value) > 0}
    assert moved == {cause}
    assert getattr(held, cause.value) == pytest.approx(0.9 * STEP)


def test_what_the_maximum_clock_alone_met_or_violated_teaches_nothing():
    held = learned(0.99, [Outcome(met=False, slowed=False, in_time=False)] * 5)
    held.learn(Outcome(met=True, slowed=False), clocks=True, admission=False)
    assert [getattr(held, cause.value) for cause in Cause] == [0.0] * 4


def test_requests_that_meet_their_slo_shrink_the_parts_in_proportion():
    held = learned(0.9, [Outcome(met=False), Outcome(met=False, outgrown=True), *[Outcome(met=True)] * 8])
    assert held.model == pytest.approx(held.length)
    assert held.model + held.length == pytest.approx(2 * 0.9 * STEP - 8 * 0.1 * STEP)
    assert held.load == 0.0


@given(q=asked, run=runs)
def test_what_is_owed_is_made_up_for_within_the_stated_number_of_requests(q, run):
    """Whatever the errors, as long as the margin is not at its upper bound."""
    held, owing = ClassMargins(asked=q), 0
    for outcome, times in run:
        for _ in range(times * 5):
            slowed = replace(outcome, disturbed=False, slowed=True)
            if not slowed.met and held.model + held.length > MOST - STEP:
                return
            held.count(slowed.met)
            held.learn(slowed, clocks=True, admission=False)
            owing = owing + 1 if held.owed > 2.0 else 0
            assert owing <= 2 * (MOST - LEAST) / STEP / (1.0 - q) + 1


def test_while_violations_are_owed_half_of_what_is_allowed_lowers_the_margin():
    held = ClassMargins(asked=0.9)
    for met in (False, False, False):
        held.count(met)
    before = held.model
    held.learn(Outcome(met=True), clocks=True, admission=False)
    assert held.owed == pytest.approx(2.7)
    assert before - held.model == pytest.approx(STEP * 0.05)


def test_parts_that_may_not_learn_stay():
    wrong = [Outcome(met=False), Outcome(met=False, slowed=False)]
    held = learned(0.99, wrong, clocks=False, admission=False)
    assert [getattr(held, cause.value) for cause in Cause] == [0.0] * 4


def in_force(margins, *classes, disturbed=False):
    found = margins.of_clocks(classes, margin=0.05, reserve=0.1, disturbed=disturbed)
    return pytest.approx((found.margin, found.reserve, found.spent))


def test_what_is_in_force_is_what_was_begun_with_and_what_the_neediest_class_learned():
    margins = Margins()
    assert in_force(margins, "", "chat") == (0.05, 0.1, 0.05)
    margins.ended("chat", 0.9, Outcome(met=False), learns=True)
    margins.ended("batch", 0.9, Outcome(met=False, outgrown=True), learns=True)
    assert in_force(margins, "chat") == (0.095, 0.145, 0.095)
    assert in_force(margins, "batch") == (0.05, 0.145, 0.095), "a longer output threatens its end only"
    assert in_force(margins, "batch", "chat") == (0.095, 0.145, 0.095)
    margins.ended("chat", 0.9, Outcome(met=False, disturbed=True), learns=True)
    assert in_force(margins, "chat") == (0.095, 0.145, 0.095)
    assert in_force(margins, "chat", disturbed=True) == (0.14, 0.19, 0.14)


def test_where_nothing_is_violated_plans_may_end_a_little_late():
    margins = Margins()
    for _ in range(4000):
        margins.ended("", 0.9, Outcome(met=True), learns=True)
    assert in_force(margins, "") == (0.05 + LEAST, 0.1 + LEAST, 0.05 + LEAST)
    assert margins.of_admission([""], 0.05) == 0.05, "requests are admitted in time all the same"


def test_admission_has_a_part_of_its_own():
    margins = Margins(admission=True)
    margins.ended("", 0.9, Outcome(met=False, slowed=False), learns=True)
    assert margins.of_admission([""], 0.2) == pytest.approx(0.245)
    assert margins.of_admission(["other"], 0.2) == 0.2
    assert in_force(margins, "") == (0.05, 0.1, 0.05)


def test_attainment_is_shown_by_class_as_asked_and_had():
    margins = Margins()
    for met in (True, True, False):
        margins.ended("chat", 0.9, Outcome(met=met), learns=True)
    margins.ended("", 0.99, Outcome(met=False), learns=False)
    other, chat = margins.view()
    assert (other.name, other.asked, other.had, other.ended) == ("", 0.99, 0.0, 1)
    assert dict(other.learned) == dict.fromkeys(Cause, 0.0), "it is counted, and teaches nothing"
    assert (chat.name, chat.asked, chat.ended) == ("chat", 0.9, 3)
    assert chat.had == pytest.approx(2 / 3)
    assert chat.had_recently == pytest.approx(2 / 3, abs=0.01)
    assert dict(chat.learned)[Cause.MODEL] > 0
