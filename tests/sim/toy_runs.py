"""Whole simulations on the toy engine, with everything that a test may want to look at afterwards."""

from dataclasses import dataclass, field, replace

from core.toy import ToyPhysics, spec, table

from throttllem.config import FaultOptions
from throttllem.core.clocks.policy import ClockPolicy, ThrottleOptions
from throttllem.core.clocks.sizing import AutoscaleOptions
from throttllem.core.controller import Controller
from throttllem.core.lengths.prediction import Oracle
from throttllem.core.options import AdmissionOptions, ControllerOptions
from throttllem.core.types import Request, Slo
from throttllem.engines.simulated.engine import Noise
from throttllem.sim.driver import Machine, Simulation
from throttllem.sim.recorder import Recorder

SIZES = (1, 2)
STARTUP_W, FREED_W, GPUS = 30.0, 20.0, 4
SILENT = Noise(time=0.0, power=0.0)
AWARE = (ClockPolicy.THROTTLLEM, ClockPolicy.LEAST_ENERGY)


@dataclass(frozen=True, kw_only=True)
class LoggedPhysics(ToyPhysics):
    """The toy's physics, with every iteration (clock, seconds, watts) written down."""

    log: list = field(default_factory=list)

    def iteration(self, clock_mhz, *load):
        seconds, watts = ToyPhysics.iteration(self, clock_mhz, *load)
        self.log.append((clock_mhz, seconds, watts))
        return seconds, watts


def specs_of(**changes):
    return {tp: spec(tp=tp, kv_blocks=40 * tp, idle_w=40.0 * tp, **changes) for tp in SIZES}


@dataclass
class Run:
    """One simulation that is over."""

    simulation: Simulation
    recorder: Recorder
    controller: Controller
    physics: dict
    log: list

    @property
    def lives(self):
        return self.recorder.lives

    def result(self, slo=None, **changes):
        whole = {
            "policy": "toy",
            "slo": slo or Slo(),
            "duration_s": self.simulation.now_s,
            "energy_j": self.simulation.energy_j,
            "idle_energy_j": self.simulation.idle_energy_j,
            "lost": self.controller.snapshot().counts.lost,
            "preemptions": self.simulation.preemptions,
        }
        return self.recorder.result(**whole | changes)


def simulate(
    requests,
    policy=ClockPolicy.TOP,
    *,
    tp=1,
    seed=1,
    noise=SILENT,
    scales=False,
    predictor=None,
    freed_w=None,
    switch_latency_s=0.05,
    queue_limit=10_000,
    specs=None,
    slower=1.0,
    own=None,
    shifts=(),
    load_window_s=2.0,
    pool=None,
    faults=None,
):
    specs = specs or specs_of()
    scale = AutoscaleOptions(capacity_rps={1: 4.0, 2: 9.0}, interval_s=1.0, window_s=2.0, grace_s=2.0)
    controller = Controller(
        ControllerOptions(
            throttle=ThrottleOptions(policy=policy, fixed_mhz=1000, switch_latency_s=switch_latency_s, dwell_s=0.1),
            slo_aware=policy in AWARE,
            admission=AdmissionOptions(queue_limit=queue_limit),
            autoscale=scale if scales else None,
            pool=pool,
            predictor=predictor or Oracle(),
            specs=specs,
            tables={tp: table(found) for tp, found in specs.items()},
            load_window_s=load_window_s,
        ),
        own=own,
    )
    physics = {tp: LoggedPhysics(spec=found, slower=slower) for tp, found in specs.items()}
    machine = Machine(
        specs={tp: replace(found, startup_s=1.0) for tp, found in specs.items()},
        physics=physics,
        switch_latency_s=switch_latency_s,
        startup_w=STARTUP_W,
        gpus=GPUS if pool is None else pool.gpus,
        freed_w=freed_w,
        faults=None if pool is None else faults or FaultOptions(),
        noise=noise,
        shifts=tuple(shifts),
    )
    log = []
    recorder = Recorder(bin_s=0.5, keep_lives=True)
    simulation = Simulation(
        controller, machine, recorder, seed=seed, watch=lambda now_s, event, out: log.append((now_s, event, out))
    )
    simulation.run(requests, tp)
    return Run(simulation, recorder, controller, physics, log)


def steady(rate, seconds, prompt=12, answer=16, slo=None, **changes):
    """A request every 1 / `rate` seconds."""
    return [
        Request(
            id=n,
            arrival_s=n / rate,
            prompt_tokens=prompt,
            max_tokens=changes.get("max_tokens", answer),
            slo=slo or Slo(e2e_s=2.0, tbt_s=0.1),
            output_tokens=answer,
        )
        for n in range(round(rate * seconds))
    ]
