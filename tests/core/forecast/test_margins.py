from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.core.forecast.margins import GAIN, MOST, TOLERATED, Cause, ClassMargins, EndedRequest, Margins

outcomes = st.builds(
    EndedRequest,
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


CAUSES = {"clocks": (Cause.MODEL, Cause.LENGTH), "load": (Cause.LOAD,), "admission": (Cause.ADMISSION,)}


def margin(held, causes):
    return sum(held.margin(cause) for cause in causes)


@given(q=asked, run=runs, part=st.sampled_from(sorted(CAUSES)), enough=st.floats(0.0, MOST))
def test_no_more_is_owed_than_stated_where_some_margin_is_enough(q, run, part, enough):
    """An adversary chooses every outcome while the margin is less than what would be enough. From there on violations
    are no more than is allowed: here there are none.
    """
    held, causes, owed = ClassMargins(asked=q), CAUSES[part], 0.0
    for outcome, times in run:
        for _ in range(times):
            one = replace(
                outcome,
                met=outcome.met or margin(held, causes) >= enough,
                disturbed=part == "load",
                slowed=part != "admission",
                in_time=True,
            )
            held.learn(one, clocks=True, admission=True)
            owed = max(0.0, owed + (not one.met) - (1.0 - q))
            assert 0.0 <= margin(held, causes) <= MOST + 1e-9
            assert owed <= TOLERATED + enough / GAIN + 1.0 + 1e-9


def test_what_the_maximum_clock_brings_late_too_is_forgiven():
    margins = Margins()
    for outgrown in (False, True) * 4:
        margins.ended("chat", 0.9, EndedRequest(met=False, outgrown=outgrown), learns=True)
    margins.forgive({"chat": 3, "unheard of": 2, "other": 0})
    (seen,) = margins.view()
    assert seen.owed == pytest.approx(8 * 0.9 - 3)
    assert dict(seen.learned)[Cause.MODEL] == pytest.approx(GAIN * (8 * 0.9 - 3 - TOLERATED) / 2)
    assert dict(seen.learned)[Cause.LENGTH] == dict(seen.learned)[Cause.MODEL]
    margins.forgive({"chat": 100})
    assert margins.view()[0].owed == 0.0


def test_a_debt_is_paid_off_by_requests_that_meet_their_slo():
    held = learned(0.9, [EndedRequest(met=False)] * 12)
    assert held.margin(Cause.MODEL) == pytest.approx(GAIN * (12 * 0.9 - TOLERATED))
    for _ in range(88):
        held.learn(EndedRequest(met=True), clocks=True, admission=False)
    assert held.margin(Cause.MODEL) == pytest.approx(0.0, abs=1e-12)


def test_what_is_violated_at_the_largest_margin_is_not_saved_up():
    held = learned(0.9, [EndedRequest(met=False)] * 5000)
    assert held.margin(Cause.MODEL) == pytest.approx(MOST)
    for _ in range(500):
        held.learn(EndedRequest(met=True), clocks=True, admission=False)
    assert held.margin(Cause.MODEL) == 0.0


def test_a_few_violations_are_chance():
    held = learned(0.99, [EndedRequest(met=False), EndedRequest(met=False)])
    assert [held.margin(cause) for cause in Cause] == [0.0] * 4


@pytest.mark.parametrize(
    ("outcome", "cause"),
    [
        (EndedRequest(met=False), Cause.MODEL),
        (EndedRequest(met=False, outgrown=True), Cause.LENGTH),
        (EndedRequest(met=False, outgrown=True, disturbed=True), Cause.LOAD),
        (EndedRequest(met=False, slowed=False), Cause.ADMISSION),
    ],
)
def test_a_violation_raises_the_part_of_its_cause_alone(outcome, cause):
    held = learned(0.9, [outcome] * 4)
    assert {one for one in Cause if held.margin(one) > 0} == {cause}
    assert held.margin(cause) == pytest.approx(GAIN * (4 * 0.9 - TOLERATED))


def test_what_the_maximum_clock_alone_met_or_violated_teaches_nothing():
    held = learned(0.99, [EndedRequest(met=False, slowed=False, in_time=False)] * 5)
    held.learn(EndedRequest(met=True, slowed=False), clocks=True, admission=False)
    assert [getattr(held, cause.value) for cause in Cause] == [0.0] * 4


def test_requests_that_meet_their_slo_pay_both_parts_off_in_proportion():
    wrong = [EndedRequest(met=False), EndedRequest(met=False, outgrown=True)]
    held = learned(0.9, [*wrong * 3, *[EndedRequest(met=True)] * 8])
    assert held.model == pytest.approx(held.length)
    assert held.model + held.length == pytest.approx(6 * 0.9 - 8 * 0.1)
    assert held.margin(Cause.MODEL) == pytest.approx(GAIN * (4.6 - TOLERATED) / 2)
    assert held.load == 0.0


def test_parts_that_may_not_learn_stay():
    wrong = [EndedRequest(met=False), EndedRequest(met=False, slowed=False)]
    held = learned(0.99, wrong * 9, clocks=False, admission=False)
    assert [getattr(held, cause.value) for cause in Cause] == [0.0] * 4


def in_force(margins, *classes, disturbed=False):
    found = margins.of_clocks(classes, margin=0.05, reserve=0.1, disturbed=disturbed)
    return pytest.approx((found.margin, found.reserve, found.spent))


def test_what_is_in_force_is_what_was_begun_with_and_what_the_neediest_class_learned():
    margins = Margins()
    assert in_force(margins, "", "chat") == (0.05, 0.1, 0.05)
    for _ in range(3):
        margins.ended("chat", 0.9, EndedRequest(met=False), learns=True)
        margins.ended("batch", 0.9, EndedRequest(met=False, outgrown=True), learns=True)
    more = GAIN * (3 * 0.9 - TOLERATED)
    assert in_force(margins, "chat") == (0.05 + more, 0.1 + more, 0.05 + more)
    assert in_force(margins, "batch") == (0.05, 0.1 + more, 0.05 + more), "a longer output threatens its end only"
    assert in_force(margins, "batch", "chat") == (0.05 + more, 0.1 + more, 0.05 + more)
    for _ in range(3):
        margins.ended("chat", 0.9, EndedRequest(met=False, disturbed=True), learns=True)
    assert in_force(margins, "chat") == (0.05 + more, 0.1 + more, 0.05 + more)
    assert in_force(margins, "chat", disturbed=True) == (0.05 + 2 * more, 0.1 + 2 * more, 0.05 + 2 * more)
    assert margins.of_clocks(["chat"], margin=0.05, reserve=0.1, disturbed=True).learned == pytest.approx(2 * more)


def test_admission_has_a_part_of_its_own():
    margins = Margins(admission=True)
    for _ in range(3):
        margins.ended("", 0.9, EndedRequest(met=False, slowed=False), learns=True)
    assert margins.of_admission([""], 0.2) == pytest.approx(0.2 + GAIN * (3 * 0.9 - TOLERATED))
    assert margins.of_admission(["other"], 0.2) == 0.2
    assert in_force(margins, "") == (0.05, 0.1, 0.05)


def test_attainment_is_shown_by_class_as_asked_and_had():
    margins = Margins()
    for met in (True, True, False):
        margins.ended("chat", 0.9, EndedRequest(met=met), learns=True)
    margins.ended("", 0.99, EndedRequest(met=False), learns=False)
    other, chat = margins.view()
    assert (other.name, other.asked, other.had, other.ended) == ("", 0.99, 0.0, 1)
    assert dict(other.learned) == dict.fromkeys(Cause, 0.0), "it is counted, and teaches nothing"
    assert (chat.name, chat.asked, chat.ended) == ("chat", 0.9, 3)
    assert chat.had == pytest.approx(2 / 3)
    assert chat.had_recently == pytest.approx(2 / 3, abs=0.01)
    assert chat.owed == pytest.approx(0.9) and dict(chat.learned)[Cause.MODEL] == 0.0
