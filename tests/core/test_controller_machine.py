"""A state machine over the controller with real batchers under it: whatever comes, in whatever order, no request is
forgotten or starves, nothing overflows, and what is not known means the maximum clock. Profile "thorough" runs longer.
"""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.stories import hold_plan
from core.toy import CLOCKS_MHZ, spec, table
from core.world import World
from throttllem.core.clocks.policy import ClockPolicy, ThrottleOptions
from throttllem.core.clocks.sizing import AutoscaleOptions
from throttllem.core.lengths.online import OnlineLengthOptions, OnlineLengthPredictor
from throttllem.core.lengths.prediction import MaxTokens, Noisy, Oracle
from throttllem.core.options import AdmissionOptions, ControllerOptions, Unmeetable
from throttllem.core.types import Cancelled, Observed, Progressed, Request, ShuttingDown, Slo

SIZES = (1, 2, 4)
CONTEXT = 80
moments = st.sampled_from([0.0, 0.001, 0.02, 0.3, 2.0])
limits = st.none() | st.floats(0.02, 3.0)
sequences = st.sampled_from([1, 1, 1, 2, 3, 4])
slos = st.builds(Slo, e2e_s=limits, tbt_s=st.none() | st.floats(0.005, 0.1), ttft_s=limits, batch=st.booleans())


def tables(specs, kind):
    """The model of each size: whole, of a hull that is soon left, or none."""
    small = {"max_batch": 2, "max_kv_blocks": 8, "max_prefill_tokens": 24}
    return {} if kind == "none" else {tp: table(s, **(small if kind == "small" else {})) for tp, s in specs.items()}


SPECS = {
    (tp, chunked, no_evict): spec(
        tp=tp,
        kv_blocks=10 * tp,
        max_batch=2 + tp,
        max_context_tokens=CONTEXT,
        prefill_budget_tokens=16,
        chunked=chunked,
        no_evict=no_evict,
    )
    for tp in SIZES
    for chunked in (False, True)
    for no_evict in (False, True)
}
TABLES = {
    (chunked, no_evict, kind): tables({tp: SPECS[tp, chunked, no_evict] for tp in SIZES}, kind)
    for chunked in (False, True)
    for no_evict in (False, True)
    for kind in ("whole", "small", "none")
}
LEARNS = OnlineLengthPredictor(OnlineLengthOptions(exceed=0.5, prior_answers=1.0, own_level_answers=1))
"""Predicts after one output; every world has its own copy."""

options = st.builds(
    lambda policy, chunked, no_evict, kind, scales, predictor, queue, unmeetable, dwell_s, latency_s: ControllerOptions(
        throttle=ThrottleOptions(policy=policy, fixed_mhz=1000, dwell_s=dwell_s, switch_latency_s=latency_s),
        slo_aware=policy in {ClockPolicy.THROTTLLEM, ClockPolicy.LEAST_ENERGY},
        admission=AdmissionOptions(queue_limit=queue, unmeetable=unmeetable),
        autoscale=AutoscaleOptions(capacity_rps={1: 1.0, 2: 3.0, 4: 9.0}, interval_s=0.5, window_s=2.0, grace_s=1.0)
        if scales
        else None,
        predictor=predictor,
        specs={tp: SPECS[tp, chunked, no_evict] for tp in SIZES},
        tables=TABLES[chunked, no_evict, kind],
        load_window_s=2.0,
    ),
    policy=st.sampled_from(ClockPolicy),
    chunked=st.booleans(),
    no_evict=st.booleans(),
    kind=st.sampled_from(["whole", "whole", "small", "none"]),
    scales=st.booleans(),
    predictor=st.sampled_from([Oracle(), MaxTokens(), Noisy(p95_error=0.3), Noisy(p95_error=0.95, seed=3), LEARNS]),
    queue=st.sampled_from([2, 1000]),
    unmeetable=st.sampled_from(Unmeetable),
    dwell_s=st.sampled_from([0.0, 0.5]),
    latency_s=st.sampled_from([0.0, 0.2]),
)


class ControllerMachine(RuleBasedStateMachine):
    @initialize(options=options, tp=st.sampled_from(SIZES))
    def begin(self, options, tp):
        self.world = World(options)
        self.first_tp = tp

    def start(self, tp):
        return self.world.options.specs[tp]

    def pick(self, data, values):
        return data.draw(st.sampled_from(sorted(values)))

    # ---- requests --------------------------------------------------------------------------------------------

    @rule(
        prompt=st.integers(1, 50), output=st.integers(1, 20), margin=st.integers(0, 20), slo=slos, sequences=sequences
    )
    def arrive(self, prompt, output, margin, slo, sequences):
        self.world.arrive(
            Request(
                id=len(self.world.requests),
                arrival_s=self.world.now_s,
                prompt_tokens=prompt,
                max_tokens=output + margin,
                slo=slo,
                output_tokens=output,
                sequences=sequences,
            )
        )

    @precondition(lambda self: self.world.waiting or self.world.on)
    @rule(data=st.data())
    def disconnect(self, data):
        self.world.cancel(self.pick(data, [*self.world.waiting, *self.world.on]))

    @rule(request_id=st.integers(0, 20))
    def disconnect_of_an_unknown_client(self, request_id):
        """A request that ended already, or never arrived, is in no command; others may be admitted at any event."""
        world = self.world
        if request_id not in world.waiting and request_id not in world.on:
            commands = world.send(Cancelled(request_id=request_id))
            assert request_id not in [getattr(command, "request_id", None) for command in commands]

    # ---- engines ---------------------------------------------------------------------------------------------

    @precondition(lambda self: self.first_tp)
    @rule()
    def first_ready(self):
        """The first engine is started without a command; the controller learns of it when it is ready."""
        self.world.ready(self.world.keys, self.start(self.first_tp))
        self.first_tp = None

    @precondition(lambda self: self.world.starting)
    @rule(data=st.data())
    def ready(self, data):
        key = self.pick(data, self.world.starting)
        self.world.ready(key, self.start(self.world.starting[key]))

    @rule(tp=st.sampled_from(SIZES))
    def another_engine_appears(self, tp):
        if len(self.world.up) < 3:
            self.first_tp = None
            self.world.ready(self.world.keys, self.start(tp))

    @precondition(lambda self: self.world.up or self.world.starting)
    @rule(data=st.data())
    def lose(self, data):
        self.world.lose(self.pick(data, [*self.world.up, *self.world.starting]))

    @precondition(lambda self: any(up.in_progress for up in self.world.up.values()))
    @rule(data=st.data(), seconds=moments, times=st.integers(1, 12))
    def iterate(self, data, seconds, times):
        key = self.pick(data, [key for key, up in self.world.up.items() if up.in_progress])
        for _ in range(times):
            self.world.advance(seconds)
            if key in self.world.up and self.world.up[key].in_progress:
                self.world.end_iteration(key)

    # ---- what engines report -------------------------------------------------------------------------------

    @rule(engine=st.integers(0, 3), request_id=st.integers(0, 20), tokens=st.integers(-2, 60))
    def progressed(self, engine, request_id, tokens):
        """Whether it is so or not, of a request that is there or not."""
        self.world.send(Progressed(engine=engine, request_id=request_id, tokens=tokens))

    @rule(
        engine=st.integers(0, 3),
        running=st.integers(0, 8),
        waiting=st.integers(0, 8),
        kv_blocks=st.none() | st.integers(0, 50),
    )
    def observed(self, engine, running, waiting, kv_blocks):
        self.world.send(Observed(engine=engine, running=running, waiting=waiting, kv_blocks=kv_blocks))

    # ---- clocks and time -------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.switches)
    @rule(works=st.booleans())
    def switch(self, works):
        key, plan = self.world.switches.pop(0)
        self.world.read_clock(key, plan.mhz if works else None)

    @precondition(lambda self: self.world.up)
    @rule(data=st.data(), mhz=st.none() | st.sampled_from(CLOCKS_MHZ))
    def clock_is_not_what_was_asked(self, data, mhz):
        self.world.read_clock(self.pick(data, self.world.up), mhz)

    @rule(seconds=moments)
    def time_passes(self, seconds):
        self.world.advance(seconds)

    @rule(hold_s=st.floats(0.1, 5.0), start_s=st.floats(0.0, 0.5), token_s=st.floats(0.001, 0.1))
    def requests_that_can_wait_are_held(self, hold_s, start_s, token_s):
        """As if the load had called for it; it is planned again by the load itself."""
        hold_plan(self.world, hold_s=hold_s, start_s=start_s, token_s=token_s)

    @rule()
    def shuts_down(self):
        self.world.send(ShuttingDown())
        assert not self.world.controller.snapshot().held

    # ---- always ----------------------------------------------------------------------------------------------

    @invariant()
    def nothing_overflows(self):
        if not hasattr(self, "world"):
            return
        for up in self.world.up.values():
            assert up.batcher.used_blocks <= up.spec.kv_blocks
            assert not up.spec.no_evict or not up.batcher.preemptions

    def teardown(self):
        if hasattr(self, "world"):
            if self.first_tp:
                self.first_ready()
            self.world.run_out(self.start)
            self.world.check_end()


TestController = ControllerMachine.TestCase
