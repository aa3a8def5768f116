"""The queue against a list that does the same the slow way, and its bounds."""

import math

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from core.effort import lines_executed
from core.toy import row
from throttllem.core.admission import AdmissionOptions, Unmeetable
from throttllem.core.clocks.policy import ThrottleOptions
from throttllem.core.options import ControllerOptions
from throttllem.core.scheduler import AdmissionQueue
from throttllem.core.types import Slo

REJECT = AdmissionOptions(unmeetable=Unmeetable.REJECT, reject_patience=1.0)
OPTIONS = ControllerOptions(throttle=ThrottleOptions(), admission=REJECT)


def waiting(key, expiry_s):
    """A request whose patience ends at that time."""
    slo = Slo() if expiry_s == math.inf else Slo(e2e_s=1.0)
    arrival_s = 0.0 if expiry_s == math.inf else expiry_s - 1.0
    return row(key, 4, 4, arrival_s=arrival_s, slo=slo)


class Line(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.queue = AdmissionQueue(OPTIONS)
        self.model = []
        self.came = 0
        self.now_s = 0.0

    @rule(wait_s=st.sampled_from([math.inf, 0.0, 1.0, 5.0, 5.0, 30.0]))
    def push(self, wait_s):
        self.queue.push(waiting(self.came, self.now_s + wait_s))
        self.model.append((self.came, self.now_s + wait_s))
        self.came += 1

    @rule(request_id=st.integers(0, 30))
    def take(self, request_id):
        found = self.queue.take(request_id)
        here = [key for key, _ in self.model if key == request_id]
        assert ([found.request.id] if found else []) == here
        self.model = [held for held in self.model if held[0] != request_id]

    @rule(seconds=st.sampled_from([0.0, 1.0, 4.0, 25.0]))
    def wait(self, seconds):
        self.now_s += seconds
        gone = [held.request.id for held, _ in self.queue.expire(self.now_s)]
        late = sorted((end_s, key) for key, end_s in self.model if end_s <= self.now_s)
        assert gone == [key for _, key in late]
        self.model = [held for held in self.model if held[1] > self.now_s]

    @invariant()
    def says_the_same(self):
        assert list(self.queue.waiting) == [key for key, _ in self.model]
        assert self.queue.next_expiry_s == min((end_s for _, end_s in self.model), default=math.inf)


TestLine = Line.TestCase


def test_what_left_is_forgotten_though_the_head_stays():
    queue = AdmissionQueue(OPTIONS)
    queue.push(waiting(0, 1e9))
    for key in range(1, 10_000):
        queue.push(waiting(key, 1e6 + key))
        queue.take(key)
    assert len(queue.waiting) == 1
    assert len(queue._expiries) < 200


def test_leaving_from_the_middle_does_not_look_at_the_others():
    def lines(rows):
        queue = AdmissionQueue(OPTIONS)
        for key in range(rows):
            queue.push(waiting(key, 100.0 + key))
        return lines_executed(lambda: queue.take(rows // 2))

    assert lines(3000) == lines(30)
