"""What nothing can go below: joules over the window that every schedule of clocks needs on a task, held back or not.

A bound, not an estimate: no run reaches it (docs/decisions.md says how far above the best known ones lie). Knows
nothing of how schedules are found.
"""

# Energy over the window is at least
#
#   idle watts x window + the sum over the iterations of their excess, (watts - idle watts) x seconds,
#
# since a GPU with a running engine never draws less than an idle one. What follows bounds the excess from below.
#
# 1. At a given clock, seconds and excess of an iteration are at least affine, with no negative coefficient, in what it
#    processes: 1 (the iteration), decoding sequences, their KV tokens, prompt tokens, query-key pairs. Of the law
#    (`physics/iterations.py`) all terms are affine but these: (m^p + a^p)^(1/p) >= u m + v a for u, v >= 0 with
#    u^q + v^q = 1, 1/p + 1/q = 1 (Hoelder); the experts read, 1 - missed^tokens, are concave in the tokens, so at least
#    the chord between 1 and the most tokens of an iteration; of costs that depend on whether a threshold is passed,
#    the smaller is taken; what is left of the walk, and what sliding windows read, are left out.
# 2. At the power limit an iteration takes the limit's watts and seconds that are interpolated between two clocks. The
#    excess is then a product of two affine functions of the place between them, one falling and one rising, so concave:
#    no less than at the better of the two clocks. It remains: the least over the clocks.
# 3. An iteration's own cost is shared equally by the requests in it, and each pays for its own tokens besides. Every
#    output token of a request comes from another iteration with the request in it: the first from its prompt, each
#    other one from a decoding step that reads its context, or, after a preemption, from a prompt at least as long.
#    A prompt in several chunks costs no less than in one: the least of affine functions that are not negative at 0 is
#    subadditive in the tokens.
# 4. Requests that meet an E2E SLO are in the system no longer than it. So an iteration with such a request in it has at
#    most N of them: those whose [arrival, arrival + SLO] overlap at one time in this request's, and those that may be
#    late (as many as need not meet their SLOs), and no more than a batch holds.
# 5. Those requests have an SLO's time for the iterations that they are in, and an iteration with n requests takes at
#    least that of 1, and n - 1 times that of the lightest further one. By weak duality, for any price of a second,
#    a request's share is at least the least of (joules + price x seconds) less price x the time that it has. Any price
#    gives a bound; the best of a few is taken. Each iteration may choose clock and n by itself for each request in it:
#    that they choose the same is left out, and so is most of what the bound lacks.
# 6. Which requests are late is not known: those whose bound falls most if they have no SLO.
#
# The bound is of the law without noise. Noise has a mean of 1 (to 0.1 %), and over the iterations of a run moves the
# energy by less than 0.1 %.

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from throttllem.arena.schedule import Floats, Ints, Task
from throttllem.core.types import EngineSpec
from throttllem.physics.engine import EnginePhysics
from throttllem.physics.iterations import Records

_HOELDER = (0.0, 0.2, 0.4, 0.6)
"""Values of v to try."""
_PRICES_W = (0.0, *np.geomspace(20.0, 20_000.0, 13).tolist())
"""Joules of a second, to try."""


class Affine(NamedTuple):
    """What an iteration takes at least, by clock (shape (clocks,)): in itself, and for each of what it processes."""

    iteration: Floats
    sequence: Floats
    kv_token: Floats
    prompt_token: Floats
    pair: Floats


def lower_bound_j(task: Task, spec: EngineSpec, physics: EnginePhysics) -> float:
    """Joules over the window that no run of this task goes below, with the clocks and holds of any plan."""
    requests = task.requests
    tokens = requests.prompt_tokens + requests.max_tokens
    fits = (tokens <= spec.max_context_tokens) & (-(-tokens // spec.block_tokens) <= spec.kv_blocks)
    late = requests.arrival_s.size - task.least_met
    prompts, outputs = requests.prompt_tokens[fits], requests.output_tokens[fits]
    most = np.full(prompts.size, float(spec.max_batch))
    e2e_s = task.slo.e2e_s
    together = most if e2e_s is None else at_most_together(requests.arrival_s[fits], e2e_s, late, most)
    law = physics.law()
    most_tokens = int(spec.prefill_budget_tokens + spec.max_batch + prompts.max(initial=0))
    best_j = 0.0
    for compute_share in _HOELDER:
        seconds, excess = affine(law.at[: law.clocks], physics.idle_w(), compute_share, most_tokens)
        free = Shares(seconds, excess, prompts, outputs, most)
        bound = Shares(seconds, excess, prompts, outputs, together)
        without_slo = free.joules(None, None, None)
        with_slo = np.maximum(without_slo, bound.joules(e2e_s, task.slo.tbt_s, task.slo.ttft_s))
        given_up = np.sort(with_slo - without_slo)[::-1][:late].sum()
        best_j = max(best_j, float(with_slo.sum() - given_up))
    return physics.idle_w() * task.window_s + best_j


def at_most_together(arrival_s: Floats, e2e_s: float, late: int, most: Floats) -> Floats:
    """How many requests can be in the system at one time of each request's SLO, shape (requests,)."""
    here = np.arange(arrival_s.size)
    count = here + 1 - np.searchsorted(arrival_s, arrival_s - e2e_s, side="left")
    last = np.searchsorted(arrival_s, arrival_s + e2e_s, side="right")
    together = np.array([count[first:end].max() for first, end in zip(here, last, strict=True)], dtype=np.float64)
    return np.minimum(together + late, most)


def affine(at: Records, idle_w: float, compute_share: float, most_tokens: int) -> tuple[Affine, Affine]:
    """Seconds and excess joules by clock; `compute_share` is Hoelder's v."""
    dual = at["norm"] / np.maximum(at["norm"] - 1.0, 1e-9)
    memory_share = (1.0 - compute_share**dual) ** (1.0 / dual)
    one = 1.0 - at["expert_missed"]
    all_read = 1.0 - at["expert_missed"] ** float(most_tokens)
    chord = (all_read - one) / (most_tokens - 1)
    message = np.minimum(at["one_step_token"], at["two_step_token"])
    zero = np.zeros(at.size)

    def parts(weights: int, sequences: int, kv_tokens: int, prompt_tokens: int, pairs: int) -> tuple[Floats, Floats]:
        tokens = sequences + prompt_tokens
        memory = at["weights"] * weights + at["token_gemm_memory"] * tokens
        compute = at["token_gemm_compute"] * tokens + at["head_token_compute"] * sequences
        streamed = at["token_streamed"] * tokens
        read = at["kv_token"] * kv_tokens + at["kv_sequence"] * sequences
        prompt, tensor = at["prefill_token"] * prompt_tokens, at["pair"] * pairs
        experts_memory = at["experts"] * ((one - chord) * weights + chord * tokens) + at["token_expert_memory"] * tokens
        experts_compute = at["token_expert_compute"] * tokens
        busy = memory_share * memory + compute_share * compute + streamed + read + prompt + tensor
        busy += at["prefill_walk_token"] * prompt_tokens + experts_memory + experts_compute
        busy += np.where(at["experts"] > 0, at["experts_kernel"], zero) * weights
        waiting = (at["fixed"] + np.minimum(at["decode_fixed"], at["prefill_fixed"])) * weights
        waiting += message * tokens + at["host_request"] * sequences
        traffic = at["gemm_traffic_w"] * (memory + streamed) + at["kv_traffic_w"] * read
        traffic += at["prompt_traffic_w"] * prompt + at["expert_traffic_w"] * experts_memory
        switched = at["core_w"] * busy + at["compute_w"] * (compute + tensor + experts_compute)
        switched += at["attention_w"] * read
        switched += at["gemm_unpack_w"] * memory + at["expert_unpack_w"] * experts_memory
        return busy + waiting, (at["base_w"] - idle_w) * (busy + waiting) + traffic + switched

    seconds, excess = zip(*(parts(*unit) for unit in np.eye(5, dtype=int).tolist()), strict=True)
    return Affine(*seconds), Affine(*excess)


class Shares:
    """What each request pays at least, if at most `together` requests share an iteration (shape (requests,))."""

    def __init__(self, seconds: Affine, excess: Affine, prompts: Ints, outputs: Ints, together: Floats) -> None:
        self._seconds, self._excess = seconds, excess
        self._prompts, self._outputs, self._together = prompts, outputs, together
        self._lightest = np.minimum(seconds.sequence + seconds.kv_token, seconds.prompt_token)

    def joules(self, e2e_s: float | None, tbt_s: float | None, ttft_s: float | None) -> Floats:
        """Joules of each request, which has these times (None: any) for all its iterations, those of its decoding steps
        (times their number) and those of its prompt.
        """
        decode, prompt = self._decode(0.0), self._prompt(0.0)
        whole, alone = decode + prompt, prompt.copy()
        for price_w in _PRICES_W[1:]:
            dearer_decode, dearer_prompt = self._decode(price_w), self._prompt(price_w)
            if e2e_s is not None:
                whole = np.maximum(whole, dearer_decode + dearer_prompt - price_w * e2e_s)
            if tbt_s is not None:
                decode = np.maximum(decode, dearer_decode - price_w * tbt_s * np.maximum(1, self._outputs - 1))
            if ttft_s is not None:
                alone = np.maximum(alone, dearer_prompt - price_w * ttft_s)
        found: Floats = np.maximum(whole, decode + alone)
        return found

    def _decode(self, price_w: float) -> Floats:
        """Of all its decoding steps: the mean of the first and the last one is no more than their mean, as the least of
        affine functions of the context is concave.
        """
        steps = self._outputs - 1
        first, last = self._step(self._prompts + 1, price_w), self._step(self._prompts + steps, price_w)
        paid: Floats = steps * (first + last) / 2
        return paid

    def _step(self, context: Ints, price_w: float) -> Floats:
        costs = [excess + price_w * seconds for excess, seconds in zip(self._excess, self._seconds, strict=True)]
        decoded = costs[1][None, :] + costs[2][None, :] * context[:, None]
        recomputed = costs[3][None, :] * context[:, None]
        least: Floats = (self._own(price_w) + np.minimum(decoded, recomputed)).min(axis=1)
        return least

    def _prompt(self, price_w: float) -> Floats:
        costs = [excess + price_w * seconds for excess, seconds in zip(self._excess, self._seconds, strict=True)]
        pairs = self._prompts.astype(np.float64) ** 2 / 2
        own = costs[3][None, :] * self._prompts[:, None] + costs[4][None, :] * pairs[:, None]
        least: Floats = (self._own(price_w) + own).min(axis=1)
        return least

    def _own(self, price_w: float) -> Floats:
        """A request's share of the iteration itself, at the number of requests where that is least."""
        excess, lightest = self._excess.iteration[None, :], self._lightest[None, :]
        together = self._together[:, None] * np.ones_like(excess)
        if price_w > 0:
            together = np.clip(np.sqrt(excess / np.maximum(price_w * lightest, 1e-12)), 1.0, together)
        shared: Floats = excess / together
        shared += price_w * (self._seconds.iteration[None, :] + (together - 1.0) * lightest)
        return shared
