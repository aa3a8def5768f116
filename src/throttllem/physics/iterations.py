"""The iterations of one engine as compiled loops: what each processes, its seconds and watts, and many of them at once.

Three parts in one file, since machine code is renewed only when its own file changes: the law of an iteration
(`EnginePhysics` fills in its coefficients), in-flight batching (`engines.simulated.batcher` is its face), and the two
together. Knows nothing of requests' names, SLOs or policies.
"""

# The law (docs/physics.md derives it).
#
#   seconds = busy + waiting
#   busy    = (memory^p + arithmetic^p)^(1/p) of the matrix products + memory + arithmetic of the experts' products
#             + streamed + KV read + prefill attention
#   waiting = fixed kernel times + all-reduce + host + what is left of the decode attention's walk after the KV read
#   watts   = base + (traffic + core x busy + compute x arithmetic + attention x KV read
#             + unpack x weights of 4 bits) / seconds
#
# Each term is a cost of `load.py` times a factor of the clock (`clock.py`): memory, arithmetic, latency; the host does
# not depend on it. `traffic` is the energy of memory traffic; `core`, `compute`, `attention` and `unpack` are watts,
# times the switching power f V(f)^2. A GPU with a running engine never draws less than `base`.
#
# Power limit. Above the limit the GPU's governor lowers the clock. The iteration then takes the time at the clock where
# the power just meets the limit, whatever higher clock is set.
#
# Batching. All running sequences gain one token an iteration, so while the batch is unchanged an iteration is O(1):
# - their KV tokens are a sum (of prompt tokens minus start iteration) plus batch size times iteration;
# - a sequence needs a new KV block in every `block_tokens`-th iteration, so the sequences that need one in iteration k
#   are those of one residue class modulo `block_tokens`, and a counter per class is enough;
# - the iteration of a sequence's last token is known when it starts, and so is the first such end of all.
# A token's keys and values are written in the iteration after the one that made it: the start iteration of a prompt of
# q tokens holds q, the j-th one after it q + j.

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from throttllem.core.compiled import compiled

Records = npt.NDArray[Any]
"""An array of a structured type."""
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NEVER = 1 << 62
"""An iteration that does not come."""


# ---- the law ---------------------------------------------------------------------------------------------------------


class Coefficients(NamedTuple):
    """The coefficients of an iteration at one clock: seconds (as in `load.Load`) and watts of all GPUs.

    The factors of the clock are included; watts of traffic and of switching are per second of their time. `switching`
    is the factor itself, by which the power limit finds its clock.
    """

    clock_mhz: float
    switching: float
    weights: float
    token_gemm_memory: float
    token_gemm_compute: float
    head_token_compute: float
    experts: float
    expert_missed: float
    token_expert_memory: float
    token_expert_compute: float
    experts_kernel: float
    token_streamed: float
    kv_token: float
    window_kv_token: float
    window_tokens: float
    kv_sequence: float
    walk_token: float
    pair: float
    window_pair: float
    prefill_token: float
    prefill_walk_token: float
    fixed: float
    decode_fixed: float
    prefill_fixed: float
    one_step_tokens: float
    one_step_token: float
    two_step_token: float
    two_step: float
    large_tokens: float
    large: float
    norm: float
    inverse_norm: float
    host_request: float
    base_w: float
    gemm_traffic_w: float
    expert_traffic_w: float
    kv_traffic_w: float
    prompt_traffic_w: float
    core_w: float
    compute_w: float
    attention_w: float
    gemm_unpack_w: float
    expert_unpack_w: float


COEFFICIENTS = np.dtype([(name, np.float64) for name in Coefficients._fields])


class Law(NamedTuple):
    """The law of one engine: `at` has its coefficients at every clock of the GPU, ascending, and then at those clocks
    between them that were asked for, shape (clocks + others,).
    """

    at: Records
    clocks: int
    limit_w: float


@compiled
def unlimited(
    at: Records, row: int, decode_sequences: float, kv_tokens: float, prefill_tokens: float, prefill_pairs: float
) -> tuple[float, float]:
    """Seconds and watts of one iteration by the law, without the power limit."""
    c = at[row]
    tokens = decode_sequences + prefill_tokens
    gemm_memory_s = c.weights + c.token_gemm_memory * tokens
    gemm_compute_s = c.token_gemm_compute * tokens + c.head_token_compute * decode_sequences
    streamed_s, read_s = c.token_streamed * tokens, c.kv_token * kv_tokens + c.kv_sequence * decode_sequences
    attention_s = tensor_s = prompt_s = 0.0
    waiting_s = c.fixed
    if c.window_tokens:
        read_s += c.window_kv_token * min(kv_tokens, c.window_tokens * decode_sequences)
    if prefill_tokens:
        waiting_s += c.prefill_fixed
        gemm_compute_s += c.head_token_compute
        prompt_s = c.prefill_token * prefill_tokens
        tensor_s = c.pair * prefill_pairs
        if c.window_tokens:
            tensor_s += c.window_pair * min(prefill_pairs, c.window_tokens * prefill_tokens)
        attention_s = tensor_s + prompt_s + c.prefill_walk_token * prefill_tokens
    token_message_s = c.one_step_token
    if tokens >= c.one_step_tokens:
        token_message_s = c.two_step_token
        waiting_s += c.two_step if tokens < c.large_tokens else c.large
    waiting_s += token_message_s * tokens
    if decode_sequences:
        waiting_s += c.decode_fixed + c.host_request * decode_sequences
        if c.walk_token:
            walk_s = c.walk_token * kv_tokens / decode_sequences - read_s
            if walk_s > 0:
                waiting_s += walk_s
    busy_s = (gemm_memory_s**c.norm + gemm_compute_s**c.norm) ** c.inverse_norm + streamed_s + read_s + attention_s
    unpacked = c.gemm_unpack_w * gemm_memory_s
    traffic = c.gemm_traffic_w * (gemm_memory_s + streamed_s) + c.kv_traffic_w * read_s + c.prompt_traffic_w * prompt_s
    if c.experts:
        expert_memory_s = c.experts * (1 - c.expert_missed**tokens) + c.token_expert_memory * tokens
        expert_compute_s = c.token_expert_compute * tokens
        busy_s += expert_memory_s + expert_compute_s + c.experts_kernel
        tensor_s += expert_compute_s
        traffic += c.expert_traffic_w * expert_memory_s
        unpacked += c.expert_unpack_w * expert_memory_s
    time_s = busy_s + waiting_s
    switched = c.core_w * busy_s + c.compute_w * (gemm_compute_s + tensor_s) + c.attention_w * read_s + unpacked
    return time_s, c.base_w + (traffic + switched) / time_s


@compiled
def limited(
    law: Law, row: int, decode_sequences: float, kv_tokens: float, prefill_tokens: float, prefill_pairs: float
) -> tuple[float, float]:
    """Seconds and watts of one iteration: beyond the power limit those at the clock where the power equals it.

    Power is nearly linear in the switching factor: false position finds the two neighbouring clocks around the limit,
    the same for every clock set, and linear interpolation the rest.
    """
    at, limit_w = law.at, law.limit_w
    above_s, above_w = unlimited(at, row, decode_sequences, kv_tokens, prefill_tokens, prefill_pairs)
    if above_w <= limit_w:
        return above_s, above_w
    high = row
    if row >= law.clocks:
        high = 0
        while at[high].clock_mhz < at[row].clock_mhz:
            high += 1
        above_s, above_w = unlimited(at, high, decode_sequences, kv_tokens, prefill_tokens, prefill_pairs)
    low, below_s, below_w, low_switching = -1, 0.0, at[row].base_w, 0.0
    while high - low > 1:
        share = (limit_w - below_w) / (above_w - below_w)
        wanted = low_switching + share * (at[high].switching - low_switching)
        middle = low + 1
        while middle < high - 1 and at[middle].switching < wanted:
            middle += 1
        middle_s, middle_w = unlimited(at, middle, decode_sequences, kv_tokens, prefill_tokens, prefill_pairs)
        if middle_w <= limit_w:
            low, below_s, below_w, low_switching = middle, middle_s, middle_w, at[middle].switching
        else:
            high, above_s, above_w = middle, middle_s, middle_w
    if low < 0:
        return above_s, above_w
    share = (limit_w - below_w) / (above_w - below_w)
    return below_s + share * (above_s - below_s), limit_w


# ---- batching --------------------------------------------------------------------------------------------------------

RULES = np.dtype(
    [
        ("block_tokens", np.int64),
        ("kv_blocks", np.int64),
        ("max_batch", np.int64),
        ("prefill_budget_tokens", np.int64),
        ("chunked", np.bool_),
        ("no_evict", np.bool_),
    ]
)
"""How an engine batches: those fields of `EngineSpec`."""

COUNTS = np.dtype(
    [
        ("iteration", np.int64),
        ("used_blocks", np.int64),
        ("reserved_blocks", np.int64),
        ("preemptions", np.int64),
        ("tokens_ahead", np.int64),
        ("next_finish", np.int64),
        ("waiting", np.int64),
        ("first_waiting", np.int64),
        ("last_waiting", np.int64),
        ("running", np.int64),
        ("prompts", np.int64),
        ("chunks", np.int64),
        ("preempted", np.int64),
        ("started", np.int64),
        ("finished", np.int64),
    ]
)
"""Where an engine is: `iteration` is the one under way or next to begin, `tokens_ahead` the sum over the running
sequences of prompt tokens minus start, `next_finish` the iteration of the first last token (NEVER: none runs), and how
many entries each list has. `first_waiting` and `last_waiting` are slots, -1 where none waits.
"""

SEQUENCE = np.dtype(
    [
        ("prompt_tokens", np.int64),
        ("left_tokens", np.int64),
        ("reserved_blocks", np.int64),
        ("prefilled_tokens", np.int64),
        ("start", np.int64),
        ("next_waiting", np.int64),
    ]
)
"""One request inside the engine, by slot. `prompt_tokens` includes the tokens generated before a preemption;
`left_tokens` are still to be generated; `prefilled_tokens` of the prompt are in the KV cache; `start` is the iteration
of the first token since the last (re)start, -1 before it.
"""

RUNNING, PROMPTS, CHUNKS, CHUNK_TOKENS, PREEMPTED, STARTED, FINISHED = range(7)
"""The lists of an engine, rows of slots: running sequences in order of their (re)start, prompts under way in order; and
of the present iteration its prompts with the tokens of each, and the sequences that were preempted, started, finished.
"""


class Batch(NamedTuple):
    """The state of one engine's batching. `rules` and `counts` have one entry, `residues` one for each token of a
    block: the running sequences that need a block in an iteration of that residue.
    """

    rules: Records
    counts: Records
    sequences: Records
    lists: Ints
    residues: Ints


@compiled
def join(batch: Batch, slot: int, prompt_tokens: int, output_tokens: int, reserved_blocks: int) -> None:
    """A request waits, behind all others."""
    counts, sequence = batch.counts[0], batch.sequences[slot]
    sequence.prompt_tokens, sequence.left_tokens, sequence.reserved_blocks = (
        prompt_tokens,
        output_tokens,
        reserved_blocks,
    )
    sequence.prefilled_tokens, sequence.start, sequence.next_waiting = 0, -1, -1
    if counts.waiting:
        batch.sequences[counts.last_waiting].next_waiting = slot
    else:
        counts.first_waiting = slot
    counts.last_waiting = slot
    counts.waiting += 1


@compiled
def cancel(batch: Batch, slot: int) -> None:
    """A request leaves before its end, between two iterations."""
    counts, sequence = batch.counts[0], batch.sequences[slot]
    if sequence.start >= 0:
        leave(batch, slot, counts.iteration - 1)
        find_next_finish(batch)
        return
    for place in range(counts.prompts):
        if batch.lists[PROMPTS, place] == slot:
            drop_prompt(batch, slot)
            return
    before = -1
    here = counts.first_waiting
    while here != slot:
        before, here = here, batch.sequences[here].next_waiting
    if before < 0:
        counts.first_waiting = sequence.next_waiting
    else:
        batch.sequences[before].next_waiting = sequence.next_waiting
    if counts.last_waiting == slot:
        counts.last_waiting = before
    counts.waiting -= 1


@compiled
def compose(batch: Batch) -> tuple[int, int, int, float]:
    """Compose the next iteration: which sequences decode, which prompt tokens are processed, which are preempted.

    Decoding sequences, their KV tokens, prompt tokens, and query-key pairs of the prompts' attention.
    """
    counts = batch.counts[0]
    grow(batch)
    prefill_tokens, pairs = take_prompts(batch)
    return counts.running, counts.tokens_ahead + counts.running * counts.iteration, prefill_tokens, pairs


@compiled
def begin(batch: Batch) -> tuple[tuple[int, int, int, float], tuple[int, int, int, int]]:
    """Compose the next iteration; what it processes, and its number, blocks in use, prompts and preempted sequences."""
    processed = compose(batch)
    counts = batch.counts[0]
    return processed, (counts.iteration, counts.used_blocks, counts.chunks, counts.preempted)


@compiled
def end(batch: Batch) -> tuple[int, int, int, int]:
    """Count the tokens of the iteration; its number, and the sequences preempted, started and finished in it."""
    complete(batch)
    counts = batch.counts[0]
    return counts.iteration - 1, counts.preempted, counts.started, counts.finished


@compiled
def complete(batch: Batch) -> None:
    """Count the tokens of the iteration that was composed."""
    counts, lists = batch.counts[0], batch.lists
    k = counts.iteration
    counts.started = counts.finished = 0
    for place in range(counts.chunks):
        slot = lists[CHUNKS, place]
        sequence = batch.sequences[slot]
        sequence.prefilled_tokens += lists[CHUNK_TOKENS, place]
        if sequence.prefilled_tokens == sequence.prompt_tokens:
            lists[STARTED, counts.started] = slot
            counts.started += 1
            counts.prompts = without(lists[PROMPTS], counts.prompts, slot)
            start(batch, slot, k)
    counts.chunks = 0
    if counts.next_finish == k:
        for place in range(counts.running):
            slot = lists[RUNNING, place]
            if batch.sequences[slot].start + batch.sequences[slot].left_tokens - 1 == k:
                lists[FINISHED, counts.finished] = slot
                counts.finished += 1
        for place in range(counts.finished):
            leave(batch, lists[FINISHED, place], k)
        find_next_finish(batch)
    counts.iteration = k + 1


@compiled
def grow(batch: Batch) -> None:
    """Allocate the new blocks of an iteration, preempting the latest sequences where blocks run out."""
    rules, counts, lists = batch.rules[0], batch.counts[0], batch.lists
    residue = counts.iteration % rules.block_tokens
    counts.preempted = 0
    while batch.residues[residue] > rules.kv_blocks - counts.used_blocks:
        victim = lists[PROMPTS, counts.prompts - 1] if counts.prompts else lists[RUNNING, counts.running - 1]
        preempt(batch, victim)
        lists[PREEMPTED, counts.preempted] = victim
        counts.preempted += 1
    counts.used_blocks += batch.residues[residue]


@compiled
def preempt(batch: Batch, slot: int) -> None:
    """Compute it again later: it waits in front, and the generated tokens become part of the prompt."""
    counts, sequence = batch.counts[0], batch.sequences[slot]
    counts.preemptions += 1
    if sequence.start < 0:
        drop_prompt(batch, slot)
    else:
        done = counts.iteration - sequence.start
        leave(batch, slot, counts.iteration - 1)
        find_next_finish(batch)
        sequence.prompt_tokens += done
        sequence.left_tokens -= done
    sequence.prefilled_tokens, sequence.start, sequence.next_waiting = 0, -1, counts.first_waiting
    if not counts.waiting:
        sequence.next_waiting = -1
        counts.last_waiting = slot
    counts.first_waiting = slot
    counts.waiting += 1


@compiled
def take_prompts(batch: Batch) -> tuple[int, float]:
    """The prompt tokens of this iteration, first come first served, and their query-key pairs. No prompt starts right
    after a preemption. The projection plays the same rules forward (`core.forecast.projection`); a test compares the
    results.
    """
    rules, counts, lists = batch.rules[0], batch.counts[0], batch.lists
    under_way = counts.prompts
    slots = under_way if counts.preempted else rules.max_batch - counts.running
    left = rules.prefill_budget_tokens - counts.running
    counts.chunks = 0
    prefill_tokens, pairs = 0, 0.0
    while counts.chunks < slots:
        fresh = counts.chunks >= under_way
        if fresh and not counts.waiting:
            break
        slot = counts.first_waiting if fresh else lists[PROMPTS, counts.chunks]
        sequence = batch.sequences[slot]
        tokens = sequence.prompt_tokens - sequence.prefilled_tokens
        if rules.chunked:
            tokens = min(tokens, left)
        if tokens <= 0 or (tokens > left and counts.chunks) or (fresh and not hold_prompt(batch, slot)):
            break
        lists[CHUNKS, counts.chunks], lists[CHUNK_TOKENS, counts.chunks] = slot, tokens
        counts.chunks += 1
        left -= tokens
        prefill_tokens += tokens
        pairs += tokens * (sequence.prefilled_tokens + tokens / 2)
    return prefill_tokens, pairs


@compiled
def hold_prompt(batch: Batch, slot: int) -> bool:
    """Allocate the blocks of a whole prompt (and its reservation), if they are free: it no longer waits."""
    counts, sequence, block_tokens = batch.counts[0], batch.sequences[slot], batch.rules[0].block_tokens
    if not has_room(batch, slot):
        return False
    counts.used_blocks += (sequence.prompt_tokens + block_tokens - 1) // block_tokens
    counts.reserved_blocks += sequence.reserved_blocks
    counts.first_waiting = sequence.next_waiting
    counts.waiting -= 1
    batch.lists[PROMPTS, counts.prompts] = slot
    counts.prompts += 1
    return True


@compiled
def has_room(batch: Batch, slot: int) -> bool:
    """Whether the blocks of a whole prompt (and its reservation) are free."""
    rules, counts, sequence = batch.rules[0], batch.counts[0], batch.sequences[slot]
    blocks = (sequence.prompt_tokens + rules.block_tokens - 1) // rules.block_tokens
    reserved = counts.reserved_blocks + sequence.reserved_blocks
    return counts.used_blocks + blocks <= rules.kv_blocks and (not rules.no_evict or reserved <= rules.kv_blocks)


@compiled
def drop_prompt(batch: Batch, slot: int) -> None:
    """Free the blocks of a prompt that is not processed yet."""
    rules, counts, sequence = batch.rules[0], batch.counts[0], batch.sequences[slot]
    counts.prompts = without(batch.lists[PROMPTS], counts.prompts, slot)
    counts.used_blocks -= (sequence.prompt_tokens + rules.block_tokens - 1) // rules.block_tokens
    counts.reserved_blocks -= sequence.reserved_blocks


@compiled
def start(batch: Batch, slot: int, k: int) -> None:
    """A sequence gives its first token in iteration k."""
    counts, sequence = batch.counts[0], batch.sequences[slot]
    sequence.start = k
    batch.lists[RUNNING, counts.running] = slot
    counts.running += 1
    counts.tokens_ahead += sequence.prompt_tokens - k
    batch.residues[(1 - (sequence.prompt_tokens - k)) % batch.rules[0].block_tokens] += 1
    counts.next_finish = min(counts.next_finish, k + sequence.left_tokens - 1)


@compiled
def leave(batch: Batch, slot: int, k: int) -> None:
    """Free the blocks of a running sequence after iteration k."""
    counts, sequence, block_tokens = batch.counts[0], batch.sequences[slot], batch.rules[0].block_tokens
    ahead = sequence.prompt_tokens - sequence.start
    counts.running = without(batch.lists[RUNNING], counts.running, slot)
    counts.tokens_ahead -= ahead
    batch.residues[(1 - ahead) % block_tokens] -= 1
    counts.used_blocks -= (ahead + k + block_tokens - 1) // block_tokens
    counts.reserved_blocks -= sequence.reserved_blocks


@compiled
def find_next_finish(batch: Batch) -> None:
    """The first iteration in which a running sequence gives its last token. O(batch)."""
    counts = batch.counts[0]
    counts.next_finish = NEVER
    for place in range(counts.running):
        sequence = batch.sequences[batch.lists[RUNNING, place]]
        counts.next_finish = min(counts.next_finish, sequence.start + sequence.left_tokens - 1)


@compiled
def without(slots: Ints, count: int, slot: int) -> int:
    """Take a slot out of the first `count` entries; the others keep their order. How many are left."""
    place = count - 1
    while slots[place] != slot:
        place -= 1
    for later in range(place + 1, count):
        slots[later - 1] = slots[later]
    return count - 1


# ---- many iterations -------------------------------------------------------------------------------------------------

STEP = np.dtype(
    [
        ("begin_s", np.float64),
        ("seconds", np.float64),
        ("joules", np.float64),
        ("clock_mhz", np.int64),
        ("sequences", np.int64),
        ("prompts", np.int64),
        ("prompt_tokens", np.int64),
        ("kv_blocks", np.int64),
    ]
)
"""One iteration that ran: `sequences` decoded, `prompts` were processed beside them."""


@compiled
def advance(
    batch: Batch,
    law: Law,
    row: int,
    scatter: Floats,
    drawn: int,
    begin_s: float,
    limit_s: float,
    before: int,
    steps: Records,
    filled: int,
) -> tuple[int, float, float, float, int, int, int]:
    """Run iterations from `begin_s` on while they only decode: none starts, finishes or preempts a sequence, all end
    before `limit_s`, and the iteration after the last one is earlier than `before`. Then begin one more.

    All are written to `steps` from entry `filled` on. The factors on seconds and watts of each are in `scatter`, shape
    (iterations, 2), from entry `drawn` on. How many ran; of the one that began its begin, seconds and joules, and its
    decoding sequences, prompts and preempted sequences.
    """
    counts = batch.counts[0]
    most = min(steps.size - filled, scatter.shape[0] - drawn) - 1
    ran, now_s = decode(batch, law, row, scatter[drawn : drawn + most], begin_s, limit_s, before, steps, filled)
    sequences, kv_tokens, prefill_tokens, pairs = compose(batch)
    seconds, watts = limited(law, row, float(sequences), float(kv_tokens), float(prefill_tokens), pairs)
    seconds, watts = seconds * scatter[drawn + ran, 0], watts * scatter[drawn + ran, 1]
    step = steps[filled + ran]
    step.begin_s, step.seconds, step.joules, step.clock_mhz = now_s, seconds, seconds * watts, law.at[row].clock_mhz
    step.sequences, step.prompts, step.prompt_tokens = sequences, counts.chunks, prefill_tokens
    step.kv_blocks = counts.used_blocks
    return ran, now_s, seconds, step.joules, sequences, counts.chunks, counts.preempted


@compiled
def decode(
    batch: Batch,
    law: Law,
    row: int,
    scatter: Floats,
    begin_s: float,
    limit_s: float,
    before: int,
    steps: Records,
    filled: int,
) -> tuple[int, float]:
    """The iterations of `advance` that only decode: how many ran, and when the last one ended."""
    rules, counts = batch.rules[0], batch.counts[0]
    if counts.prompts or not counts.running or takes_waiting(batch):
        return 0, begin_s
    k, used_blocks, sequences = counts.iteration, counts.used_blocks, counts.running
    now_s, ran = begin_s, 0
    while ran < scatter.shape[0] and k < counts.next_finish and k + 1 < before:
        used_blocks += batch.residues[k % rules.block_tokens]
        if used_blocks > rules.kv_blocks:
            break
        kv_tokens = counts.tokens_ahead + sequences * k
        seconds, watts = limited(law, row, float(sequences), float(kv_tokens), 0.0, 0.0)
        seconds, watts = seconds * scatter[ran, 0], watts * scatter[ran, 1]
        if now_s + seconds >= limit_s:
            break
        step = steps[filled + ran]
        step.begin_s, step.seconds, step.joules, step.clock_mhz = now_s, seconds, seconds * watts, law.at[row].clock_mhz
        step.sequences, step.prompts, step.prompt_tokens, step.kv_blocks = sequences, 0, 0, used_blocks
        counts.used_blocks = used_blocks
        now_s += seconds
        k += 1
        ran += 1
    counts.iteration = k
    return ran, now_s


@compiled
def takes_waiting(batch: Batch) -> bool:
    """Whether the next iteration may begin with a prompt that waits. Only an end or a preemption changes a no."""
    rules, counts = batch.rules[0], batch.counts[0]
    left = rules.prefill_budget_tokens - counts.running
    return bool(
        counts.waiting
        and counts.running < rules.max_batch
        and (left > 0 or not rules.chunked)
        and has_room(batch, counts.first_waiting)
    )


REQUEST = np.dtype(
    [
        ("release_s", np.float64),
        ("slot", np.int64),
        ("prompt_tokens", np.int64),
        ("output_tokens", np.int64),
        ("reserved_blocks", np.int64),
    ]
)
"""A request to be served, which reaches the engine at `release_s`; `slot` is its place in `SERVED`."""

SERVED = np.dtype([("first_token_s", np.float64), ("ended_s", np.float64)])
"""When a request gave its first and its last token; nan: not yet."""

PROGRESS = np.dtype(
    [("now_s", np.float64), ("energy_j", np.float64), ("idle_j", np.float64), ("arrived", np.int64), ("ran", np.int64)]
)
"""Of a run under a schedule: `now_s` is the end of the last iteration or idle time, `idle_j` the part of `energy_j`
with nothing to run; `arrived` requests and `ran` iterations so far.
"""


@compiled
def serve(
    batch: Batch,
    law: Law,
    scatter: Floats,
    requests: Records,
    served: Records,
    progress: Records,
    from_s: Floats,
    rows: Ints,
    idle_w: float,
    until_s: float,
) -> bool:
    """Serve requests in order of their release, first come, first served: the iterations that begin before `until_s`.

    The clock of `rows[i]` is in force for iterations that begin at `from_s[i]` or later. False if `scatter` does not
    suffice: to be called again with more of it.
    """
    counts, at, place = batch.counts[0], progress[0], 0
    while True:
        if counts.waiting + counts.prompts + counts.running == 0:
            if at.arrived == requests.size or requests[at.arrived].release_s >= until_s:
                return True
            joules = (requests[at.arrived].release_s - at.now_s) * idle_w
            at.now_s = requests[at.arrived].release_s
            at.energy_j += joules
            at.idle_j += joules
            reach(batch, requests, at.arrived)
            at.arrived += 1
        elif at.now_s >= until_s:
            return True
        while at.arrived < requests.size and requests[at.arrived].release_s < at.now_s:
            reach(batch, requests, at.arrived)
            at.arrived += 1
        if at.ran == scatter.shape[0]:
            return False
        while place + 1 < from_s.size and from_s[place + 1] <= at.now_s:
            place += 1
        sequences, kv_tokens, prefill_tokens, pairs = compose(batch)
        seconds, watts = limited(law, rows[place], float(sequences), float(kv_tokens), float(prefill_tokens), pairs)
        seconds, watts = seconds * scatter[at.ran, 0], watts * scatter[at.ran, 1]
        at.energy_j += seconds * watts
        at.now_s += seconds
        at.ran += 1
        complete(batch)
        note(batch, served, at.now_s)


@compiled
def reach(batch: Batch, requests: Records, number: int) -> None:
    """A request reaches the engine."""
    request = requests[number]
    join(batch, request.slot, request.prompt_tokens, request.output_tokens, request.reserved_blocks)


@compiled
def note(batch: Batch, served: Records, now_s: float) -> None:
    """Note the first and last tokens of the iteration that ended."""
    counts, lists = batch.counts[0], batch.lists
    for place in range(counts.started):
        if np.isnan(served[lists[STARTED, place]].first_token_s):
            served[lists[STARTED, place]].first_token_s = now_s
    for place in range(counts.finished):
        served[lists[FINISHED, place]].ended_s = now_s
