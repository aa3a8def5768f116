"""The queue against a list that does the same the slow way, and its bounds."""

import math

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from core.effort import lines_executed
from core.toy import row
from throttllem.core.queue import Queue


class Line(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.queue = Queue()
        self.model = []
        self.came = 0
        self.now_s = 0.0

    @rule(wait_s=st.sampled_from([math.inf, 0.0, 1.0, 5.0, 5.0, 30.0]))
    def push(self, wait_s):
        self.queue.push(row(self.came, 4, 4), self.now_s + wait_s)
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
        gone = [held.request.id for held in self.queue.expired(self.now_s)]
        late = sorted((end_s, key) for key, end_s in self.model if end_s <= self.now_s)
        assert gone == [key for _, key in late]
        self.model = [held for held in self.model if held[1] > self.now_s]

    @invariant()
    def says_the_same(self):
        head = self.queue.head()
        assert len(self.queue) == len(self.model)
        assert (head.request.id if head else None) == (self.model[0][0] if self.model else None)
        assert self.queue.give_up_s() == min((end_s for _, end_s in self.model), default=math.inf)


TestLine = Line.TestCase


def test_what_left_is_forgotten_though_the_head_stays():
    queue = Queue()
    queue.push(row(0, 4, 4), 1e9)
    for key in range(1, 10_000):
        queue.push(row(key, 4, 4), 1e6 + key)
        queue.take(key)
    assert len(queue) == 1
    assert max(len(part) for part in vars(queue).values()) < 200


def test_leaving_from_the_middle_does_not_look_at_the_others():
    def lines(rows):
        queue = Queue()
        for key in range(rows):
            queue.push(row(key, 4, 4), 100.0 + key)
        return lines_executed(lambda: queue.take(rows // 2))

    assert lines(3000) == lines(30)
