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

_FEWEST_ENDED = 8
"""Outputs that must have ended before lengths are known well enough for a pace to rest on them."""
_PRICES_W = np.concatenate([[0.0], 1.25 ** np.arange(-8, 34)])
_COARSE = 6
"""Prices apart from one another in the first search."""
_RENEWED = 16
"""A pace is sought again once this part of the requests is new."""
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
    counts), the requests that had come by then, and the fraction of each class's requests that would have met their SLO
    at the maximum clock.
    """

    by_requests: Ints
    requests: int
    at_maximum: dict[str, float]


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
        slos_s = known[:, [Recent.E2E_S, Recent.TTFT_S, Recent.TBT_S]] * keep
        self._times = np.concatenate([known[:, [Recent.ARRIVAL_S]], slos_s], axis=1)
        columns = [Recent.PROMPT_TOKENS, Recent.OUTPUT_TOKENS, Recent.SEQUENCES, Recent.SLO_CLASS, Recent.CACHED_TOKENS]
        self._sizes = known[:, columns].astype(np.int64)
        budget = min(spec.prefill_budget_tokens, table.prefill_bin.size - 1)
        self._engine = (spec.block_tokens, spec.kv_blocks, budget, spec.max_batch, int(spec.chunked))
        self._external = (max(0, external.batch), max(0, external.kv_blocks))
        self._switching = (switching.latency_s, switching.dwell_s, switching.fewest_steps)
        self._table, self._idle_w = table, spec.idle_w
        classes = self._sizes[:, 3]
        requests = np.bincount(classes, minlength=1)
        self.maximum = np.full(1, table.seconds.shape[1] - 1, dtype=np.int64)
        self.allowed = requests
        self.maximum_j, violated, _ = self.replayed(self.maximum, math.inf)
        self.met = 1.0 - violated / np.maximum(requests, 1)
        asked = np.ones(requests.size)
        np.minimum.at(asked, classes, known[:, Recent.ATTAINMENT])
        self.allowed = violated + ((1.0 - asked) * (requests - violated)).astype(np.int64)

    def joules(self, by_requests: Ints, most_j: float) -> float | None:
        """Energy above idle at a pace; None if it violates more SLOs than are allowed. More than `most_j` of it, or of
        violations, is not replayed to the end.
        """
        found_j, violated, _ = self.replayed(by_requests, most_j)
        return None if (violated > self.allowed).any() else found_j

    def replayed(self, by_requests: Ints, most_j: float) -> tuple[float, Ints, int]:
        """Energy above idle, violations by class, and the most requests that there were at a time."""
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
        )


def known_well_enough(load: LoadEstimator) -> bool:
    """Whether a pace may rest on the recent requests."""
    return load.done >= _FEWEST_ENDED


def renewed(load: LoadEstimator, seen: int) -> bool:
    """Whether a good part of the recent requests came after the first `seen`."""
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
) -> Hindsight:
    """The pace of least energy that would have kept enough SLOs of recent `requests`, with `keep` of their times."""
    rehearsal = _Rehearsal(requests, table, spec, external, switching, keep)
    leave_per_s, watts = by_clock(states, np.ones_like(states.watts, dtype=np.bool_))
    rate = most_rate(load, states)
    best: tuple[float, int, Ints] = (rehearsal.maximum_j, 0, rehearsal.maximum)
    tried: set[int] = set()

    def attempt(index: int) -> None:
        nonlocal best
        if index in tried or not 0 <= index < _PRICES_W.size:
            return
        tried.add(index)
        column, _, _ = least_mean_watts(rate, leave_per_s, watts, states.prompt_s, spec.idle_w, float(_PRICES_W[index]))
        pace = np.concatenate([column[:1], column])
        low, high = 0, int(rehearsal.maximum[0])  # the maximum clock is enough
        while low < high:
            floor = (low + high) // 2
            by_requests = np.maximum(pace, floor)
            found_j = rehearsal.joules(by_requests, best[0])
            if found_j is None:
                low = floor + 1
                continue
            high = floor
            if found_j < best[0]:
                best = found_j, index, by_requests

    for index in range(0, _PRICES_W.size, _COARSE):
        attempt(index)
    for step in (_COARSE // 2, 1):
        before = -1
        while before != best[1]:
            before = best[1]
            attempt(before - step)
            attempt(before + step)
    _, _, most = rehearsal.replayed(best[2], math.inf)
    seen = best[2][np.minimum(np.arange(most + 1), best[2].size - 1)]
    met = {name: float(share) for name, share in zip(requests.classes, rehearsal.met, strict=False)}
    return Hindsight(by_requests=np.concatenate([seen, rehearsal.maximum]), requests=requests.seen, at_maximum=met)


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
) -> tuple[float, Ints, int]:
    """Energy above idle, joules, violations by class, and the most requests at a time; only so far, once energy or
    violations are more than is allowed.

    `times` (requests, 4): arrival and SLOs on E2E, TTFT and TBT, seconds. `sizes` (requests, 5): tokens of the prompt
    and of the output, sequences, class, tokens of the prompt that are cached. `engine`: block tokens, KV blocks,
    prefill budget, largest batch, chunked. `external`: sequences and KV blocks of others. `switching`: latency, dwell,
    fewest steps down.
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
            took_s, decode_s = now_s - times[k, 0], now_s - first_s[k]
            late = took_s > times[k, 1] or took_s - decode_s > times[k, 2]
            late |= decode_s > times[k, 3] * max(1, sizes[k, 1] - 1)
            if late:
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
