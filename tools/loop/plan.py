"""What is run, fixed before it: GPU, model, engine, load, SLOs, clocks. The load as requests. Starts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from throttllem.physics.catalogue import Catalogue
from throttllem.physics.engine import EnginePhysics
from throttllem.sim.traces.trace import load_trace
from tools.testbed.trace import Sent

KIND, MODEL, TP = "a100-40gb-sxm", "llama-3-8b", 1
POLICIES = ("triton", "throttllem", "least-energy")
BASELINE, OURS = POLICIES[0], POLICIES[-1]
CONTEXT_TOKENS = 4096
LONGEST_TOKENS = CONTEXT_TOKENS - 64
"""Prompt and answer of a request of the load: the client's prompts come out a few tokens longer or shorter."""
BLOCK_TOKENS, MAX_BATCH, BUDGET_TOKENS = 32, 64, 2048
"""The least block that vLLM's CPU attention takes; batch and token budget are what both engines are given."""
SWITCH_S = 0.005
"""About the median switch of the fake GPU."""
CAPACITY_RPS = 5.98
"""What `throttllem characterize` finds for this engine under an hour of this load; its p99 E2E there is 23.8 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`rate_rps` of the generator, of which some requests are too long for the context (9 %); `seconds` of the load.

    With 3.6/s, 3.3/s are left: 55 % of the capacity. `e2e_s` is the p99 E2E at the capacity, rounded up; `tbt_s` the
    paper's. Energy is counted for `window_s` from the first request on. `clocks_mhz` are profiled for `profile_s`, and
    no lower one is used.
    """

    rate_rps: float = 3.6
    seconds: float = 110.0
    seed: int = 1
    e2e_s: float = 24.0
    tbt_s: float = 0.2
    clocks_mhz: tuple[int, ...] = (1410, 1290, 1170, 1050, 930, 810, 690, 570)
    profile_s: float = 480.0
    rounds: int = 3
    policies: tuple[str, ...] = POLICIES
    dry_run: bool = True

    @property
    def window_s(self) -> float:
        """The same for every run: the last request may take as long as its SLO allows."""
        return self.seconds + self.e2e_s

    @property
    def lowest_mhz(self) -> int:
        """The lowest clock that may be set."""
        return min(self.clocks_mhz)


QUICK = Plan(
    seconds=20.0, e2e_s=12.0, clocks_mhz=(1410, 990, 570), profile_s=40.0, rounds=1, policies=(OURS,), dry_run=False
)


def load(plan: Plan) -> list[Sent]:
    """The requests: a generator's, without those that the context has no room for."""
    made = load_trace(f"azure-conv-like:seconds={plan.seconds:g},rate={plan.rate_rps:g},seed={plan.seed}")
    rows = zip(*(column.tolist() for column in made.arrays), strict=True)
    fitting = [row for row in rows if row[1] + row[2] <= LONGEST_TOKENS]
    first_s = fitting[0][0]
    return [Sent(at_s=at_s - first_s, prompt_tokens=prompt, output_tokens=answer) for at_s, prompt, answer in fitting]


def words(sent: Sequence[Sent]) -> str:
    """A load in words."""
    count, seconds = len(sent), sent[-1].at_s
    prompt, answer = sum(each.prompt_tokens for each in sent), sum(each.output_tokens for each in sent)
    return (
        f"{count} requests in {seconds:.0f} s ({count / seconds:.2f}/s), prompts of {prompt / count:.0f} and answers "
        f"of {answer / count:.0f} tokens on average"
    )


def physics() -> EnginePhysics:
    """The law that the engine follows."""
    catalogue = Catalogue.load(None)
    return EnginePhysics(catalogue.gpu(KIND), catalogue.model(MODEL), TP)


def kv_blocks() -> int:
    """What the modelled GPU has room for."""
    return physics().kv_capacity_tokens() // BLOCK_TOKENS
