"""Joules of one engine's GPUs, shared among the requests that caused them.

The GPU's own counter is the truth: whatever it rose by since the last settlement is shared by the tokens that each
request processed in that time (prompt tokens in full when its first token is out, then one per output token), or is
idle energy. So requests' and idle joules always add up to the counter. Knows nothing of plans or SLOs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from throttllem.core.clocks.savings_estimate import SavingsEstimate
from throttllem.core.types import EngineSpec
from throttllem.engines.base import Report
from throttllem.engines.progress import InFlight, Progress
from throttllem.gateway.energy.prior_estimate import PriorEstimate, PriorSaving
from throttllem.gateway.energy.table_meter import TableMeter
from throttllem.gpu.device import Gpu, Reading, Work

log = logging.getLogger("throttllem.gateway")

_UNREAD = Reading(clock_mhz=None, watts=0.0, energy_j=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """Joules of one engine's GPUs since the gateway started: of requests, of those without control while no other ran
    (`uncontrolled_j`), and idle. `top_j` is the estimate for the same
    load at the maximum clock (None: there is no performance table), `advised_j` that at the clocks of a dry run
    (None: there was none). Savings are therefore estimates. All are None where the GPUs are simulated and the model is
    not known.
    """

    total_j: float | None = 0.0
    idle_j: float | None = 0.0
    uncontrolled_j: float | None = 0.0
    top_j: float | None = None
    advised_j: float | None = None
    watts: float | None = 0.0
    prior: PriorSaving | None = None
    """What a dry run would save before any profile; None: there is a table, or nothing to say yet."""

    @property
    def saved(self) -> float | None:
        """The fraction of `top_j` that was not taken, negative where it took more; None: nothing to compare."""
        return 1.0 - self.total_j / self.top_j if self.top_j and self.total_j is not None else None

    @property
    def would_save(self) -> float | None:
        """The fraction of `total_j` that the clocks of the dry run would not have taken; None: there was none."""
        return 1.0 - self.advised_j / self.total_j if self.advised_j is not None and self.total_j else None


@dataclass(slots=True)
class _Done:
    """What the engine did since the last settlement. `kv_block_steps` sums the blocks in use over the steps."""

    seconds: float = 0.0
    steps: int = 0
    output_tokens: int = 0
    prompts: int = 0
    prompt_tokens: int = 0
    kv_block_steps: int = 0


@dataclass(slots=True, kw_only=True)
class EnergyAccounting:
    """The energy of one engine. One writer: its backend, which settles before a request leaves, before the engine's
    first request after idle time, and a few times a second.

    `kv_blocks` returns the scoreboard's estimate. `at_maximum` and `dry_run` estimate what other clocks would have
    taken (None: there is no performance table, or no dry run), `prior` what a dry run without a table
    would save. `meter` holds decoding against the table (None: there is
    none, or the engine does not run on `gpu`), while `external` returns 0 sequences of other clients.
    """

    gpu: Gpu
    now: Callable[[], float]
    kv_blocks: Callable[[], int]
    at_maximum: SavingsEstimate | None = None
    dry_run: SavingsEstimate | None = None
    prior: PriorEstimate | None = None
    meter: TableMeter | None = None
    external: Callable[[], int] = lambda: 0
    known: Callable[[], bool] = lambda: True
    """Whether the counter's joules are those of the engine's GPUs, real or modelled."""
    total_j: float = 0.0
    idle_j: float = 0.0
    uncontrolled_j: float = 0.0
    _uncontrolled: int = 0
    _progress: Progress | None = None
    _block_tokens: int = 1
    _iteration: int = -1
    _settled_s: float = 0.0
    _counted_j: float = 0.0
    _measured: _Done = field(default_factory=_Done)
    _stepping: bool = False
    """An engine that measures its own steps may be within one: its report will account for the time."""
    _emptied: bool = True
    """No request was in the engine at some time since the last settlement or measured step."""
    _last: Reading = _UNREAD
    _unreadable: bool = False
    _dry_runs: bool = False

    def begin(self, spec: EngineSpec, progress: Progress) -> None:
        """The engine is up; from here on the counter's rise belongs to it."""
        for estimate in (self.at_maximum, self.dry_run, self.prior):
            if estimate is not None:
                estimate.spec = spec
        self._progress, self._block_tokens, self._iteration = progress, spec.block_tokens, progress.iteration
        self._settled_s, self._measured = self.now(), _Done()
        self._stepping, self._emptied = False, True
        self._counted_j = self.reading().energy_j

    def end(self) -> None:
        """The engine is lost or stopped: what it drew until now is settled."""
        self.settle(ending=True)
        self._idle(0.0)  # what a step under way drew
        self._progress = None

    def reading(self) -> Reading:
        """The GPUs' reading. While they cannot be read, the last one with an unknown clock; logged once."""
        try:
            self._last = self.gpu.read()
        except OSError as error:
            if not self._unreadable:
                log.error("the GPU cannot be read: %s", error)
            self._unreadable = True
            return replace(self._last, clock_mhz=None, dry_run_mhz=None, stands_for_mhz=None)
        self._unreadable = False
        return self._last

    def dispatching(self) -> None:
        """A request is about to be sent to the engine."""
        if self._progress is not None and not self._progress.in_flight:
            self.settle()
            self._stepping = True

    def uncontrolled(self, requests: int) -> None:
        """The number of requests that compute without control from now on."""
        if self._progress is not None:
            self.settle()
        self._uncontrolled = requests

    def processed_prompts(self, tokens: int) -> None:
        """The engine reported how many prompt tokens a step held, not whose: first come, first charged."""
        if self._progress is None:
            return
        for flight in self._progress.in_flight.values():
            share = min(tokens, flight.prompt_tokens - flight.processed_prompt_tokens)
            flight.processed_prompt_tokens += share
            tokens -= share
            if not tokens:
                return

    def measured(self, report: Report) -> None:
        """A simulated engine's report of a step, with its seconds and joules, and whose prompts were in it."""
        if self._progress is None:
            return
        now_s, seconds = self.now(), report.seconds or 0.0
        if self._emptied or not self._progress.in_flight:
            self._share(self._progress)
            self._idle(max(0.0, now_s - seconds - self._settled_s))
        self._settled_s = now_s
        self._stepping, self._emptied = report.running + report.waiting > 0, not self._progress.in_flight
        done, prompt_tokens = self._measured, 0
        for request_id, tokens in report.prefills:
            prompt_tokens += tokens
            if flight := self._progress.in_flight.get(request_id):
                flight.processed_prompt_tokens += tokens
        done.seconds += seconds
        done.steps += 1
        done.output_tokens += report.decode_sequences or 0
        done.prompts += len(report.prefills)
        done.prompt_tokens += prompt_tokens
        done.kv_block_steps += report.kv_blocks or 0
        self.gpu.worked(
            Work(
                seconds=seconds,
                decode_sequences=report.decode_sequences or 0,
                kv_tokens=report.kv_tokens or 0,
                prefill_tokens=prompt_tokens,
                prefill_pairs=report.prefill_pairs,
                joules=report.joules,
            )
        )

    def settle(self, *, ending: bool = False) -> None:
        """Share the joules since the last settlement, or count them as idle. While a request is in flight and no token
        shows whose the time was, it stays open; `ending`: nothing will show it later.
        """
        progress = self._progress
        self._emptied = self._emptied or ending
        if progress is None or self._share(progress) or (progress.in_flight and not ending):
            return
        if not (progress.exact and self._stepping):
            self._idle(self.now() - self._settled_s)

    def energy(self) -> Energy:
        """The totals so far, settled up to now."""
        self.settle()
        if not self.known():
            return Energy(total_j=None, idle_j=None, uncontrolled_j=None, watts=None)
        top = self.at_maximum
        return Energy(
            total_j=self.total_j,
            idle_j=self.idle_j,
            uncontrolled_j=self.uncontrolled_j,
            top_j=top.joules() if top is not None and top.table.clocks_measured else None,
            advised_j=self.dry_run.joules() if self.dry_run is not None and self._dry_runs else None,
            watts=self.reading().watts,
            prior=self.prior.saving() if self.prior is not None else None,
        )

    def _share(self, progress: Progress) -> bool:
        """Share by the tokens processed since the last settlement; False if there were none."""
        shares: list[tuple[InFlight, int]] = []
        output_tokens = prompts = prompt_tokens = 0
        pending = False
        for flight in progress.in_flight.values():
            output = progress.output_tokens(flight)
            if output > 0:
                flight.processed_prompt_tokens = max(flight.processed_prompt_tokens, flight.prompt_tokens)
            pending = pending or output == 0
            decoded = max(0, output - flight.charged_output_tokens)
            prefilled = flight.processed_prompt_tokens - flight.charged_prompt_tokens
            if decoded or prefilled > 0:
                flight.charged_output_tokens += decoded
                flight.charged_prompt_tokens += prefilled
                shares.append((flight, decoded + prefilled))
                output_tokens += decoded
                prompts += prefilled > 0
                prompt_tokens += prefilled
        if not shares:
            return False
        if progress.exact:
            done, self._measured = self._measured, _Done()
        else:
            done = self._unmeasured(progress, output_tokens, prompts, prompt_tokens)
        self._iteration = progress.iteration
        reading, rate = self.reading(), progress.tokens_per_step
        joules = self._rise(reading)
        self.total_j += joules
        for flight, tokens in shares:
            flight.energy_j += joules * tokens / (output_tokens + prompt_tokens)
        if self.meter is not None and not (pending or prompts or reading.limit_mhz or self.external()):
            self.meter.decoded(
                seconds=done.seconds,
                joules=joules,
                steps=done.steps,
                output_tokens=done.output_tokens,
                kv_block_steps=done.kv_block_steps,
                clock_mhz=reading.clock_mhz,
                tokens_per_step=rate,
            )
        self._dry_runs = self._dry_runs or reading.dry_run_mhz is not None
        if self.prior is not None:
            self.prior.worked(
                seconds=done.seconds,
                joules=joules,
                output_tokens=done.output_tokens,
                prompts=done.prompts,
                prompt_tokens=done.prompt_tokens,
                tokens_per_step=rate,
            )
        for estimate, other_mhz in ((self.at_maximum, None), (self.dry_run, reading.planned_on_mhz)):
            if estimate is not None:
                estimate.worked(
                    seconds=done.seconds,
                    joules=joules,
                    steps=done.steps,
                    output_tokens=done.output_tokens,
                    prompts=done.prompts,
                    prompt_tokens=done.prompt_tokens,
                    kv_block_steps=done.kv_block_steps,
                    clock_mhz=reading.clock_mhz,
                    other_mhz=other_mhz,
                    tokens_per_step=rate,
                )
        return True

    def _unmeasured(self, progress: Progress, output_tokens: int, prompts: int, prompt_tokens: int) -> _Done:
        """The time since the last settlement as equal steps, which a simulated GPU draws power by. An iteration is an
        output token of each sequence; prompts take whole steps of the engine, which are fewer where it speculates.
        """
        now_s = self.now()
        seconds, self._settled_s = now_s - self._settled_s, now_s
        steps, kv_blocks = max(1, progress.iteration - self._iteration), self.kv_blocks()
        engine_steps = max(1.0, steps / progress.tokens_per_step)
        self.gpu.worked(
            Work(
                seconds=seconds,
                decode_sequences=round(output_tokens / steps),
                kv_tokens=kv_blocks * self._block_tokens,
                prefill_tokens=round(prompt_tokens / engine_steps),
                prefill_pairs=prompt_tokens * prompt_tokens / (2.0 * max(1, prompts) * engine_steps),
            )
        )
        return _Done(
            seconds=seconds,
            steps=steps,
            output_tokens=output_tokens,
            prompts=prompts,
            prompt_tokens=prompt_tokens,
            kv_block_steps=kv_blocks * steps,
        )

    def _idle(self, seconds: float) -> None:
        """No controlled request ran for `seconds`; the counter's rise is idle energy, or that of uncontrolled ones."""
        if seconds > 0:
            self.gpu.idled(seconds)
            self._settled_s += seconds
        joules = self._rise(self.reading())
        self.total_j += joules
        if self._uncontrolled:
            self.uncontrolled_j += joules
        else:
            self.idle_j += joules
        for estimate in (self.at_maximum, self.dry_run, self.prior):
            if estimate is not None:
                estimate.idle(seconds, joules)

    def _rise(self, reading: Reading) -> float:
        before_j, self._counted_j = self._counted_j, reading.energy_j
        return reading.energy_j - before_j
