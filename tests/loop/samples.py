"""Runs as they could have been, for what is made of them."""

from dataclasses import replace

import numpy as np

from tools.loop.outcome import Cost, Figures, Found, Run, Trust
from tools.loop.plan import BASELINE, OURS, Plan
from tools.loop.readings import Answered, Meter, Steps
from tools.loop.runs import Recorded
from tools.testbed.trace import Sent

PLAN = Plan(seconds=10.0, e2e_s=5.0, rounds=3)
SENT = [Sent(at_s=float(second), prompt_tokens=1000, output_tokens=50) for second in range(10)]
FIGURES = Figures(
    energy_j=4000.0,
    tokens_per_j=1.5,
    ttft_p50_s=0.1,
    ttft_p99_s=0.3,
    itl_mean_s=0.02,
    e2e_p50_s=2.0,
    e2e_p99_s=4.0,
    attainment=1.0,
    clock_mhz=1410.0,
)
COST = Cost(
    commands=9,
    command_p50_s=0.002,
    command_p99_s=0.009,
    decisions=2000,
    decision_p50_s=0.00006,
    decision_p99_s=0.002,
    gateway_share=0.1,
    keeper_share=0.01,
)
TRUST = Trust(
    steps=500,
    overruns=0.002,
    real_share=0.3,
    host_share=0.2,
    hook_j=3900.0,
    aiperf_j=3950.0,
    freed_s=0.001,
    load=1.0,
    quiet=True,
)
SAVED = {"triton": 1.0, "throttllem": 0.7, "least-energy": 0.75}


def answered(sent_s=100.0, *, tokens=50, ttft_s=0.1, e2e_s=1.0, itl_s=0.02):
    return Answered(sent_s=sent_s, prompt_tokens=1000, tokens=tokens, ttft_s=ttft_s, e2e_s=e2e_s, itl_s=itl_s)


def run(policy=BASELINE, number=0, *, clocks="on", energy=1.0, predicted=None):
    return Run(
        policy=policy,
        clocks=clocks,
        round=number,
        requests=10,
        answered=10,
        began_s=100.0,
        figures=replace(FIGURES, energy_j=4000.0 * SAVED[policy] * energy),
        cost=COST,
        trust=TRUST,
        predicted=predicted,
    )


def found():
    runs = [run(policy, number, energy=1 + 0.01 * number) for number in range(3) for policy in PLAN.policies]
    runs.append(run(OURS, clocks="dry-run", predicted=0.3))
    simulated = {policy: replace(FIGURES, energy_j=4000.0 * share) for policy, share in SAVED.items()}
    return Found(plan=PLAN, sent=SENT, runs=runs, simulated=simulated, informed=simulated)


def meter(watts=300.0, seconds=20, clocks=(1410, 1050)):
    at_s = 100.0 + np.arange(seconds + 1.0)
    return Meter(
        at_s=at_s,
        energy_j=watts * (at_s - 100.0),
        clock_mhz=np.resize(np.array(clocks, dtype=float), at_s.size),
        gateway_s=0.1 * (at_s - 100.0),
        keeper_s=0.01 * (at_s - 100.0),
    )


def steps(watts=300.0, seconds=14, clock_mhz=1050.0):
    ended_s = 100.0 + np.arange(1.0, seconds + 1)
    ones = np.ones(seconds)
    return Steps(
        began_s=ended_s - 1,
        ended_s=ended_s,
        waited_s=0.2 * ones,
        real_s=0.3 * ones,
        over=np.array([1.0, *[0.0] * (seconds - 1)]),
        clock_mhz=clock_mhz * ones,
        rows=8 * ones,
        prefill_tokens=0 * ones,
        joules=watts * ones,
    )


def recorded(policy=BASELINE, **fields):
    of = replace(run(policy), trust=replace(TRUST, hook_j=4200.0))
    counted = replace(of.figures, energy_j=300.0 * PLAN.window_s)
    return Recorded(run=replace(of, figures=counted, **fields), meter=meter(), steps=steps())
