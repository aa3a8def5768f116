"""The simulated engine's noise, on time and on power."""

import math
import statistics

from core.toy import SPEC, ToyPhysics

from throttllem.config import Noise
from throttllem.engines.simulated.engine import SimulatedEngine


def test_time_and_power_scatter_by_what_each_was_given():
    noise = Noise(time=0.02, power=0.2)
    noisy = SimulatedEngine(SPEC, ToyPhysics(spec=SPEC), clock_mhz=1400, seed=(1,), noise=noise)
    silent = SimulatedEngine(SPEC, ToyPhysics(spec=SPEC), clock_mhz=1400, seed=(1,), noise=Noise(time=0, power=0))
    logs = ([], [])
    for key in range(200):
        for engine in (noisy, silent):
            engine.batcher.add(key, prompt_tokens=4, output_tokens=10, max_tokens=10)
        for _ in range(10):
            (_, found_s, found_w), (_, true_s, true_w) = noisy.step(), silent.step()
            logs[0].append(math.log(found_s / true_s))
            logs[1].append(math.log(found_w / true_w))
            noisy.finish()
            silent.finish()
    # 2,000 draws: the standard error of a standard deviation is 1.6 % of it.
    assert abs(statistics.stdev(logs[0]) / noise.time - 1) < 0.08
    assert abs(statistics.stdev(logs[1]) / noise.power - 1) < 0.08
