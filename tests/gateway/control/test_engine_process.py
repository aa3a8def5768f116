"""An engine's process beside its backend: started, late, crashed, drained, stopped, in virtual time."""

import asyncio

from launchers.fake import FakeLauncher

from gateway.rig import outcome, rig, virtually
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.clocks.sizing import AutoscaleOptions
from throttllem.core.types import EngineLost, StopEngine
from throttllem.gateway.telemetry.status import gateway_status


class Launched(FakeLauncher):
    """Its engines answer `after_s` their start, and are gone when their process is. `loop` is set by the test."""

    def __init__(self, after_s=2.0):
        super().__init__(self._begun, self._gone)
        self.after_s, self.loop = after_s, None

    def _engine(self, engine_id):
        return next(one.engine for one in self.loop.backends if one.process.engine_id == engine_id)

    def _begun(self, engine_id):
        asyncio.get_running_loop().call_later(self.after_s, setattr, self._engine(engine_id), "gone", False)

    def _gone(self, engine_id):
        self._engine(engine_id).gone = True


def launching(launcher, **more):
    """A rig whose engines are down until the launcher starts them."""
    running = rig(launcher=launcher, **more)

    class Begun:
        async def __aenter__(self):
            it = await running.__aenter__()
            launcher.loop = it.loop
            for backend in it.loop.backends:
                backend.engine.gone = not launcher.running
            return it

        async def __aexit__(self, *error):
            await running.__aexit__(*error)

    return Begun()


def test_an_engine_that_is_not_there_is_started_and_stopped_with_the_gateway():
    async def run():
        launcher = Launched()
        async with launching(launcher) as it:
            await it.up()
            served = await outcome(it.request(tokens=4))
            status = gateway_status(it.models).models[0].engines[0]
            assert "started by the gateway (run 1)" in status.notes[0]
            assert (status.starts, status.process_failures) == (1, 0)
        return launcher, served

    launcher, served = virtually(run())
    assert (launcher.starts, launcher.stops, launcher.running, served) == (["toy-1"], ["toy-1"], {}, "served")


def test_one_that_shall_keep_running_is_left_and_the_next_gateway_starts_none():
    async def run():
        launcher = Launched()
        for _ in range(2):
            async with launching(launcher) as it:
                it.backend.process.keep_running = True
                await it.up()
        return launcher

    launcher = virtually(run())
    assert (launcher.starts, launcher.stops, list(launcher.running)) == (["toy-1"], [], ["toy-1"])


def test_a_crash_fails_what_ran_and_starts_the_engine_again_for_what_waits():
    async def run():
        launcher = Launched()
        async with launching(launcher) as it:
            await it.up()
            await asyncio.sleep(100.0)
            running = asyncio.ensure_future(outcome(it.request(tokens=4000)))
            await asyncio.sleep(0.2)
            launcher.end("toy-1", "process 4711 ended by signal SIGKILL")
            await asyncio.sleep(0.01)
            waits = asyncio.ensure_future(outcome(it.request(tokens=4)))
            lost = it.seen.events(EngineLost)
            await asyncio.sleep(0.5)
            pausing = it.backend.trouble
            ends = await running, await waits
            return launcher.starts, lost, pausing, ends, it.backend.process.failures

    starts, lost, pausing, ends, failures = virtually(run())
    assert (len(starts), len(lost), failures) == (2, 1, 1)
    assert "SIGKILL" in pausing
    assert "it is started again in 1 s" in pausing or "in 0 s" in pausing
    assert ends[1] == "served" != ends[0]


def test_pauses_between_starts_that_fail_grow_to_a_minute(caplog):
    async def run():
        launcher = Launched()
        launcher.refuses = "vllm cannot be started: No such file or directory"
        async with launching(launcher) as it:
            await asyncio.sleep(600.0)
            tries, trouble = it.backend.process.failures, it.backend.trouble
            launcher.refuses = None
            await it.up()
        return tries, trouble

    tries, trouble = virtually(run())
    assert 12 <= tries <= 16  # 1 + 2 + ... + 32 s, then one a minute
    assert "No such file" in trouble


def test_an_engine_that_is_not_ready_in_time_is_stopped_and_started_again():
    async def run():
        launcher = Launched(after_s=1e6)
        async with launching(launcher) as it:
            await asyncio.sleep(29.0)
            assert launcher.stops == []
            await asyncio.sleep(6.0)
            trouble = it.backend.process._trouble
            launcher.after_s = 1.0
            await asyncio.sleep(60.0)
            return launcher.starts, launcher.stops, trouble, it.backend.state

    starts, stops, trouble, state = virtually(run())
    assert (starts[:2], stops[0], state) == (["toy-1", "toy-1"], "toy-1", "up")
    assert "not ready within 30 s" in trouble


def test_one_that_hangs_gets_the_same_time_to_come_back():
    async def run():
        launcher = Launched()
        async with launching(launcher) as it:
            await it.up()
            await it.backend.engine.kill(back=False)
            await asyncio.sleep(25.0)
            assert launcher.stops == []
            await asyncio.sleep(15.0)
            return list(launcher.starts), list(launcher.stops)

    assert virtually(run()) == (["toy-1", "toy-1"], ["toy-1"])


def test_sizes_are_processes_and_one_is_stopped_only_when_it_is_empty():
    scale = AutoscaleOptions(capacity_rps={1: 4.0, 2: 400.0}, interval_s=0.2, window_s=0.5, grace_s=1.0)
    held = []

    class Watching(Launched):
        async def stop(self, engine_id):
            backend = next(one for one in self.loop.backends if one.process.engine_id == engine_id)
            held.append((backend.in_flight, backend.uncontrolled_requests, backend.calls))
            await super().stop(engine_id)

    async def run():
        launcher = Watching(after_s=0.3)
        async with launching(launcher, policy=ClockPolicy.THROTTLLEM, sizes=(1, 2), core={"autoscale": scale}) as it:
            await it.up()
            requests = []
            for gap_s, count in ((0.02, 50), (0.5, 9), (0.02, 50), (0.5, 9)):
                for _ in range(count):
                    requests.append(asyncio.ensure_future(outcome(it.request(tokens=6))))
                    await asyncio.sleep(gap_s)
            ends = await asyncio.gather(*requests)
            return ends, it.seen.commands(StopEngine), list(launcher.starts), list(launcher.stops)

    ends, commands, starts, stops = virtually(run())
    assert set(ends) == {"served"}
    assert len(starts) >= 3
    assert len(stops) >= len(commands) - 1 >= 1
    assert set(held) == {(0, 0, 0)}


def test_a_drained_engine_waits_for_requests_without_control():
    async def run():
        launcher = Launched()
        async with launching(launcher) as it:
            await it.up()
            with it.backend.uncontrolled():
                it.backend.retire()
                await asyncio.sleep(30.0)
                assert launcher.stops == []
            await asyncio.sleep(0.2)
            return launcher.stops

    assert virtually(run()) == ["toy-1"]


def test_after_a_restart_the_size_that_runs_goes_on_and_others_are_stopped():
    async def run(core, running):
        launcher = Launched()
        async with launching(launcher, sizes=(1, 2), core=core, policy=ClockPolicy.THROTTLLEM) as it:
            for backend in it.loop.backends:
                await backend.stop()
            for backend in it.loop.backends:
                if backend.tp in running:
                    await launcher.launch(backend.process.command())
            await asyncio.sleep(3.0)
            launcher.starts.clear()
            launcher.stops.clear()
            await it.loop.start()
            await asyncio.sleep(5.0)
            return (
                list(launcher.starts),
                list(launcher.stops),
                [one.tp for one in it.loop.backends if one.key is not None],
            )

    scale = {"autoscale": AutoscaleOptions(capacity_rps={1: 4.0, 2: 400.0}, interval_s=1e3)}
    assert virtually(run(scale, {1})) == ([], [], [1])
    assert virtually(run(scale, {1, 2})) == ([], ["toy-1"], [2])
    assert virtually(run({}, {1})) == (["toy-2"], ["toy-1"], [2])
