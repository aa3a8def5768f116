"""A controller over real batchers, with time in the test's hands. Every command is checked as it is carried out."""

from __future__ import annotations

import copy
import math
from collections import deque
from dataclasses import dataclass, field, replace
from itertools import takewhile

from core.lanes import Lanes
from throttllem.core.clocks.gathering import HoldPlan
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.controller import Controller
from throttllem.core.engine_state import Phase
from throttllem.core.options import ControllerOptions
from throttllem.core.types import (
    Arrived,
    Cancel,
    Cancelled,
    ClockRead,
    Dispatch,
    EngineLost,
    EngineReady,
    EngineSpec,
    Fail,
    FrequencyPlan,
    Reason,
    Reject,
    Request,
    SetClock,
    StartEngine,
    Stepped,
    StopEngine,
    Timer,
)
from throttllem.engines.simulated.batcher import Batcher

PLANNING = (ClockPolicy.THROTTLLEM, ClockPolicy.LEAST_ENERGY)


@dataclass
class Up:
    """An engine that is up: what runs, since when, and the clock that was set last."""

    spec: EngineSpec
    batcher: Batcher
    lanes: Lanes
    set_mhz: int
    in_progress: bool = False
    read_mhz: int | None = None
    unknown: bool = False
    disconnected: list[int] = field(default_factory=list)


class World:
    """Events go in by `send`; requests are in `waiting` (in order), `on` (dispatched) or `ended`."""

    def __init__(self, options: ControllerOptions) -> None:
        self.options = options
        self.controller = Controller(self.fresh())
        self.now_s = 0.0
        self.log = []
        self.up: dict[int, Up] = {}
        self.starting: dict[int, int] = {}
        self.keys = 0
        self.requests: dict[int, Request] = {}
        self.waiting: deque[int] = deque()
        self.on: dict[int, int] = {}
        self.ended: dict[int, str] = {}
        self.switches: list[tuple[int, FrequencyPlan]] = []

    def fresh(self) -> ControllerOptions:
        """What a controller learns is its own."""
        return replace(self.options, predictor=copy.deepcopy(self.options.predictor))

    # ---- what happens ----------------------------------------------------------------------------------------

    def send(self, event):
        """One event, and the timer that is needed at once after it; the commands of both."""
        commands = self.handle(event)
        deadline_s = self.controller.next_deadline()
        if deadline_s is not None and deadline_s <= self.now_s:
            commands = [*commands, *self.handle(Timer())]
        for command in commands:
            self.do(command)
        for up in self.up.values():
            self.go(up)
        self.check()
        return commands

    def handle(self, event):
        commands = self.controller.handle(event, self.now_s)
        self.log.append((self.now_s, event, commands))
        return commands

    def hold(self, plan: HoldPlan):
        """Requests that can wait are held by this plan from now on, whatever the load calls for."""
        self.log.append((self.now_s, plan, []))
        _plan_hold(self.controller, plan, self.now_s)

    def arrive(self, request: Request):
        self.requests[request.id] = request
        self.waiting.append(request.id)
        return self.send(Arrived(request=request))

    def come_back(self, request_id: int):
        """A request that its lost engine gave no byte of is tried once more, ahead of those that arrived later."""
        assert self.ended.pop(request_id) == "failed"
        arrival_s = self.requests[request_id].arrival_s
        later = [other for other in self.waiting if self.requests[other].arrival_s > arrival_s]
        self.waiting = deque([*(other for other in self.waiting if other not in later), request_id, *later])
        return self.send(Arrived(request=self.requests[request_id], again=True))

    def ready(self, key: int, spec: EngineSpec):
        self.starting.pop(key, None)
        self.keys = max(self.keys, key + 1)
        batcher = Batcher(spec)
        self.up[key] = Up(spec=spec, batcher=batcher, lanes=Lanes(batcher), set_mhz=spec.clocks_mhz[-1])
        return self.send(EngineReady(engine=key, spec=spec))

    def lose(self, key: int):
        self.starting.pop(key, None)
        self.up.pop(key, None)
        commands = self.send(EngineLost(engine=key))
        assert key not in self.on.values(), "what ran on a lost engine has ended"
        return commands

    def read_clock(self, key: int, mhz: int | None):
        """A clock that was not set by the controller is either corrected or planned from as it is."""
        if key in self.up:
            self.up[key].unknown = mhz is None
            self.up[key].read_mhz = mhz
        return self.send(ClockRead(engine=key, mhz=mhz))

    def cancel(self, request_id: int):
        commands = self.send(Cancelled(request_id=request_id))
        assert request_id in self.ended
        return commands

    def end_iteration(self, key: int):
        up = self.up[key]
        iteration, started, finished, preempted = up.lanes.end()
        up.in_progress = False
        for request_id in up.disconnected:
            if request_id not in finished:
                up.lanes.cancel(request_id)
        ended = [request_id for request_id in finished if request_id not in up.disconnected]
        up.disconnected.clear()
        for request_id in ended:
            self.end(request_id, "finished")
            del self.on[request_id]
        return self.send(
            Stepped(engine=key, iteration=iteration, started=started, finished=finished, preempted=preempted)
        )

    def advance(self, seconds: float):
        """Let time pass, with every timer on the way."""
        until_s = self.now_s + seconds
        for _ in range(10_000):
            deadline_s = self.controller.next_deadline()
            if deadline_s is None or deadline_s > until_s:
                self.now_s = until_s
                return
            self.now_s = max(self.now_s, deadline_s)
            self.send(Timer())
            deadline_s = self.controller.next_deadline()
            assert deadline_s is None or deadline_s > self.now_s, "a timer that has fired must not be due again"
        raise AssertionError("timers without end")

    def run_out(self, start, rounds: int = 3000):
        """Everything comes to its end: `start` gives the spec for an engine size."""
        for _ in range(rounds):
            if not self.waiting and not self.on:
                return
            self.advance(0.02 if self.up or self.starting else 1.0)  # a start that failed is tried again after a pause
            for key, tp in list(self.starting.items()):
                self.ready(key, start(tp))
            for key, plan in self.switches[:]:
                self.switches.remove((key, plan))
                self.read_clock(key, plan.mhz)
            for key in [key for key, up in self.up.items() if up.in_progress]:
                if key in self.up:
                    self.end_iteration(key)
        raise AssertionError(f"starved: waiting {list(self.waiting)}, running {self.on}")

    # ---- commands --------------------------------------------------------------------------------------------

    def do(self, command):
        match command:
            case Dispatch(engine=key, request_id=request_id):
                passed = list(takewhile(lambda other: other != request_id, self.waiting))
                assert all(map(self.may_be_passed, passed)), "first come, first dispatched, and only once"
                self.waiting.remove(request_id)
                self.on[request_id] = key
                self.up[key].lanes.add(self.requests[request_id])
            case Reject(request_id=request_id):
                self.waiting.remove(request_id)  # from anywhere: it may have waited in vain
                self.end(request_id, "rejected")
            case Fail(request_id=request_id):
                assert self.on.pop(request_id) not in self.up
                self.end(request_id, "failed")
            case Cancel(engine=key, request_id=request_id):
                assert self.on.pop(request_id) == key
                self.end(request_id, "cancelled")
                self.disconnect(self.up[key], request_id)
            case SetClock(engine=key, plan=plan):
                up = self.up[key]
                assert plan.mhz in up.spec.clocks_mhz
                up.set_mhz = up.read_mhz = plan.mhz
                self.switches.append((key, plan))
            case StartEngine(engine=key, tp=tp):
                assert key >= self.keys
                self.keys = key + 1
                self.starting[key] = tp
            case StopEngine(engine=key) if key in self.starting:
                del self.starting[key]
            case StopEngine(engine=key):
                assert key not in self.on.values()
                up = self.up.pop(key)
                assert len(up.batcher) == sum(len(up.lanes.open[request_id]) for request_id in up.disconnected)

    def may_be_passed(self, request_id: int) -> bool:
        """Where requests that cannot meet their SLO are rejected, one that expires holds up no other; nor does one that
        can wait, which may be held.
        """
        options, request = self.controller.options, self.requests[request_id]
        until_s = options.admission.patient_until_s(request, request.arrival_s)
        return request.slo.batch or (options.slo_aware and options.admission.rejects and until_s < math.inf)

    def disconnect(self, up: Up, request_id: int):
        """Between two iterations at once, during one at its end."""
        if up.in_progress:
            up.disconnected.append(request_id)
        else:
            up.lanes.cancel(request_id)

    def end(self, request_id: int, how: str):
        assert request_id not in self.ended
        self.ended[request_id] = how

    def go(self, up: Up):
        if not up.in_progress and up.batcher.begin() is not None:
            up.in_progress = True
            assert up.batcher.used_blocks <= up.spec.kv_blocks

    # ---- what must hold --------------------------------------------------------------------------------------

    def check(self):
        snapshot = self.controller.snapshot()
        assert snapshot.queue == len(self.waiting)
        assert (snapshot.head is None) == (not self.waiting)
        views = {view.engine: view for view in snapshot.engines}
        assert {key for key, view in views.items() if view.phase is not Phase.STARTING} == self.up.keys()
        assert {key for key, view in views.items() if view.phase is Phase.STARTING} == self.starting.keys()
        if self.options.pool is None:
            assert sum(view.phase is Phase.SERVING for view in views.values()) <= 1
        else:
            assert sum(view.tp for view in views.values()) <= self.options.pool.gpus
        for key, up in self.up.items():
            view = views[key]
            assert view.running + view.pending == sum(on == key for on in self.on.values())
            assert view.phase is Phase.SERVING or view.running + view.pending, "empty and not serving: to be stopped"
            self.check_clock(up, view)
        deadline_s = self.controller.next_deadline()
        assert deadline_s is None or math.isfinite(deadline_s)

    def check_clock(self, up: Up, view):
        """Whatever is not known, or under the paper's policy late already, means the top clock."""
        top = up.spec.clocks_mhz[-1]
        if view.plan is not None:
            assert view.plan.mhz in {up.set_mhz, up.read_mhz}
        if self.options.throttle.policy is ClockPolicy.TOP:
            assert up.set_mhz == top
        if self.options.throttle.policy not in PLANNING:
            return
        table = self.options.tables.get(view.tp)
        busy = view.running + view.pending
        projection = self.controller.projection(view.engine)
        late = view.lost_requests and self.options.throttle.policy is ClockPolicy.THROTTLLEM
        unknown = up.unknown or view.clock_mhz is None or (busy and (table is None or late))
        if busy and table is not None and projection is not None and projection.horizon:
            peaks = (projection.batch, projection.kv_blocks, projection.prefill_tokens)
            unknown = unknown or not table.inside(*(int(peak.max()) for peak in peaks))
        if unknown:
            assert up.set_mhz == top, view
            assert view.plan is not None and view.plan.why in {
                Reason.UNKNOWN_STATE,
                Reason.OUTSIDE_HULL,
                Reason.NO_TABLE,
                Reason.LOST_RUNNING,
                Reason.TABLE_DRIFT,
            }

    def check_end(self):
        """After `run_out`: everybody ended once, the counts agree, and a replay gives the same commands."""
        assert self.ended.keys() == self.requests.keys()
        counts = self.controller.snapshot().counts
        assert counts.arrived == len(self.requests)
        assert counts.finished == sum(how == "finished" for how in self.ended.values())
        assert counts.rejected == sum(how == "rejected" for how in self.ended.values())
        assert counts.failed == sum(how in {"failed", "cancelled"} for how in self.ended.values())
        again = Controller(self.fresh())
        for now_s, event, commands in self.log:
            if isinstance(event, HoldPlan):
                _plan_hold(again, event, now_s)
            else:
                assert again.handle(event, now_s) == commands
        assert again.snapshot() == self.controller.snapshot()


def _plan_hold(controller: Controller, plan: HoldPlan, now_s: float) -> None:
    gathering = controller.state().gathering
    gathering.plan, gathering.planned_at_s = plan, now_s
