"""The rules, each on evidence that breaks it: a rule that can no longer fail would be noticed here."""

from dataclasses import replace

import pytest

from tests.soak.seen import BEGAN_S, GOOD, SCHEDULE, after, evidence, loss, write
from tools.nvml.layout import WRITES
from tools.nvml.machine import Op
from tools.soak.check import restorings_s, violations
from tools.soak.evidence import Ask, Death, Gap, Obstacle, Other
from tools.soak.schedule import Fault, Stop


def kind(name):
    return Fault(kind=name, at_s=0.1)


def only(found):
    """There is one violation, and this is it."""
    assert len(found) == 1, found
    return found[0]


def test_what_went_well_violates_nothing_and_its_restoring_is_timed():
    assert violations(evidence()) == []
    assert restorings_s(evidence()) == [pytest.approx(0.02)]


# ---- restored -----------------------------------------------------------------------------------------------


def test_a_gpu_left_locked():
    spoiled = evidence(GOOD[:-2], restored_s=None, left=((1110, 1110), (1110, 1110), (960, 960)))
    assert [text[:24] for text in violations(spoiled)] == ["GPU 0 is locked (1110, 1", "GPU 1 is locked (1110, 1"]


def undeclared():
    """The schedule, but the lock of GPU 1 is no baseline."""
    one, other, unlisted = SCHEDULE.gpus
    return after(gpus=(one, replace(other, declared=False), unlisted))


def test_a_lock_that_no_option_states_is_reset_and_not_restored():
    restored = evidence(schedule=undeclared(), restored_s=None)
    assert any(text.startswith("GPU 1 is locked (855, 855)") for text in violations(restored))
    reset = evidence((*GOOD[:-1], write(1.02, 1)), undeclared(), left=(None, None, (960, 960)))
    assert violations(reset) == []


def test_a_lock_that_no_option_states_stays_where_no_lease_set_anything():
    untouched = evidence([one for one in GOOD if one.gpu != 1], undeclared(), restored_s=None)
    assert [text for text in violations(untouched) if text.startswith("GPU 1")] == []


def test_another_controllers_lock_is_reset_by_a_later_lease():
    earlier = [Other(at_s=BEGAN_S + 0.05, gpu=1, lock=(405, 405))]
    for writes, fine in ((GOOD, False), ([one for one in GOOD if one.gpu != 1], True)):
        found = evidence(writes, restored_s=None, left=(None, (405, 405), (960, 960)), others=earlier)
        assert (not any(text.startswith("GPU 1 is locked") for text in violations(found))) is fine


def test_a_gpu_unlocked_though_it_has_a_baseline():
    spoiled = evidence((*GOOD[:-1], write(1.02, 1)), restored_s=None, left=(None, None, (960, 960)))
    assert only(violations(spoiled)).startswith("GPU 1 is locked None")


def test_a_lease_in_mid_life_whose_gpus_went_back_too_late():
    late = (*GOOD[:4], write(3.6, 0), write(3.7, 1, 855))
    found = evidence(late, losses=[loss(0.6), loss(4.0)], stopped_s=BEGAN_S + 4.0)
    assert "restored 3.100 s late" in only(violations(found))


def test_what_stood_in_the_way_is_not_the_keepers_fault():
    late = (*GOOD[:4], write(3.6, 0), write(3.7, 1, 855))
    stopped = Obstacle(began_s=BEGAN_S + 0.5, ended_s=BEGAN_S + 3.5, what="stopped")
    found = evidence(late, losses=[loss(0.6)], stopped_s=BEGAN_S + 4.0, obstacles=[stopped])
    assert violations(found) == []
    assert restorings_s(found) == [pytest.approx(0.2)]


def test_nor_that_there_was_no_keeper():
    late = (*GOOD[:4], write(3.6, 0), write(3.7, 1, 855))
    dead = Death(at_s=BEGAN_S + 0.6, by_us=True)
    starts_s = [BEGAN_S - 0.5, BEGAN_S + 3.55]
    found = evidence(late, losses=[loss(0.6, why="the keeper died")], deaths=[dead], starts_s=starts_s)
    assert violations(found) == []
    assert restorings_s(found) == [pytest.approx(0.15)]


def test_a_lease_that_runs_out_counts_from_its_last_possible_end():
    found = evidence(losses=[loss(1.5, from_s=1.0)])
    assert restorings_s(found) == [0.0]


def test_a_driver_that_was_loaded_anew_may_have_taken_the_lock_away():
    gone = [Other(at_s=BEGAN_S + 0.7, gpu=1, lock=None)]
    spoiled = {"writes": GOOD[:-1], "restored_s": None, "left": (None, None, (960, 960))}
    assert violations(evidence(**spoiled, others=gone)) == []
    assert violations(evidence(**spoiled)) != []


def test_another_controllers_lock_stays_only_if_no_lease_was_there():
    spoiled = {"restored_s": None, "left": (None, (405, 405), (960, 960))}
    during = [Other(at_s=BEGAN_S + 0.7, gpu=1, lock=(405, 405))]
    later = [Other(at_s=BEGAN_S + 1.5, gpu=1, lock=(405, 405))]
    assert only(violations(evidence(**spoiled, others=during))).startswith("GPU 1 is locked (405, 405)")
    assert violations(evidence(**spoiled, others=later)) == []


def test_without_any_journal_another_controllers_lock_may_stay_also_of_during_a_lease():
    during = [Other(at_s=BEGAN_S + 0.7, gpu=1, lock=(405, 405))]
    for others, forgot, fine in ((during, True, True), (during, False, False), ([], True, False)):
        found = evidence(GOOD[:-1], restored_s=None, left=(None, (405, 405), (960, 960)), others=others, forgot=forgot)
        assert (violations(found) == []) is fine, (others, forgot)


def test_without_any_journal_a_forgotten_clock_may_stay_but_nothing_else():
    for lock, fine in (((1110, 1110), True), ((1305, 1305), False)):
        found = evidence(GOOD[:-1], restored_s=None, left=(None, lock, (960, 960)), forgot=True)
        assert (violations(found) == []) is fine


# ---- writes --------------------------------------------------------------------------------------------------


def test_a_write_to_a_unlisted():
    written, tried = violations(evidence((*GOOD, write(0.6, 2, 900))))
    assert written.startswith("GPU 2 is not opted in, and was written to")
    assert tried == "GPU 2 is not opted in, and 1 writes to it were tried"


def test_a_write_to_a_unlisted_that_was_only_tried():
    assert "1 writes to it were tried" in only(violations(evidence(attempted=(3, 3, 1))))


@pytest.mark.parametrize(
    "bad",
    [
        write(0.6, 0, 1215),
        write(0.6, 0, 495),
        write(0.6, 0, 1200, low=210),
        write(0.6, 0, 1215, result=4),
        write(0.6, 0, 250_000, op=Op.POWER_LIMIT),
        write(0.6, 0, 1, op=Op.PERSISTENCE),
    ],
)
def test_a_write_that_nobody_allowed_also_one_that_was_refused(bad):
    back = [] if bad.result else [write(0.7, 0, 1110)]
    assert "a write that is not allowed" in only(violations(evidence((*GOOD[:4], bad, *back, *GOOD[4:]))))
    assert violations(evidence((*GOOD[:4], write(0.6, 0, 1200), write(0.6, 1, 1200), *GOOD[4:]))) == []


def test_restoring_out_of_the_range_is_allowed():
    one, other, unlisted = SCHEDULE.gpus
    schedule = after(gpus=(one, replace(other, before=(1365, 1365)), unlisted))
    found = evidence((*GOOD[:-1], write(1.02, 1, 1365)), schedule, left=(None, (1365, 1365), (960, 960)))
    assert violations(found) == []


def test_a_log_that_ran_over():
    assert "the log holds" in only(violations(evidence(write_count=WRITES + 1)))


def test_half_a_group():
    half = (*GOOD[:2], write(0.3, 0, 705), write(0.9, 0, 1110), write(0.9, 1, 1110), *GOOD[4:])
    assert "for 0.600 s one group is locked {0: (705, 705), 1: (900, 900)}" in only(violations(evidence(half)))
    for excuse in (
        {"gaps": [Gap(at_s=BEGAN_S + 0.4, lasted_s=0.3)]},
        {"obstacles": [Obstacle(began_s=BEGAN_S + 0.2, ended_s=BEGAN_S + 0.8, what="stopped")]},
    ):
        assert violations(evidence(half, **excuse)) == []


# ---- processes -----------------------------------------------------------------------------------------------


def test_a_keeper_that_ended_by_itself():
    dead = {"deaths": [Death(at_s=BEGAN_S + 0.4, by_us=False)], "starts_s": [BEGAN_S, BEGAN_S + 0.5]}
    assert "the keeper ended by itself at 0.400 s" in only(violations(evidence(**dead)))
    assert violations(evidence(schedule=after(kind("keeper: dies around a lock")), **dead)) == []


def test_a_gateway_that_ended_by_itself():
    dead = {"gateways": [Death(at_s=BEGAN_S + 0.4, by_us=False)]}
    assert "the gateway ended by itself at 0.400 s" in only(violations(evidence(**dead)))
    assert violations(evidence(schedule=after(kind("GPU: lost and back")), **dead)) == []


def test_a_lock_that_the_journal_did_not_know_of():
    dead = [Death(at_s=BEGAN_S + 0.4, by_us=True, unnoted=(1,))]
    found = evidence(deaths=dead, starts_s=[BEGAN_S, BEGAN_S + 0.5])
    assert "GPU 1 was locked when the keeper died at 0.400 s, and not noted" in only(violations(found))


def test_a_torn_journal_that_nobody_spoke_of():
    told = {"must_log": ["keeper.journal is not used"]}
    assert only(violations(evidence(**told))) == "the keeper never logged: keeper.journal is not used"
    assert violations(evidence(**told, logs="ERROR journal /x/keeper.journal is not used: it is torn")) == []


def test_what_was_seen_on_the_spot_is_passed_on():
    assert only(violations(evidence(troubles=["user 65534 was answered"]))) == "user 65534 was answered"


# ---- requests ------------------------------------------------------------------------------------------------


def asked(how, ended_s=None, **more):
    return {7: Ask(gateway=1, asked_s=BEGAN_S + 0.2, how=how, ended_s=ended_s and BEGAN_S + ended_s, **more)}


@pytest.mark.parametrize("stop", Stop)
def test_a_lost_request(stop):
    found = evidence(schedule=after(stop=stop), asks=asked(None))
    assert only(violations(found)) == "request 7 never ended"


@pytest.mark.parametrize(
    ("how", "ended_s", "words"),
    [
        ("error", 0.5, "request 7 was refused, though nothing touched gateway or engine"),
        ("cut", 0.5, "request 7 was cut off by the end of a gateway that nothing had happened to"),
        ("cut", 1.0, "request 7 was cut off by the end of a gateway that nothing had happened to"),
        ("broken", 0.5, "request 7 broke"),
    ],
)
def test_a_request_that_did_not_complete_though_nothing_touched_its_gateway(how, ended_s, words):
    assert only(violations(evidence(asks=asked(how, ended_s)))).startswith(words)
    harmless = after(kind("keeper: SIGKILL"), kind("GPU: lost and back"))
    assert only(violations(evidence(schedule=harmless, asks=asked(how, ended_s)))).startswith(words)


@pytest.mark.parametrize(
    ("name", "how", "fine"),
    [
        ("gateway: SIGKILL", "cut", True),
        ("gateway: SIGKILL", "error", True),
        ("engine: SIGKILL", "error", True),
        ("engine: SIGKILL", "cut", False),
        ("engine: SIGKILL", "broken", False),
        ("gateway: no memory", "broken", True),
        ("gateway: SIGKILL", None, False),
    ],
)
def test_what_a_fault_excuses(name, how, fine):
    found = evidence(schedule=after(kind(name)), asks=asked(how, how and 0.5))
    assert (violations(found) == []) is fine


def test_requests_that_were_open_at_the_end():
    for stop, how, fine in (
        (Stop.TERM, "error", True),
        (Stop.TERM, "cut", False),
        (Stop.KILL, "cut", True),
        (Stop.FREEZE, None, True),
        (Stop.INHERIT, None, False),
    ):
        asks = asked(how, how and 1.0, at_the_end=True)
        assert (violations(evidence(schedule=after(stop=stop), asks=asks)) == []) is fine, (stop, how)


def test_a_request_that_only_just_connects_when_the_gateway_is_ended_may_be_cut():
    schedule = after(stop=Stop.TERM)
    for asked_s, begun, fine in ((0.9, False, True), (0.9, True, False), (0.3, False, False)):
        asks = asked("cut", 1.0, at_the_end=True, begun=begun)
        asks[7].asked_s = BEGAN_S + asked_s
        assert (violations(evidence(schedule=schedule, asks=asks)) == []) is fine, (asked_s, begun)
