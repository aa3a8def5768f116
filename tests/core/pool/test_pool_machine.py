"""The controller's state machine over a pool: the same must hold whatever comes, engines never have more GPUs than the
pool, a loss fails only what ran there, and every start ends. Profile "thorough" runs longer.
"""

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from core.test_controller_machine import ControllerMachine, options
from core.world import World
from throttllem.core.pool.pool import PoolOptions
from throttllem.core.types import Fail

pools = st.sampled_from(
    [
        PoolOptions(gpus=3, engines={1: 3}),
        PoolOptions(gpus=4, engines={1: 2, 2: 1}),
        PoolOptions(gpus=8, engines={4: 1, 2: 1, 1: 2}),
        PoolOptions(gpus=9, engines={4: 2}),
    ]
)


class PoolMachine(ControllerMachine):
    @initialize(options=options, pool=pools)
    def begin(self, options, pool):
        self.world = World(replace(options, pool=pool))
        self.began_s = {}
        self.first_tp = max(pool.engines)
        self.first_ready()

    another_engine_appears = None
    """Nobody but the pool gives GPUs to engines."""

    @precondition(lambda self: self.world.up or self.world.starting)
    @rule(data=st.data())
    def lose(self, data):
        world = self.world
        key = self.pick(data, [*world.up, *world.starting])
        ran = {request for request, on in world.on.items() if on == key}
        commands = world.lose(key)
        assert {command.request_id for command in commands if isinstance(command, Fail)} == ran
        for request_id in sorted(ran):
            if data.draw(st.booleans(), label="had no byte"):
                world.come_back(request_id)
                assert world.on.get(request_id) != key

    @precondition(lambda self: self.world.starting)
    @rule(seconds=st.sampled_from([5.0, 25.0, 100.0]))
    def starts_hang(self, seconds):
        self.world.advance(seconds)

    @invariant()
    def every_start_ends(self):
        if not hasattr(self, "world"):
            return
        world = self.world
        self.began_s = {key: self.began_s.get(key, world.now_s) for key in world.starting}
        for began_s in self.began_s.values():
            assert world.now_s - began_s < 4 * 5.0 + 1e-6, "four times as long as an engine takes"

    @invariant()
    def engines_come_back(self):
        """Nothing is wanted without an engine that serves or starts, or a time at which one will."""
        if not hasattr(self, "world"):
            return
        up = self.world.up or self.world.starting
        assert up or self.world.controller.next_deadline() is not None


TestPool = PoolMachine.TestCase
