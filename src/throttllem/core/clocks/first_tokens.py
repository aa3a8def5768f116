"""At which clocks first tokens come in time: the recent requests, replayed at each clock.

Knows nothing of the requests at hand.
"""

# The theory. An engine takes prompts first come first served, so a request waits for the prompts before its own:
# Lindley's recursion, wait(k + 1) = max(0, wait(k) + seconds(k) - gap(k)), with the arrivals and prompts that there
# were, needs no assumption on how either is distributed. Seconds are those of iterations that hold the prompt and the
# decoding sequences of the mean batch. A request that would be late at the clock in force has the maximum clock set
# when it arrives, which its prompt sees if it begins after the switch; an iteration under way is not shortened.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from throttllem.core.compiled import compiled
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.types import EngineSpec

Floats = npt.NDArray[np.float64]


def late_first_tokens(
    recent: Sequence[tuple[int, float, int, float, float, float]],
    table: PerformanceTable,
    spec: EngineSpec,
    *,
    batch: int,
    kv_blocks: int,
    keep: float,
    switch_latency_s: float,
) -> Floats:
    """Fraction of the recent requests whose first token would come after `keep` of its TTFT SLO, shape (clocks,).

    `batch` and `kv_blocks`: what decodes beside the prompts.
    """
    _, _, prompt_tokens, ttft_s, arrival_s, _ = np.array(recent, dtype=np.float64).T
    largest = table.prefill_bin.size - 1
    if spec.chunked:
        largest = min(largest, max(1, spec.prefill_budget_tokens - batch))
    chunks, rest = np.divmod(prompt_tokens.astype(np.int64), largest)
    same = np.full(rest.size, batch), np.full(rest.size, kv_blocks)
    last_s = table.seconds[table.cells(*same, rest)] * (rest > 0)[:, None]
    whole_s = table.seconds[table.cell(batch, kv_blocks, largest)]
    prompt_s = (chunks[:, None] * whole_s + last_s).astype(np.float64)
    step_s = table.seconds[table.cell(batch, kv_blocks, 0)].astype(np.float64)
    return _late(arrival_s, prompt_s, step_s, ttft_s * keep, switch_latency_s)


@compiled
def _late(arrival_s: Floats, prompt_s: Floats, step_s: Floats, ttft_s: Floats, switch_latency_s: float) -> Floats:
    requests, clocks = prompt_s.shape
    late = np.zeros(clocks)
    for c in range(clocks):
        free_s = arrival_s[0] - 1.0
        for k in range(requests):
            begins_s = max(free_s, arrival_s[k] + step_s[c])
            took_s = prompt_s[k, c]
            if begins_s + took_s > arrival_s[k] + ttft_s[k] and begins_s >= arrival_s[k] + switch_latency_s:
                took_s = prompt_s[k, clocks - 1]
            free_s = begins_s + took_s
            late[c] += free_s > arrival_s[k] + ttft_s[k]
    late /= requests
    return late
