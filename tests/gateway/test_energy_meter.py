"""The meter: whatever the counter rose by is somebody's, and the counter may be anybody's."""

import pytest
from core.toy import CLOCKS_MHZ, spec

from throttllem.gpu.device import Reading, Work
from throttllem.gpu.simulated import SimulatedGpu


class Counter:
    """A GPU whose counter somebody else drives."""

    joules = 1000.0

    def read(self):
        return Reading(clock_mhz=None, watts=1.0, energy_j=self.joules)

    def worked(self, work):
        pass

    def idled(self, seconds):
        pass


def step(rows, prefills=(), seconds=0.1, joules=None):
    tokens = sum(share for _, share in prefills)
    work = Work(
        seconds=seconds, decode_sequences=rows, kv_tokens=0, prefill_tokens=tokens, prefill_pairs=0.0, joules=joules
    )
    return Step(work=work, rows=rows, kv_blocks=0, prefills=prefills)


def test_what_the_counter_rose_by_before_is_not_ours():
    gpu = Counter()
    meter = EnergyMeter(gpu=gpu)
    meter.begin(spec())
    gpu.joules += 30.0
    meter.step(step(0, ((1, 10), (2, 20))))
    meter.joined(1, 1)
    meter.joined(2, 1)
    gpu.joules += 8.0
    meter.step(step(2))
    assert (meter.left(1), meter.left(2)) == (pytest.approx(14.0), pytest.approx(24.0))
    gpu.joules += 5.0
    meter.idle(1.0)
    gpu.joules += 99.0  # while the engine was down
    meter.begin(spec())
    energy = meter.energy()
    assert (energy.total_j, energy.idle_j, energy.top_j) == (43.0, 5.0, None)


def test_a_simulated_gpu_draws_by_the_work_it_is_told_of():
    gpu = SimulatedGpu(CLOCKS_MHZ, switch_latency_s=0.0, watts=lambda mhz, work: mhz / 10, idle_w=40.0)
    meter = EnergyMeter(gpu=gpu)
    meter.begin(spec())
    meter.joined(7, 3)
    meter.step(step(3, seconds=2.0))
    meter.step(step(3, seconds=1.0, joules=60.0))
    assert meter.energy().watts == 60.0
    meter.idle(0.0)
    meter.idle(1.5)
    assert meter.left(7) == pytest.approx(340.0)
    assert (meter.energy().total_j, meter.energy().idle_j, meter.energy().watts) == (400.0, 60.0, 40.0)


def test_who_never_ran_has_no_joules():
    meter = EnergyMeter(gpu=Counter())
    assert meter.left(1) is None
    meter.joined(1, 1)
    meter.paused(1)
    assert meter.left(1) == 0.0
