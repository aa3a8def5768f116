"""Which pace would have served the last requests at the least energy, and kept as many of their SLOs as was asked.

They are replayed at each pace that comes into question, on an engine of the performance table. Knows nothing of the
requests at hand, nor of when they end: the clock controller checks those.
"""

# The theory. What an SLO needs of a pace (a clock for each number of requests) depends on how requests come: in bursts
# or evenly, with long prompts or short ones, near the engine's limit or far from it. No formula holds for all of that,
# but the requests of the last minutes show it, and an engine can be replayed a thousand times faster than it runs. So
# paces are compared by what they would have cost, and met, had they been in force.
#
# Candidates have two numbers. The *price* of a request in flight gives the pace of least mean power at which there are
# as few of them as that price buys (`request_chain`): all that is to be known about how a clock should follow the load.
# The *floor* is a lowest clock, for SLOs that bind an iteration or a prompt however few requests there are. Where one
# clock for all would be best, a floor alone is that. At each price the lowest floor is sought at which enough SLOs are
# kept, by bisection, and among the prices the cheapest pair.
#
# Enough is relative. Some requests violate their SLO at the maximum clock too; no clock can be held responsible for
# them. Of the others, a fraction 1 - attainment may.
#
# Between pairs that cost almost the same the one of the highest price is taken: it follows the load most, so it rests
# least on the load staying as it was. And few requests show too little of the tail: until 512 outputs have ended, part
# of every time is kept free.
#
# The replay. Requests are served first come first served; a prompt joins the batch as soon as batch and KV blocks
# allow, in chunks where the engine chunks. Iterations between two events are one step. A clock is in force after the
# switch latency, a lower one only after the dwell. Lengths of requests that run still are those expected.
#
# What was not seen is not known to be safe: with more requests in the system than the replay had at any time, the clock
# is the maximum.

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from throttllem.core.clocks.request_chain import Chain, by_clock, least_mean_watts, most_rate
from throttllem.core.clocks.steady_load import Load, LoadEstimator, Recent
from throttllem.core.compiled import compiled
from throttllem.core.external_load import ExternalLoad
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.types import EngineSpec

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Steps = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

_FEWEST_ENDED = 8
"""Outputs that must have ended before lengths are known well enough for a pace to rest on them."""
_ENOUGH_ENDED = 512
_CAUTION = 0.15
"""Part of every time that is kept free after `_FEWEST_ENDED`; less with the root of their number."""
_ALMOST = 1.005
_PRICES_W = np.concatenate([[0.0], 1.25 ** np.arange(-8, 34)])
_COARSE = 6
"""Prices apart from one another in the first search."""
_RENEWED = 16
_SOONEST_S = 10.0
"""A pace is sought again once this part of the requests is new; of `_ENOUGH_ENDED` or more not sooner than that."""
_MOST_STEPS = 64
"""Iterations that are taken for one; the KV blocks of its first count for all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Switching:
    """How clocks are switched: seconds until a clock is in force, shortest time at a clock before a lower one is set,
    fewest steps of profiled clocks for a lower one.
    """

    latency_s: float
    dwell_s: float
    fewest_steps: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hindsight:
    """The pace to go on with: the column of the clock for 0, 1, ... requests in the system (beyond its end the last
    counts), how many `requests` had come and `ended` by then, and how many of those that ended since the last search
    the maximum clock would have brought late, by class.
    """

    by_requests: Ints
    requests: int
    ended: int
    late_at_maximum: dict[str, int]


class _Rehearsal:
    """The recent requests on an engine, ready to be replayed at any pace."""

    def __init__(
        self,
        load: LoadEstimator,
        table: PerformanceTable,
        spec: EngineSpec,
        external: ExternalLoad,
        switching: Switching,
        keep: float,
    ) -> None:
        known = load.recent_requests()
        slos_s = known[:, [Recent.E2E_S, Recent.TTFT_S, Recent.TBT_S]]
        self._times = np.concatenate([known[:, [Recent.ARRIVAL_S]], slos_s], axis=1)
        columns = [Recent.PROMPT_TOKENS, Recent.OUTPUT_TOKENS, Recent.SEQUENCES, Recent.SLO_CLASS, Recent.CACHED_TOKENS]
        self._sizes = known[:, columns].astype(np.int64)
        budget = min(spec.prefill_budget_tokens, table.prefill_bin.size - 1)
        self._engine = (spec.block_tokens, spec.kv_blocks, budget, spec.max_batch, int(spec.chunked))
        self._external = (max(0, external.batch), max(0, external.kv_blocks))
        self._switching = (switching.latency_s, switching.dwell_s, switching.fewest_steps)
        self._table, self._idle_w = table, spec.idle_w
        self._ended = known[:, Recent.ENDED]
        classes = self._sizes[:, 3]
        requests = np.bincount(classes, minlength=1)
        self.maximum = np.full(1, table.seconds.shape[1] - 1, dtype=np.int64)
        self.allowed, self._took_s = requests, np.zeros((known.shape[0], 3))
        self.maximum_j, violated, _ = self.replayed(self.maximum, math.inf)
        # Kept free is what there is: where the maximum clock itself needs more, the SLO as it is.
        self._times[:, 1:] = np.where(self._took_s <= slos_s * keep, slos_s * keep, slos_s)
        self._late: Bools = np.any(self._took_s > slos_s, axis=1)
        self._took_s = np.zeros((0, 3))
        asked = np.ones(requests.size)
        np.minimum.at(asked, classes, known[:, Recent.ATTAINMENT])
        self.allowed = violated + ((1.0 - asked) * (requests - violated)).astype(np.int64)

    def late_at_maximum(self, before: int) -> Ints:
        """Of the requests that ended after the first `before`, those that the maximum clock would have brought late, by
        class. One that runs is not among them yet: nothing is owed for it that could be forgiven.
        """
        classes = self._sizes[:, 3][self._late & (self._ended > before)]
        return np.bincount(classes, minlength=self.allowed.size)

    def at_lowest_floor(self, pace: Ints, most_j: float) -> tuple[float, Ints]:
        """Energy above idle and the pace, with the lowest clock below which it goes nowhere that violates no more SLOs
        than are allowed. Infinite energy if that is more than `most_j`.
        """
        found, low, high = (math.inf, self.maximum), 0, int(self.maximum[0])
        while low < high:
            floor = (low + high) // 2
            by_requests = np.maximum(pace, floor)
            joules, violated, _ = self.replayed(by_requests, most_j)
            if (violated > self.allowed).any():
                low = floor + 1
                continue
            high = floor
            if joules <= min(most_j, found[0]):
                found = joules, by_requests
        return found

    def replayed(self, by_requests: Ints, most_j: float) -> tuple[float, Ints, int]:
        """Energy above idle, violations by class, and the most requests that there were at a time: to the end, unless
        there is more energy than `most_j` or more violations than allowed.
        """
        table = self._table
        return _replay(
            self._times,
            self._sizes,
            table.seconds,
            table.watts,
            *table.offsets,
            self._engine,
            self._external,
            self._switching,
            by_requests,
            self.allowed,
            self._idle_w,
            most_j,
            self._took_s,
        )


def known_well_enough(load: LoadEstimator) -> bool:
    """Whether a pace may rest on the recent requests."""
    return load.done >= _FEWEST_ENDED


def renewed(load: LoadEstimator, seen: int, age_s: float) -> bool:
    """Whether a good part of the recent requests came after the first `seen`, `age_s` ago; of many not at once."""
    if len(load.recent) >= _ENOUGH_ENDED and age_s < _SOONEST_S:
        return False
    return load.seen - seen >= max(_FEWEST_ENDED // 2, len(load.recent) // _RENEWED)


def pace_in_hindsight(
    requests: LoadEstimator,
    load: Load,
    states: Chain,
    table: PerformanceTable,
    spec: EngineSpec,
    *,
    external: ExternalLoad,
    switching: Switching,
    keep: float,
    ended_before: int = 0,
) -> Hindsight:
    """The pace of least energy that would have kept enough SLOs of recent `requests`, with `keep` of their times.

    `ended_before`: how many had ended by the last search.
    """
    ended = min(requests.done, _ENOUGH_ENDED)
    keep -= _CAUTION * (math.sqrt(_FEWEST_ENDED / ended) - math.sqrt(_FEWEST_ENDED / _ENOUGH_ENDED))
    rehearsal = _Rehearsal(requests, table, spec, external, switching, keep)
    leave_per_s, watts = by_clock(states, np.ones_like(states.watts, dtype=np.bool_))
    rate = most_rate(load, states)
    # Energy and pace by the index of the price; the maximum clock, which is always enough, before all prices.
    found = {-1: (rehearsal.maximum_j, rehearsal.maximum)}

    def least() -> int:
        return min(found, key=lambda index: found[index][0])

    def attempt(index: int) -> None:
        if index not in found and 0 <= index < _PRICES_W.size:
            price_w = float(_PRICES_W[index])
            column, _, _ = least_mean_watts(rate, leave_per_s, watts, states.prompt_s, spec.idle_w, price_w)
            pace = np.concatenate([column[:1], column])
            found[index] = rehearsal.at_lowest_floor(pace, _ALMOST * found[least()][0])

    for index in range(0, _PRICES_W.size, _COARSE):
        attempt(index)
    for step in (_COARSE // 2, 1):
        before, best = -2, least()
        while before != best:
            before = best
            attempt(before - step)
            attempt(before + step)
            best = least()
    enough_j = _ALMOST * found[least()][0]
    by_requests = found[max(index for index, (here_j, _) in found.items() if here_j <= enough_j)][1]
    _, _, most = rehearsal.replayed(by_requests, math.inf)
    seen = by_requests[np.minimum(np.arange(most + 1), by_requests.size - 1)]
    late = rehearsal.late_at_maximum(ended_before).tolist()
    return Hindsight(
        by_requests=np.concatenate([seen, rehearsal.maximum]),
        requests=requests.seen,
        ended=requests.done,
        late_at_maximum=dict(zip(requests.classes, late, strict=False)),
    )


@compiled
def _replay(
    times: Floats,
    sizes: Ints,
    seconds: Steps,
    watts: Steps,
    batch_offset: Ints,
    kv_offset: Ints,
    prefill_offset: Ints,
    engine: tuple[int, int, int, int, int],
    external: tuple[int, int],
    switching: tuple[float, float, int],
    by_requests: Ints,
    allowed: Ints,
    idle_w: float,
    most_j: float,
    took_s: Floats,
) -> tuple[float, Ints, int]:
    """Energy above idle, joules, violations by class, and the most requests at a time; only so far, once energy or
    violations are more than is allowed.

    `times` (requests, 4): arrival and SLOs on E2E, TTFT and TBT, seconds. `sizes` (requests, 5): tokens of the prompt
    and of the output, sequences, class, tokens of the prompt that are cached. `engine`: block tokens, KV blocks,
    prefill budget, largest batch, chunked. `external`: sequences and KV blocks of others. `switching`: latency, dwell,
    fewest steps down. `took_s` (requests, 3), or of length 0: filled with E2E, TTFT and TBT.
    """
    block, capacity, budget, max_batch, chunked = engine
    latency_s, dwell_s, fewest_steps = switching
    requests, top = times.shape[0], by_requests.size - 1
    violated = np.zeros(allowed.size, dtype=np.int64)
    running, left = np.zeros(max_batch, dtype=np.int64), np.zeros(max_batch, dtype=np.int64)
    first_s = np.zeros(requests)
    came = begun = done = count = most = 0  # requests that arrived, had their prompt taken, ended; that run
    prompt_left, held_tokens, batch = 0, 0, 0
    now_s, joules = times[0, 0], 0.0
    column = target = by_requests[min(1, top)]
    set_s, force_s = -np.inf, np.inf
    while done < requests and joules <= most_j:
        while came < requests and times[came, 0] <= now_s:
            came += 1
        if count == 0 and begun == came:
            now_s = times[came, 0]
            continue
        # ---- the clock
        most = max(most, came - done)
        wanted = by_requests[min(came - done, top)]
        if wanted > target or (target - wanted >= fewest_steps and now_s >= set_s + dwell_s):
            if wanted > column:
                force_s = now_s + latency_s
            else:
                column, force_s = wanted, np.inf
            target, set_s = wanted, now_s
        if now_s >= force_s:
            column, force_s = target, np.inf
        # ---- prompts that join this iteration
        room = budget - batch if chunked else budget
        prompts, joined = 0, 0
        while begun < came and count < max_batch and prompts < room:
            more = sizes[begun, 2]
            if prompt_left == 0:
                blocks = (held_tokens + sizes[begun, 0]) / block + 0.5 * (batch + more)
                if count > 0 and (batch + more > max_batch or blocks + external[1] > capacity):
                    break
                computed = sizes[begun, 0] - sizes[begun, 4]
                if not chunked and prompts > 0 and prompts + computed > room:
                    break
                prompt_left = computed
                held_tokens += sizes[begun, 4]
            part = min(prompt_left, room - prompts) if chunked else prompt_left
            prompts += part
            held_tokens += part
            prompt_left -= part
            if prompt_left > 0:
                break
            running[count], left[count] = begun, sizes[begun, 1]
            count += 1
            joined += 1
            batch += more
            begun += 1
        # ---- the iteration, and as many like it as nothing interrupts
        kv_blocks = int(held_tokens / block + 0.5 * batch) + external[1]
        cell = (
            prefill_offset[min(prompts, prefill_offset.size - 1)]
            + batch_offset[min(batch + external[0], batch_offset.size - 1)]
            + kv_offset[min(kv_blocks, kv_offset.size - 1)]
        )
        step_s = float(seconds[cell, column])
        steps = 1
        if prompts == 0:
            steps = _MOST_STEPS
            for i in range(count):
                steps = min(steps, left[i])
            until_s = min(times[came, 0] if came < requests else np.inf, force_s)
            if target - wanted >= fewest_steps:
                until_s = min(until_s, set_s + dwell_s)
            if until_s < now_s + steps * step_s:
                steps = max(1, math.ceil((until_s - now_s) / step_s))
        now_s += steps * step_s
        joules += steps * step_s * (watts[cell, column] - idle_w)
        for i in range(count - joined, count):
            first_s[running[i]] = now_s
        # ---- what ends
        held_tokens += batch * steps
        i = 0
        while i < count:
            left[i] -= steps
            if left[i] > 0:
                i += 1
                continue
            k = running[i]
            e2e_s, ttft_s = now_s - times[k, 0], first_s[k] - times[k, 0]
            tbt_s = (now_s - first_s[k]) / max(1, sizes[k, 1] - 1)
            if took_s.size:
                took_s[k, 0], took_s[k, 1], took_s[k, 2] = e2e_s, ttft_s, tbt_s
            if e2e_s > times[k, 1] or ttft_s > times[k, 2] or tbt_s > times[k, 3]:
                violated[sizes[k, 3]] += 1
                if violated[sizes[k, 3]] > allowed[sizes[k, 3]]:
                    return joules, violated, most
            held_tokens -= sizes[k, 0] + sizes[k, 1] * sizes[k, 2]
            batch -= sizes[k, 2]
            done += 1
            count -= 1
            running[i], left[i] = running[count], left[count]
        held_tokens = max(held_tokens, 0)
    return joules, violated, most
