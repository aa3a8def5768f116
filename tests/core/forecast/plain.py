"""Projection, horizon, feasible clocks and admission in numpy, as they were before they were compiled."""

import numpy as np

from core.columns import column
from throttllem.core.admission import ADMIT, LOST
from throttllem.core.forecast.horizon import Horizon
from throttllem.core.forecast.projection import Projection, _saved
from throttllem.core.types import Reason, Verdict, VerdictKind


def project(board, spec, *, first, extra=None):
    pending = list(board.pending.values())
    if extra is not None:
        pending.append(extra)
    multi = board.multi_sequence > 0 or (extra is not None and extra.sequences > 1)
    decoding = board.running_sequences + max(0, board.external.batch)
    place = _place_multi_sequence if multi else _place
    begins, starts, prefill = place(pending, decoding, spec, first)
    tokens_now = column(board, "tokens_at_start") + (first - column(board, "start"))
    left = np.maximum(board.end - first, 1)
    running = len(left)
    if pending:
        prompts = np.array([sequence.prefill_tokens for sequence in pending], dtype=np.int64)
        remaining = np.array([sequence.remaining_tokens for sequence in pending], dtype=np.int64)
        left = np.concatenate([left, starts + remaining])
        tokens_now = np.concatenate([tokens_now, prompts])
    begin = np.zeros(left.size, dtype=np.int64)
    begin[running:] = begins
    grow_from = np.zeros(left.size, dtype=np.int64)
    grow_from[running:] = starts
    widths = None
    if multi:
        widths = np.concatenate([column(board, "widths"), [sequence.sequences for sequence in pending]]).astype(
            np.int64
        )
    batch, kv_blocks = _accumulate(tokens_now, begin, grow_from, left, spec.block_tokens, widths)
    joins = extra is not None and (extra.request.common_prompt_tokens or extra.request.prefix_of is not None)
    if board.sharing or joins:
        kv_blocks = kv_blocks - _saved(board, pending, extra, begin, left)
    external = board.external
    if external.batch or external.kv_blocks:
        batch = np.maximum(batch + external.batch, 1)
        kv_blocks = np.maximum(kv_blocks + external.kv_blocks, 1)
    padded = np.zeros(batch.size, dtype=np.int64)
    padded[: len(prefill)] = prefill
    return Projection(first=first, batch=batch, kv_blocks=kv_blocks, prefill_tokens=padded, ends=left, starts=starts)


def _accumulate(tokens, begin, grow_from, end, block, widths):
    horizon = int(end.max(initial=0))
    size = horizon + 1
    if horizon == 0:
        return (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    batch = _sums(begin, widths, size) - _sums(end, widths, size)
    first_growth = grow_from + -tokens % block + 1
    growths = np.maximum((end - first_growth + block - 1) // block, 0)
    nth = np.arange(int(growths.sum())) - np.repeat(np.cumsum(growths) - growths, growths)
    each = None if widths is None else np.repeat(widths, growths)
    kv = _sums(np.repeat(first_growth, growths) + block * nth, each, size)
    blocks = -(-tokens // block)
    gone = blocks + growths
    if widths is not None:
        blocks, gone = (blocks * widths, gone * widths)
    kv = kv + np.bincount(begin, weights=blocks, minlength=size).astype(np.int64)
    kv -= np.bincount(end, weights=gone, minlength=size).astype(np.int64)
    return (np.cumsum(batch)[:horizon], np.cumsum(kv)[:horizon])


def _sums(at, weights, size):
    if weights is None:
        return np.bincount(at, minlength=size)
    return np.bincount(at, weights=weights, minlength=size).astype(np.int64)


def _place(pending, running, spec, first, prompts=None):
    begins = []
    starts = []
    prefill = []
    left = [sequence.computed_tokens for sequence in pending] if prompts is None else prompts
    while len(starts) < len(left):
        done, offset = (len(starts), len(prefill))
        there = [
            tokens
            for sequence, tokens in zip(pending[done:], left[done:], strict=True)
            if sequence.earliest <= first + offset
        ]
        slots = max(1, spec.max_batch - running - done)
        taken = pack(there, running + done, budget=spec.prefill_budget_tokens, slots=slots, chunked=spec.chunked)
        if there and (not taken):
            taken = [there[0]]
        for position, tokens in enumerate(taken, start=done):
            if position == len(begins):
                begins.append(offset)
            left[position] -= tokens
            if left[position] == 0:
                starts.append(offset)
        prefill.append(sum(taken))
    return (begins, np.array(starts, dtype=np.int64), prefill)


def pack(prompt_tokens, decode_sequences, *, budget, slots, chunked):
    """Tokens of each waiting prompt that the next iteration processes, first come first served.

    `prompt_tokens` are the tokens still to be processed of each prompt in order; `decode_sequences` take one token of
    `budget` each; at most `slots` prompts join. Whole prompts (TensorRT-LLM) go while they fit, the first one always;
    chunked (vLLM) the last one is cut to what is left. The list ends at the first prompt that gets nothing.
    """
    left = budget - decode_sequences
    taken = []
    for tokens in prompt_tokens:
        if len(taken) == slots:
            break
        share = min(tokens, left) if chunked else tokens
        if share <= 0 or (share > left and taken):
            break
        taken.append(share)
        left -= share
    return taken


def _place_multi_sequence(pending, running, spec, first):
    each = [sequence for sequence in pending for _ in range(sequence.sequences)]
    prompts = [tokens for sequence in pending for tokens in _prompts(sequence)]
    begins, starts, prefill = _place(each, running, spec, first, prompts)
    after = np.cumsum([sequence.sequences for sequence in pending], dtype=np.int64)
    firsts = [int(last) - sequence.sequences for last, sequence in zip(after, pending, strict=True)]
    return ([begins[index] for index in firsts], starts[after - 1], prefill)


def _prompts(sequence):
    request, first = (sequence.request, min(sequence.request.prompts, sequence.sequences))
    shared = max(request.common_prompt_tokens, request.cached_prompt_tokens)
    further = max(1, sequence.prefill_tokens - shared)
    return [sequence.computed_tokens] * first + [further] * (sequence.sequences - first)


def look_ahead(board, spec, table, projection, *, base_s, extra=None):
    pending = [*board.pending.values(), *([extra] if extra else [])]
    limits = [sequence.limits() for sequence in pending]
    cells = table.cells(projection.batch, projection.kv_blocks, projection.prefill_tokens)
    size = projection.horizon
    cut = np.zeros(size + 1, dtype=np.bool_)
    cut[0] = True
    np.not_equal(cells[1:], cells[:-1], out=cut[1:size])
    cut[projection.ends] = True
    cut[projection.starts + 1] = True
    edges = cut.nonzero()[0]
    starts = edges[:-1]
    run_of = np.cumsum(cut) - 1
    kv_peak = int(projection.kv_blocks.max(initial=0))
    batch_peak, prefill_peak = (int(projection.batch.max(initial=0)), int(projection.prefill_tokens.max(initial=0)))
    return Horizon(
        base_s=base_s,
        cells=cells[starts],
        length=edges[1:] - starts,
        prefills=projection.prefill_tokens[starts] > 0,
        finish_run=run_of[projection.ends] - 1,
        deadline_s=np.concatenate([board.deadline_s, [limit.deadline_s for limit in limits]]),
        e2e_s=np.concatenate([board.e2e_s, [limit.e2e_s for limit in limits]]),
        reserve_s=np.concatenate([board.reserve_s, [limit.reserve_s for limit in limits]]),
        first_token_run=run_of[projection.starts + 1] - 1,
        first_token_deadline_s=np.array([limit.first_token_deadline_s for limit in limits], dtype=np.float64),
        pending=tuple(pending),
        kv_peak=kv_peak,
        inside_hull=table.inside(batch_peak, kv_peak, prefill_peak),
    )


def feasible(ahead, board, table, *, delay_s, margin, reserve, stretch=1.0):
    keep = 1.0 - margin
    tbt_s = board.tightest_tbt_s() * keep
    steps = table.seconds[ahead.cells] * np.asarray(stretch, dtype=np.float32)
    spent_s = np.cumsum(steps * ahead.length[:, None], axis=0, dtype=np.float64) + delay_s
    late = spent_s > (ahead.slack_s(reserve) * keep)[:, None]
    if np.isfinite(tbt_s):
        late |= (steps > tbt_s) & ~ahead.prefills[:, None]
    holds = np.logical_not(late.any(axis=0))
    lowest = int(holds.argmax()) if holds.any() else holds.size
    binding = int(late[:, lowest - 1].argmax()) if lowest > 0 else None
    return (holds, binding)


def check_times(ahead, board, table, newcomer, delay_s, margin, *, alone, patient):
    own_tbt_s = newcomer.limits().tbt_s
    tbt_s = min(board.tightest_tbt_s(), own_tbt_s)
    step_s = table.seconds[ahead.cells, -1]
    slow = step_s[~ahead.prefills] > (tbt_s if alone else tbt_s * (1.0 - margin))
    lightest_s, _ = table.at(table.clocks_mhz[-1], 1, 1, 0)
    unmeetable = lightest_s > tbt_s
    if bool(slow.any()) and (alone or (patient and (not unmeetable))):
        return LOST if alone else Verdict(kind=VerdictKind.WAIT, why=Reason.TBT)
    spent_s = np.cumsum(step_s * ahead.length, dtype=np.float64) + delay_s
    own_s, own_first_s = (ahead.deadline_s[-1] - ahead.base_s, ahead.first_token_deadline_s[-1] - ahead.base_s)
    ahead.deadline_s[-1] = ahead.first_token_deadline_s[-1] = np.inf
    late = np.flatnonzero(spent_s > ahead.slack_s() * (1.0 - margin))
    first_late = spent_s[ahead.first_token_run] > (ahead.first_token_deadline_s - ahead.base_s) * (1.0 - margin)
    if bool(first_late.any()) and patient:
        binding = ahead.pending[int(first_late.argmax())].request.id
        return Verdict(kind=VerdictKind.WAIT, why=Reason.TTFT, binding=binding)
    if late.size and patient:
        sequence = ahead.binding(board, int(late[0]))
        return Verdict(kind=VerdictKind.WAIT, why=Reason.E2E, binding=sequence.request.id if sequence else None)
    in_time = spent_s[ahead.finish_run[-1]] <= own_s and spent_s[ahead.first_token_run[-1]] <= own_first_s
    return ADMIT if in_time and (not newcomer.lost) and (lightest_s <= own_tbt_s) else LOST


def surely_fits(board, spec, table, newcomer, *, first, base_s, delay_s, margin):
    if board.multi_sequence or newcomer.request.sequences > 1 or newcomer.lost:
        return False
    batch, keep = (len(board) + 1 + max(0, board.external.batch), 1.0 - margin)
    own = newcomer.limits()
    if newcomer.remaining_tokens * _slowest_s(table, batch, 0, 0) > (own.deadline_s - base_s) * keep:
        return False
    waiting, block = ([*board.pending.values(), newcomer], spec.block_tokens)
    left, kv_blocks = (board.end, max(0, board.external.kv_blocks))
    if board.running:
        left = np.maximum(left - first, 1)
        tokens = left + (column(board, "tokens_at_start") + (first - column(board, "start")))
        kv_blocks += int(((tokens + (block - 1)) // block).sum())
    kv_blocks += sum(-(-(sequence.prefill_tokens + sequence.remaining_tokens) // block) for sequence in waiting)
    prompts = sum(sequence.prefill_tokens for sequence in waiting)
    longest = 0 if spec.chunked else max(sequence.prefill_tokens for sequence in waiting)
    prefill = min(prompts, max(longest, spec.prefill_budget_tokens))
    budget = spec.prefill_budget_tokens - batch
    if budget < 1 or kv_blocks > spec.kv_blocks or (not table.inside(batch, kv_blocks, prefill)):
        return False
    step_s = _slowest_s(table, batch, kv_blocks, 0) * (1 + 1e-6)
    prompt_s = _slowest_s(table, batch, kv_blocks, prefill) * (1 + 1e-6)
    if step_s > min(board.tightest_tbt_s(), own.tbt_s) * keep:
        return False
    later = max(0, *(sequence.earliest - first for sequence in waiting))
    started_s = delay_s + (later + len(waiting) - -prompts // budget) * prompt_s
    if board.running and bool((started_s + left * step_s > (board.deadline_s - base_s) * keep).any()):
        return False
    limits = [sequence.limits() for sequence in waiting]
    return all(
        (
            started_s + sequence.remaining_tokens * step_s <= (limit.deadline_s - base_s) * keep
            and started_s <= (limit.first_token_deadline_s - base_s) * keep
            for sequence, limit in zip(waiting, limits, strict=True)
        )
    )


def _slowest_s(table, batch, kv_blocks, prefill_tokens):
    return table.slowest.item(table.cell(batch, kv_blocks, prefill_tokens))
