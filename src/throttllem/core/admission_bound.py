"""A bound that lets most requests in without a projection: nobody leaves, and every iteration is as slow as it can be.

Whoever passes here would pass the projection too; who does not may still.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.scoreboard import Scoreboard
from throttllem.core.sequence_state import SequenceState
from throttllem.core.types import EngineSpec

_ROUNDING = 1 + 1e-6
"""The projection adds up and compares in other orders and in single precision."""


def surely_fits(
    board: Scoreboard,
    spec: EngineSpec,
    table: PerformanceTable,
    newcomer: SequenceState,
    *,
    first: int,
    base_s: float,
    delay_s: float,
    margin: float,
) -> bool:
    """Would `admission.admit` find KV and every promise kept, even if nobody left until all are done? O(rows), in a
    few array operations. Rows of several sequences are left to the projection.
    """
    if board.multi_sequence or newcomer.sequences > 1 or newcomer.lost:
        return False
    batch, kept = len(board) + 1 + max(0, board.others.batch), 1.0 - margin
    if newcomer.remaining_tokens * table.slowest_s(batch, 0, 0) > (newcomer.deadline_s() - base_s) * kept:
        return False  # most that fail, fail here
    waiting = [*board.pending.values(), newcomer]
    room = spec.prefill_budget_tokens - batch
    left = np.maximum(board.end - first, 1)
    kv_blocks = _kv_blocks(board, waiting, left + (board.tokens_at_start + (first - board.start)), spec.block_tokens)
    prompts = sum(row.prefill_tokens for row in waiting)
    longest = 0 if spec.chunked else max(row.prefill_tokens for row in waiting)
    prefill = min(prompts, max(longest, spec.prefill_budget_tokens))
    if room < 1 or kv_blocks > spec.kv_blocks or not table.inside(batch, kv_blocks, prefill):
        return False
    step_s = table.slowest_s(batch, kv_blocks, 0) * _ROUNDING
    prompt_s = table.slowest_s(batch, kv_blocks, prefill) * _ROUNDING
    if step_s > min(board.tightest_tbt_s(), newcomer.tbt_s) * kept:
        return False
    # Until all have started, an iteration takes `room` prompt tokens, or finishes a prompt, or nobody is there yet.
    later = max(0, *(row.earliest - first for row in waiting))
    started_s = delay_s + (later + len(waiting) - (-prompts // room)) * prompt_s
    if bool((started_s + left * step_s > (board.deadline_s - base_s) * kept).any()):
        return False
    return all(
        started_s + row.remaining_tokens * step_s <= (row.deadline_s() - base_s) * kept
        and started_s <= (row.first_due_s() - base_s) * kept
        for row in waiting
    )


def _kv_blocks(board: Scoreboard, waiting: list[SequenceState], tokens: npt.NDArray[np.int64], block: int) -> int:
    """All blocks that these rows will ever hold, as if nobody ever left."""
    running = int(((tokens + (block - 1)) // block).sum())
    coming = sum(-(-(row.prefill_tokens + row.remaining_tokens) // block) for row in waiting)
    return running + coming + max(0, board.others.kv_blocks)
