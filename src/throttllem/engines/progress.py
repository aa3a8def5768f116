"""From tokens and an engine's own reports to events of the core, and the one record of each request in the engine.

No clock, no I/O. An engine that names the requests of each step needs no inference. Of any other engine the iteration
is inferred from the streams: a sequence gets at most one token an iteration, so each token proves an iteration. Where
an engine speculates, an iteration is a token: a step counts as many as it gave each sequence
(`core.forecast.token_rate`).
"""

# The theory of the inference. The token of a request that stands in iteration p is of p + 1 at the earliest; a first
# token is of a later iteration than any known when its request was sent; and since one burst of tokens is read before
# the next but one, no token is of an iteration older than the one before the latest. The latest of these lower bounds
# is the iteration. It lags a little and never runs ahead, so a chunk with several tokens or another order within a
# burst does no harm. Step numbers, where the engine reports them, lift it to the true iteration; a stream that lags
# behind them then only shows that its events hold several tokens, as those of a busy vLLM do (1.7 to 3.6 on the mean,
# measured with 32 streams on two cores).

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from throttllem.core.forecast.token_rate import MOST_TOKENS_PER_STEP, TokenRate
from throttllem.core.types import Event, Observed, Progressed, RateChanged, Stepped
from throttllem.engines.base import Report

_CORRECT_EVERY = 8
"""Iterations between two corrections of one request."""
_TOLERATED_TOKENS = 2
"""A request that is this far from its iterations is corrected; one token is the blur of a burst."""
_RATE_STEP = 0.1
"""A change of the tokens per step by less than this part is not reported: each report makes a table."""
_TRUSTED_AHEAD = 8
"""Streams may run this many iterations ahead of step numbers, which come late. Further ahead they prove nothing:
engines that speculate give more than one token an iteration."""
_ENOUGH_STEPS = 64.0
"""Sequence steps on which the tokens of a stream that ended may rest, however long it was."""
STEPS_PER_S = 2000
"""No engine steps faster: the fastest take a few milliseconds a step, and several behind one address are summed."""
JUMP_STEPS = 4096
"""Step numbers may jump this far whatever time passed: reports get lost, and come in bursts."""


@dataclass(slots=True, eq=False, kw_only=True)
class InFlight:
    """One request in one engine. `prompt_tokens` and `tokens` (seen in its stream) are those of all its sequences.

    `sent` is the iteration known when it was sent, `place` the latest that its tokens prove, `start` the iteration of
    its first token since the last (re)start (None: it waits). `done_tokens` were generated before `start` or before
    it finished. `processed_prompt_tokens` are known to be computed. The last three fields belong to the energy
    accounting: tokens that were charged already, and joules.
    """

    request_id: int
    streams: bool
    sequences: int
    prompt_tokens: int
    sent: int
    place: int
    tokens: int = 0
    start: int | None = None
    done_tokens: int = 0
    corrected: float = -math.inf
    processed_prompt_tokens: int = 0
    charged_prompt_tokens: int = 0
    charged_output_tokens: int = 0
    energy_j: float = 0.0

    @property
    def length(self) -> int:
        """Output tokens of one sequence, as far as they were seen."""
        return -(-self.tokens // self.sequences)


class Progress:
    """The requests in one engine from one connection to the next. A token or a report is O(1), except that requests
    which do not stream are looked through when they start.
    """

    def __init__(self, engine: int, *, exact: bool) -> None:
        self.engine = engine
        self.exact = exact
        self.in_flight: dict[int, InFlight] = {}
        self.iteration = -1
        """The latest iteration reported to the core; -1 before the first."""
        self._waiting: dict[int, InFlight] = {}
        self._silent_waiting = 0
        self._sequences = 0
        self._streaming = 0
        self._reports = False
        self._first_step: int | None = None
        self._last_step: int | None = None
        self._streams_prove = True
        self._rate = TokenRate()
        self._reported_rate = 1.0
        self._beyond_steps = 0.0
        """Tokens that steps gave a sequence beyond the first of each."""
        self._begun: list[InFlight] = []
        """Those that started since the last step number: where in between is known once the next one comes."""

    @property
    def needs_timer(self) -> bool:
        """Only time can show progress: requests run, none of them streams, and the engine numbers no steps."""
        if self.exact or self._first_step is not None or self._streaming > 0:
            return False
        return self._sequences > 0 or (self._silent_waiting > 0 and not self._reports)

    @property
    def tokens_per_step(self) -> float:
        """Iterations in one step of the engine: what it gave a sequence of late on the mean; 1 without speculation."""
        return self._rate.mean

    def dispatched(self, request_id: int, *, streams: bool, sequences: int = 1, prompt_tokens: int = 0) -> None:
        """A request is about to be sent; `streams`: its tokens will be seen as they come."""
        at = self.iteration
        flight = InFlight(
            request_id=request_id,
            streams=streams,
            sequences=max(1, sequences),
            prompt_tokens=prompt_tokens,
            sent=at,
            place=at,
        )
        self.in_flight[request_id] = self._waiting[request_id] = flight
        self._silent_waiting += not streams

    def token(self, request_id: int, count: int = 1) -> Sequence[Event]:
        """`count` tokens of a request came, of all its sequences together."""
        flight = self.in_flight.get(request_id)
        if flight is None or count < 1:
            return ()
        before = -(-flight.tokens // flight.sequences)
        flight.tokens += count
        if self.exact:
            return ()
        length = -(-flight.tokens // flight.sequences)
        if self._streams_prove:
            flight.place = max(flight.place + length - before, self.iteration - 1)
        else:
            flight.place = self.iteration
        events: list[Event] = []
        if flight.start is None or flight.place > self.iteration:
            events = self._reach(max(self.iteration, flight.place, 0), [flight] if flight.start is None else [])
        assert flight.start is not None
        ahead = self.iteration - flight.start + 1 - length
        if abs(ahead) >= _TOLERATED_TOKENS and flight.sequences == 1:
            # Preempted in between, or several tokens in a chunk (which step numbers explain already).
            explained = self._first_step is not None and ahead > 0
            if not explained and self.iteration - flight.corrected >= _CORRECT_EVERY:
                flight.start += ahead
                flight.corrected = self.iteration
                events.append(Progressed(engine=self.engine, request_id=request_id, tokens=length))
        return events

    def ended(self, request_id: int, tokens: int | None) -> Sequence[Event]:
        """A request has its whole output, of `tokens` in all where the engine reported it. It stays in flight until
        `left`, so that its last tokens can be charged.
        """
        flight = self.in_flight.get(request_id)
        if flight is None or self.exact:
            return ()
        known = (flight.streams and self._first_step is None) or tokens is not None
        flight.tokens = flight.tokens if tokens is None else tokens
        begins = flight.start is None and (flight.tokens > 0 or not known)
        events = self._reach(max(self.iteration, flight.sent + 1), [flight] if begins else [])
        if known and flight.start is not None and flight.length != self.iteration - flight.start + 1:
            events.append(Progressed(engine=self.engine, request_id=request_id, tokens=max(1, flight.length)))
        events.append(Stepped(engine=self.engine, iteration=self.iteration, finished=(request_id,)))
        return events

    def left(self, request_id: int) -> InFlight | None:
        """Nothing of a request is in the engine any more; its record, None if it was not in flight."""
        flight = self.in_flight.pop(request_id, None)
        if flight is None:
            return None
        if self._waiting.pop(request_id, None) is not None:
            self._silent_waiting -= not flight.streams
        elif not self.exact:
            self._sequences -= flight.sequences
            self._streaming -= flight.streams
        return flight

    def output_tokens(self, flight: InFlight) -> int:
        """Output tokens of a request, of all its sequences together, by its stream and by the iterations it ran."""
        if flight.streams and not self.exact and self._first_step is None:
            return flight.tokens
        ran = 0 if flight.start is None else (self.iteration - flight.start + 1) * flight.sequences
        return max(flight.tokens, flight.done_tokens + ran)

    def needs_counts(self, request_id: int) -> bool:
        """Whether a stream that ended without a count had more steps than the rate rests on, by which its tokens would
        be counted: an engine's counters that are read from time to time may show none of them yet.
        """
        flight = self.in_flight.get(request_id)
        if flight is None or not flight.streams or self.exact:
            return False
        return self._rate.evidence < min(flight.tokens, _ENOUGH_STEPS)

    def seen_tokens(self, request_id: int) -> int:
        """Output tokens so far of a request whose end the engine reported without a count; 0: nothing shows them."""
        flight = self.in_flight.get(request_id)
        if flight is None:
            return 0
        if flight.start is not None and self._first_step is not None:
            # Its events hold a step's tokens at least; numbers that are scraped come late.
            return max(self.output_tokens(flight), round(flight.tokens * self._rate.mean))
        return max(flight.tokens, flight.done_tokens) if flight.streams or self.exact else 0

    def report(self, report: Report, *, elapsed_s: float = 0.0) -> Sequence[Event]:
        """What the engine reported of itself, `elapsed_s` after the last step that it reported."""
        before = self._last_step
        step = None if report.step is None else self._numbered(report, report.step, elapsed_s)
        if self.exact:
            return () if step is None else self._named(report, step)
        self._reports = True
        at = self.iteration if step is None else max(self.iteration, step)
        began = self._covered(report.running) if self._silent_waiting else []
        events = self._reach(max(at, 0) if began else at, began)
        if report.step is not None:
            events += self._placed(steps=0 if before is None else report.step - before)
        if abs(self._rate.low / self._reported_rate - 1.0) >= _RATE_STEP:
            self._reported_rate = self._rate.low
            events.append(RateChanged(engine=self.engine, tokens_per_step=self._reported_rate))
        events.append(
            Observed(engine=self.engine, running=report.running, waiting=report.waiting, kv_blocks=report.kv_blocks)
        )
        return events

    def tick(self) -> Sequence[Event]:
        """The predicted time of one iteration passed: an iteration, if nothing else shows progress."""
        return self._reach(self.iteration + 1, [], assumed=True) if self.needs_timer else ()

    # ---- iterations ------------------------------------------------------------------------------------------

    def _named(self, report: Report, iteration: int) -> list[Event]:
        """A step that names its requests. Their tokens are counted by the iterations in which they ran."""
        started, finished = report.started or (), report.finished or ()
        for request_id in report.preempted:
            if flight := self.in_flight.get(request_id):
                flight.done_tokens, flight.start = self.output_tokens(flight), None
        self.iteration = max(self.iteration, iteration)
        for request_id in started:
            if flight := self.in_flight.get(request_id):
                flight.start = self.iteration
        for request_id in finished:
            if flight := self.in_flight.get(request_id):
                flight.done_tokens, flight.start = self.output_tokens(flight), None
        return [
            Stepped(
                engine=self.engine,
                iteration=self.iteration,
                started=started,
                finished=finished,
                preempted=report.preempted,
            )
        ]

    def _numbered(self, report: Report, step: int, elapsed_s: float) -> int:
        """The iteration that a step number stands for. A number that goes back, or further ahead than the engine can
        have come since, starts the numbering from the iteration at hand.
        """
        most = JUMP_STEPS + STEPS_PER_S * elapsed_s
        restarted = self._last_step is not None and not 0 <= step - self._last_step <= most
        if self._first_step is None or restarted:
            self._first_step, self._beyond_steps = step - max(0, self.iteration), 0.0
            if report.accepted_tokens is not None:
                self._learned(report, 1)
        else:
            if report.accepted_tokens is not None and self._last_step is not None:
                self._speculated(report, step - self._last_step)
            if self.iteration - (step - self._first_step + int(self._beyond_steps)) > _TRUSTED_AHEAD:
                self._streams_prove = False
                self._first_step, self._beyond_steps = step - self.iteration, 0.0
        self._last_step = step
        return step - self._first_step + int(self._beyond_steps)

    def _speculated(self, report: Report, steps: int) -> None:
        """Count what these steps of an engine that speculates gave: each sequence a token, and the accepted ones."""
        accepted, sequences = report.accepted_tokens or 0, self._learned(report, steps)
        if sequences > 0:
            self._beyond_steps += steps * min(accepted / sequences, MOST_TOKENS_PER_STEP)

    def _learned(self, report: Report, steps: int) -> int:
        """Learn the rate of an engine that speculates from what these steps gave; sequences that they add up to."""
        generated = report.generated_tokens or 0
        sequences = generated - (report.accepted_tokens or 0)
        self._streams_prove = False
        self._rate.learn(generated, sequences, steps)
        return sequences

    def _placed(self, *, steps: int) -> list[Event]:
        """Streams that began somewhere in the last `steps` of an engine that speculates are as far as their own events
        show, at the mean tokens of a step: the other iterations were before them.
        """
        begun, self._begun = self._begun, []
        events: list[Event] = []
        for flight in begun if steps > 1 and not self._streams_prove else ():
            length = max(1, round(flight.length * self._rate.mean))
            if flight.request_id in self.in_flight and self.iteration - length + 1 > (flight.start or 0):
                flight.start = self.iteration - length + 1
                events.append(Progressed(engine=self.engine, request_id=flight.request_id, tokens=length))
        return events

    def _reach(self, iteration: int, began: list[InFlight], *, assumed: bool = False) -> list[Event]:
        """Report that this iteration is over, if that is news, and which requests started in it. `assumed`: nothing but
        time shows it.
        """
        news = iteration > self.iteration
        self.iteration = iteration
        if news and self._silent_waiting and not self._reports:
            # Nothing but time shows requests that do not stream: they are taken to start at once.
            began = began + [flight for flight in self._waiting.values() if not flight.streams and flight not in began]
        if not news and not began:
            return []
        for flight in began:
            flight.start = iteration
            flight.place = max(flight.place, iteration - 1)
            del self._waiting[flight.request_id]
            self._silent_waiting -= not flight.streams
            self._sequences += flight.sequences
            self._streaming += flight.streams
            if flight.streams and self._last_step is not None:
                self._begun.append(flight)
        started = tuple([flight.request_id for flight in began]) if began else ()
        return [Stepped(engine=self.engine, iteration=iteration, started=started, assumed=assumed)]

    def _covered(self, running: int) -> list[InFlight]:
        """Requests that do not stream and must be among this many running sequences: first come, first served."""
        found: list[InFlight] = []
        running -= self._sequences
        for flight in self._waiting.values():
            running -= flight.sequences
            if running < 0:
                break
            if not flight.streams:
                found.append(flight)
        return found
