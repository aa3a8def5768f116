"""What runs on one engine, and how far along it is (the paper's scoreboard, part 2 of its system).

While the batch is unchanged every running sequence gains one token per iteration, so its progress is
`iteration - start` and nothing here is touched: entries change when a sequence starts, finishes, is preempted or was
mispredicted. A controller that loops over its sequences at each iteration is wrong. Knows nothing of queues or clocks.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from throttllem.core.compiled import compiled
from throttllem.core.external_load import ExternalLoad, OwnLoad
from throttllem.core.lengths.prediction import Prediction
from throttllem.core.shared_blocks import Link, SharedBlocks
from throttllem.core.types import Request

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Renew = Callable[[Request, int], float | None]
"""Tokens of an output that has outgrown its prediction, given those already generated; None: max_tokens."""


class Limits(NamedTuple):
    """What the SLOs of one sequence demand; inf where nothing binds, as for one that is lost.

    `deadline_s`: the deadline of the last token, by E2E, and by the mean time between tokens once the first is out.
    `first_token_deadline_s`: that of the first token, inf once it is out. `tbt_s`: the SLO on time between tokens.
    `reserve_s`: the most that a reserve may take from the deadline, a tenth of what a TBT SLO allows. `e2e_s`: the E2E
    SLO itself, 0 where there is none.
    """

    deadline_s: float
    first_token_deadline_s: float
    tbt_s: float
    reserve_s: float
    e2e_s: float


@dataclass(slots=True, kw_only=True)
class SequenceState:
    """One request in the queue or in an engine: what was predicted, and how far along it is.

    `predicted_tokens` is the first prediction, inflated; `expected_tokens` the same before inflation (None: it was not
    inflated); `output_tokens` the prediction in force. `earliest` is the first iteration that can hold it.
    `done_tokens` were generated before the last (re)start and are part of the prompt now; `start` is the iteration of
    the first token since then, None while it waits inside the engine; `slot` is its index in the scoreboard's columns.
    `expires_s` is when it has waited in the queue for too long (inf: never). `in_time`: its SLO could still be met
    at admission. A request that can wait may be held until `hold_until_s` (-inf: it may not), and was released at
    `released_s` (None: it was not held).
    A request of several `sequences` counts as that many in the batch and in KV blocks; tokens are those of one of
    them, since all keep pace.
    """

    request: Request
    predicted_tokens: int
    output_tokens: int
    expected_tokens: int | None = None
    earliest: int = 0
    lost: bool = False
    done_tokens: int = 0
    start: int | None = None
    first_token_s: float | None = None
    slot: int = -1
    expires_s: float = math.inf
    in_time: bool = True
    hold_until_s: float = -math.inf
    released_s: float | None = None

    @classmethod
    def planned(cls, request: Request, prediction: Prediction | None, inflation: float) -> SequenceState:
        """A request that has just arrived, with 1 to max_tokens predicted: the bound of a predictor that gives one,
        else its prediction times `inflation`; max_tokens without a prediction.
        """
        most = request.max_tokens
        if prediction is None:
            predicted = expected = most
        elif prediction.bound_tokens is None:
            predicted = _clipped(prediction.expected_tokens * inflation, most)
            expected = math.ceil(predicted / max(1.0, inflation))
        else:
            predicted = _clipped(prediction.bound_tokens, most)
            expected = _clipped(prediction.expected_tokens, predicted)
        return cls(request=request, predicted_tokens=predicted, output_tokens=predicted, expected_tokens=expected)

    @property
    def queued_s(self) -> float:
        """When it began to wait for a place: at its arrival, or at its release if it was held."""
        return self.request.arrival_s if self.released_s is None else self.released_s

    @property
    def sequences(self) -> int:
        """Sequences that are generated side by side for the request."""
        return self.request.sequences

    @property
    def prefill_tokens(self) -> int:
        """Tokens that a (re)start must hold: the prompt, and what a preemption discarded."""
        return self.request.prompt_tokens + self.done_tokens

    @property
    def computed_tokens(self) -> int:
        """Those of them that it must compute, at least 1."""
        return max(1, self.prefill_tokens - self.request.cached_prompt_tokens)

    @property
    def remaining_tokens(self) -> int:
        """Tokens still to come after the last (re)start, by the prediction in force."""
        return max(1, self.output_tokens - self.done_tokens)

    @property
    def unsure_tokens(self) -> int:
        """Tokens of the prediction in force beyond those expected; once it was outgrown, all that remain of it."""
        if self.output_tokens > self.predicted_tokens:
            return self.remaining_tokens
        return 0 if self.expected_tokens is None else max(0, self.output_tokens - self.expected_tokens)

    def generated_tokens(self, iteration: int) -> int:
        """Output tokens that are out when `iteration` is over."""
        return self.done_tokens + (0 if self.start is None else iteration - self.start + 1)

    def limits(self) -> Limits:
        """What its SLOs demand as it stands.

        A mean time between tokens may be spread over as many gaps as the output is expected to have: the prediction
        before inflation, or the one in force once the output has outgrown the first.
        """
        slo, arrival_s = self.request.slo, self.request.arrival_s
        e2e_s = slo.e2e_s or 0.0
        if self.lost:
            return Limits(math.inf, math.inf, math.inf, math.inf, e2e_s)
        deadline_s = math.inf if slo.e2e_s is None else arrival_s + slo.e2e_s
        first_token_deadline_s = math.inf
        if slo.ttft_s is not None and self.first_token_s is None:
            first_token_deadline_s = arrival_s + slo.ttft_s
        if slo.tbt_s is None:
            return Limits(deadline_s, first_token_deadline_s, math.inf, math.inf, e2e_s)
        outgrown = self.output_tokens > self.predicted_tokens
        tokens = self.output_tokens if outgrown or self.expected_tokens is None else self.expected_tokens
        gaps = max(1, tokens - 1)
        if self.first_token_s is not None:
            deadline_s = min(deadline_s, self.first_token_s + slo.tbt_s * gaps)
        return Limits(deadline_s, first_token_deadline_s, slo.tbt_s, 0.1 * slo.tbt_s * gaps, e2e_s)


def _clipped(tokens: float, most: int) -> int:
    """Whole tokens from 1 to `most`; `most` for what is no number."""
    return max(1, min(most, math.ceil(tokens))) if math.isfinite(tokens) else most


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreboardState:
    """What a scoreboard holds: its sequences, running ones first, in the order of the columns."""

    block_tokens: int
    external: ExternalLoad
    sequences: tuple[SequenceState, ...]
    shared: tuple[Link, ...] = ()


class Scoreboard:
    """The sequences of one engine: `pending` (dispatched, no token yet) and `running`, by request id.

    `lost_requests` counts the lost among them, `multi_sequence` those with several sequences, `pending_sequences` the
    sequences of the pending ones; `reserved_blocks` is what an engine that never evicts has set aside. `external` is
    what the engine holds beside them. `sharing` counts the requests that share KV blocks, which `shared` holds.
    `next_end` is the first iteration at which a sequence may have outgrown its prediction (inf: none will).
    `classes`: how many of the requests are of each SLO class.

    The columns that projections need are compact arrays, shape (running,): the last entry moves into a gap.
    """

    def __init__(self, block_tokens: int) -> None:
        self.pending: dict[int, SequenceState] = {}
        self.running: dict[int, SequenceState] = {}
        self.lost_requests = 0
        self.classes: dict[str, int] = {}
        self.multi_sequence = 0
        self.pending_sequences = 0
        self.reserved_blocks = 0
        self.external = ExternalLoad()
        self.next_end: float = math.inf
        self._block_tokens = block_tokens
        self._slots: list[SequenceState] = []
        self._columns: Ints = np.zeros((5, 64), dtype=np.int64)
        self._limits: Floats = np.zeros((4, 64))
        self._ends: list[tuple[int, int]] = []
        self._growing = GrowingBlocks(block_tokens)
        self._pending_blocks = 0
        self.sharing = 0
        self.shared = SharedBlocks()
        self._saved: tuple[int, int] | None = (0, 0)
        """Blocks that sharing saves among the running and the other requests, None: to be summed."""

    def __len__(self) -> int:
        return len(self.pending) + len(self.running)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self.pending or request_id in self.running

    @property
    def running_sequences(self) -> int:
        """Sequences of the running requests."""
        return self._growing.sequences

    def kv_blocks(self, iteration: int) -> int:
        """KV blocks of the running sequences in an iteration that none of them begins after. O(1) in sequences."""
        return self._growing.at(iteration) - (self._saved or self._sum_saved())[0]

    def own(self, iteration: int) -> OwnLoad:
        """What the engine should hold of ours in such an iteration. O(1)."""
        running, others = self._saved or self._sum_saved()
        return OwnLoad(
            running=self._growing.sequences,
            kv_blocks=self._growing.at(iteration) - running,
            pending=self.pending_sequences,
            pending_blocks=self._pending_blocks - others,
        )

    # ---- columns of the running sequences, shape (running,) each ------------------------------------------------

    @property
    def columns(self) -> Ints:
        """For compiled loops, shape (5, running and more): the iteration of the first token, KV tokens in it, `end`,
        sequences side by side, and `unsure`.
        """
        return self._columns

    @property
    def limits(self) -> Floats:
        """`deadline_s`, the SLO on the time between tokens, `reserve_s` and `e2e_s`, shape (4, running and more)."""
        return self._limits

    @property
    def end(self) -> Ints:
        """First iteration that no longer holds the sequence, by prediction."""
        return self._columns[2, : len(self._slots)]

    @property
    def unsure(self) -> Ints:
        """Tokens that lie beyond the expected ones."""
        return self._columns[4, : len(self._slots)]

    @property
    def deadline_s(self) -> Floats:
        """Deadline of the last token, inf where nothing binds."""
        return self._limits[0, : len(self._slots)]

    @property
    def reserve_s(self) -> Floats:
        """The most that a reserve may take from the deadline, inf where no TBT binds."""
        return self._limits[2, : len(self._slots)]

    @property
    def e2e_s(self) -> Floats:
        """The E2E SLO, 0 where there is none."""
        return self._limits[3, : len(self._slots)]

    def at(self, slot: int) -> SequenceState:
        """The running sequence behind one index of the columns."""
        return self._slots[slot]

    def sequences(self) -> list[SequenceState]:
        """Every sequence, running ones first, in the order of the columns. O(sequences): never per iteration."""
        return [*self._slots, *self.pending.values()]

    def tightest_tbt_s(self) -> float:
        """The strictest SLO on the time between tokens among sequences that are not lost; inf if there is none."""
        waiting = math.inf
        for sequence in self.pending.values():
            waiting = min(waiting, sequence.limits().tbt_s)
        return min(waiting, _least(self._limits[1], len(self._slots)))

    def reservation(self, request: Request) -> int:
        """KV blocks that an engine which never evicts sets aside for a request."""
        return -(-(request.prompt_tokens + request.max_tokens) // self._block_tokens) * request.sequences

    # ---- changes -------------------------------------------------------------------------------------------------

    def dispatch(self, sequence: SequenceState) -> None:
        """A request goes to the engine and waits for its first token there."""
        self.pending[sequence.request.id] = sequence
        self.lost_requests += sequence.lost
        self.classes[sequence.request.slo_class] = self.classes.get(sequence.request.slo_class, 0) + 1
        self.multi_sequence += sequence.request.sequences > 1
        self.reserved_blocks += self.reservation(sequence.request)
        if sequence.request.common_prompt_tokens or sequence.request.prefix_of is not None:
            self._share(sequence.request)
        self._count_pending(sequence, sequence.request.sequences)

    def begin(self, request_id: int, iteration: int, now_s: float) -> None:
        """The engine gave the first token (or the first after a preemption) of a pending sequence."""
        sequence = self.pending.pop(request_id)
        self._count_pending(sequence, -sequence.request.sequences)
        sequence.start = iteration
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
        self._enter(sequence)

    def correct(self, request_id: int, tokens: int, iteration: int, now_s: float) -> None:
        """A request (each of its sequences) has `tokens` tokens out when `iteration` is over, unlike its start implies.

        Its KV then is its prompt and those tokens less one, and its predicted end moves along; a pending one begins.
        """
        if request_id in self.pending:
            self.begin(request_id, iteration, now_s)
        sequence = self.running[request_id]
        assert sequence.start is not None
        self._growing.remove(sequence.prefill_tokens, sequence.start, sequence.request.sequences)
        sequence.done_tokens = min(sequence.done_tokens, tokens - 1)
        sequence.start = iteration + 1 - (tokens - sequence.done_tokens)
        self._growing.add(sequence.prefill_tokens, sequence.start, sequence.request.sequences)
        self._write(sequence)

    def remove(self, request_id: int) -> SequenceState:
        """A request ended, in whatever state it was."""
        sequence = self.pending.pop(request_id, None)
        if sequence is None:
            sequence = self._leave(request_id)
        else:
            self._count_pending(sequence, -sequence.request.sequences)
        self.lost_requests -= sequence.lost
        self.classes[sequence.request.slo_class] -= 1
        if not self.classes[sequence.request.slo_class]:
            del self.classes[sequence.request.slo_class]
        self.multi_sequence -= sequence.request.sequences > 1
        self.reserved_blocks -= self.reservation(sequence.request)
        if self.sharing:
            self.sharing -= bool(sequence.request.common_prompt_tokens) or sequence.request.prefix_of is not None
            self.shared.remove(request_id)
            self._saved = None
        return sequence

    def preempt(self, request_id: int, iteration: int) -> None:
        """The engine evicted a sequence before `iteration`; it waits there, in front, to be computed again."""
        sequence = self._leave(request_id)
        assert sequence.start is not None
        sequence.done_tokens += iteration - sequence.start
        sequence.start = None
        sequence.earliest = iteration
        self.pending = {request_id: sequence, **self.pending}
        self._count_pending(sequence, sequence.request.sequences)

    def mark_lost(self, sequence: SequenceState) -> None:
        """A sequence can no longer meet its SLOs: it binds nothing from now on."""
        self.lost_requests += not sequence.lost
        sequence.lost = True
        if sequence.start is not None:
            self._write(sequence)

    def outgrown(self, iteration: int, renew: Renew | None = None) -> list[SequenceState]:
        """Sequences that were to be gone before `iteration` and are not: `renew` gives what to expect now, or else
        their output becomes max_tokens (the paper).

        One that outgrew even that gets one more token at a time: the engine knows better. O(1) when none did.
        """
        found: list[SequenceState] = []
        while self._ends and self._ends[0][0] <= iteration:
            end, request_id = heapq.heappop(self._ends)
            sequence = self.running.get(request_id)
            if sequence is None or sequence.start is None or sequence.start + sequence.remaining_tokens != end:
                continue  # it left or was corrected since
            generated, most = sequence.done_tokens + iteration - sequence.start, sequence.request.max_tokens
            expected = renew(sequence.request, generated) if renew and generated < most else None
            tokens = most if expected is None or not math.isfinite(expected) else min(most, math.ceil(expected))
            sequence.output_tokens = max(tokens, generated + 1)
            self._write(sequence)
            found.append(sequence)
        self.next_end = self._ends[0][0] if self._ends else math.inf
        return found

    # ---- state ---------------------------------------------------------------------------------------------------

    def state(self) -> ScoreboardState:
        """What it holds; the sequences are its own."""
        return ScoreboardState(
            block_tokens=self._block_tokens,
            external=self.external,
            sequences=tuple(self.sequences()),
            shared=self.shared.links(),
        )

    @classmethod
    def from_state(cls, state: ScoreboardState) -> Scoreboard:
        """A scoreboard that continues from `state`, and takes its sequences over."""
        board = cls(state.block_tokens)
        board.external = state.external
        for sequence in state.sequences:
            board.dispatch(sequence)
            if sequence.start is not None:
                del board.pending[sequence.request.id]
                board._count_pending(sequence, -sequence.request.sequences)
                board._enter(sequence)
        board.shared.relink(link for link in state.shared if link[0] in board and link[1] in board)
        board._saved = None
        return board

    # ---- columns and counts --------------------------------------------------------------------------------------

    def _share(self, request: Request) -> None:
        """Note what a request shares with others and among its sequences."""
        self.sharing += 1
        own, prefix = self.shared_blocks(request)
        if own:
            self.shared.own[request.id] = own
        if prefix:
            assert request.prefix_of is not None
            self.shared.link(request.id, request.prefix_of, prefix)

    def _sum_saved(self) -> tuple[int, int]:
        self._saved = self.shared.saved(self.running)
        return self._saved

    def shared_blocks(self, request: Request) -> tuple[int, int]:
        """KV blocks that the sequences of a request would share, and those that it would share with `prefix_of`."""
        own = request.common_prompt_tokens // self._block_tokens * (request.sequences - request.prompts)
        there = request.prefix_of is not None and request.prefix_of in self
        return own, request.prefix_tokens // self._block_tokens if there else 0

    def _count_pending(self, sequence: SequenceState, sequences: int) -> None:
        """Count a pending request in, or out if negative."""
        if self.sharing:
            self._saved = None
        self.pending_sequences += sequences
        tokens = sequence.request.prompt_tokens + sequence.done_tokens
        self._pending_blocks += -(-tokens // self._block_tokens) * sequences

    def _enter(self, sequence: SequenceState) -> None:
        """A sequence that has a start joins the columns."""
        assert sequence.start is not None
        sequence.slot = len(self._slots)
        if sequence.slot == self._columns.shape[1]:
            self._columns = np.concatenate([self._columns, np.zeros_like(self._columns)], axis=1)
            self._limits = np.concatenate([self._limits, np.zeros_like(self._limits)], axis=1)
        self._slots.append(sequence)
        self.running[sequence.request.id] = sequence
        tokens = sequence.request.prompt_tokens + sequence.done_tokens
        self._growing.add(tokens, sequence.start, sequence.request.sequences)
        self._write(sequence)

    def _write(self, sequence: SequenceState) -> None:
        """Write a running sequence's columns, and note its predicted end."""
        assert sequence.start is not None
        end, limits = sequence.start + max(1, sequence.output_tokens - sequence.done_tokens), sequence.limits()
        self._columns[:, sequence.slot] = (
            sequence.start,
            sequence.request.prompt_tokens + sequence.done_tokens,
            end,
            sequence.request.sequences,
            sequence.unsure_tokens,
        )
        self._limits[:, sequence.slot] = (limits.deadline_s, limits.tbt_s, limits.reserve_s, limits.e2e_s)
        heapq.heappush(self._ends, (end, sequence.request.id))
        if len(self._ends) > 4 * len(self._slots) + 64:  # mostly ends of sequences that left or were corrected
            self._ends = [(int(end), held.request.id) for end, held in zip(self.end, self._slots, strict=True)]
            heapq.heapify(self._ends)
        self.next_end = self._ends[0][0]

    def _leave(self, request_id: int) -> SequenceState:
        """A running sequence leaves the columns."""
        sequence = self.running.pop(request_id)
        assert sequence.start is not None
        self._growing.remove(sequence.prefill_tokens, sequence.start, sequence.request.sequences)
        last = self._slots.pop()
        if last is not sequence:
            self._columns[:, sequence.slot] = self._columns[:, last.slot]
            self._limits[:, sequence.slot] = self._limits[:, last.slot]
            self._slots[sequence.slot], last.slot = last, sequence.slot
        sequence.slot = -1
        return sequence


class GrowingBlocks:
    """The KV blocks of sequences that all grow by one token an iteration: their sum at any iteration, in O(1).

    A sequence that holds q tokens in its start iteration s holds ceil((q + k - s) / N) blocks in iteration k. With
    q - s + N - 1 = c N + r and k = K N + j that is c + K, and one more where r + j >= N: so the sum over all
    `sequences` is the sum of c, the number of sequences times K, and a count of them by r.
    """

    def __init__(self, block_tokens: int) -> None:
        self.sequences = 0
        self._whole = 0
        self._by_residue = [0] * block_tokens

    def add(self, tokens: int, start: int, sequences: int) -> None:
        """That many equal sequences grow from `tokens` tokens each in iteration `start` on."""
        size = len(self._by_residue)
        whole, residue = divmod(tokens - start + size - 1, size)
        self.sequences += sequences
        self._whole += sequences * whole
        self._by_residue[residue] += sequences

    def remove(self, tokens: int, start: int, sequences: int) -> None:
        """Such sequences are gone."""
        self.add(tokens, start, -sequences)

    def at(self, iteration: int) -> int:
        """Blocks in use in an iteration in which every sequence has started."""
        size = len(self._by_residue)
        whole, past = divmod(iteration, size)
        return self.sequences * whole + self._whole + sum(self._by_residue[size - past :])


@compiled
def _least(values: Floats, count: int) -> float:
    """The least of the first `count` values, inf of none."""
    least = np.inf
    for i in range(count):
        least = min(least, values[i])
    return least
