"""Measures the points of a live profile: holds each batch constant, sends prompts into it, records every iteration.

By the engine's step reports where there are any, else by its streams. Knows nothing of files.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from throttllem.core.forecast.switch_latency import ProfiledSwitches
from throttllem.core.types import EngineSpec
from throttllem.engines.base import Connected, EngineError, LiveEngine
from throttllem.gpu.device import ClockError, Gpu, Work
from throttllem.profiling.live.iterations import (
    STEPS,
    STREAMS,
    Decoding,
    Iteration,
    decode_seconds,
    decode_steps,
    decode_windows,
    lone_prompt,
    prefill_delays,
    prefill_steps,
)
from throttllem.profiling.live.load import EngineLoad, ExternalLoadError, Prompts, Stream, now
from throttllem.profiling.live.plan import (
    BURST_OUTPUT_TOKENS,
    LONE_OUTPUT_TOKENS,
    LivePlan,
    LivePoint,
    live_points,
    longer,
)
from throttllem.profiling.live.switches import timed_switches

Progress = Callable[[str, float], None]
"""Called with the work in progress and the share that is done (0 to 1)."""
Rows = list[dict[str, object]]
"""The iterations of a point, with their watts (None: modelled)."""

LISTEN_S, LISTEN_EXACT_S = 1.0, 0.05
WARM_OUTPUT_TOKENS = 24
TRIES, OVERHEAD_TRIES, LONE_TRIES = 3, 9, 3
SHORT_PROMPT = 16
RECENT = 3
METER_S = 1.0
"""A quick profile has one reading of watts for each batch and burst: for this long at least, as energy counters are
refreshed every 0.1 s."""
MOST_COPIES = 40
_NO_STEPS = (
    "the engine speculates and reports no steps, so tokens do not show how long a step takes: install the plug-in, or "
    "profile without speculation"
)
SWITCHES = "switches"
"""The key of the switches of clocks, which are timed before the first point."""
SWITCHES_OUTPUT_TOKENS = 512
MOSTLY = 0.8
"""Least share of a burst's time in its prompts' steps, where the watts of the other steps are subtracted. With a half
of it an error of the counter, or of the seconds on a busy machine, counts twice: 440 W of a GPU of 350 W were seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The GPUs of the engine. `modelled(clock_mhz, work)`: watts of simulated GPUs, whose clock does not affect the
    engine; None: real GPUs, whose clock is set and whose energy counter is read.
    """

    gpu: Gpu
    clocks_mhz: tuple[int, ...]
    modelled: Callable[[int, Work], float] | None = None


@dataclass(slots=True)
class Summary:
    """What a user should know of a profile; filled while it is measured."""

    by: str = STREAMS
    notes: tuple[str, ...] = ()
    repeated: int = 0
    """Points measured again, because another client used the engine."""
    empty: int = 0
    """Points without an iteration."""
    switches: tuple[ProfiledSwitches, ...] = ()


class LiveProfiler:
    """Profiles one engine that was reached as `connected`. `run` may be called once."""

    def __init__(
        self,
        engine: LiveEngine,
        connected: Connected,
        device: Device,
        plan: LivePlan,
        *,
        served_as: str | None = None,
    ) -> None:
        self.spec: EngineSpec = connected.spec
        self.summary = Summary()
        self._device = device
        self._plan = plan
        self._prompts = Prompts(engine, served_as or connected.models[0])
        # An engine that reports every step is silent while it has none.
        self._listen_s = LISTEN_EXACT_S if connected.exact else LISTEN_S
        self._load = EngineLoad(engine, self._prompts, quiet_s=2 * self._listen_s)
        self._overhead_s = 0.0
        self._exact = False

    async def run(
        self, known: Mapping[str, Rows], add: Callable[[str, Rows], None], progress: Progress = lambda *_: None
    ) -> None:
        """Measure every point that is not `known`, until the plan's end, and `add` each.

        Raises EngineError, ClockError, and ExternalLoadError if another client keeps using the engine.
        """
        keys = self._keys()
        async with self._load.watching():
            await self._begin()
            if self._device.modelled is None and SWITCHES not in known:
                progress("switches of clocks", 0.0)
                add(SWITCHES, await self._switches())
            began_s, limit_s = now(), self._plan.seconds
            for done, (key, point, clock_mhz) in enumerate(keys):
                spent_s = now() - began_s
                if limit_s is not None and spent_s >= limit_s:
                    break
                share = max(done / len(keys), 0.0 if limit_s is None else spent_s / limit_s)
                progress(f"batch {point.batch} of {point.context_tokens} tokens" if point.batch else "prompts", share)
                if key not in known:
                    add(key, await self._point_at(point, clock_mhz))
        progress("measured", 1.0)

    def _keys(self) -> list[tuple[str, LivePoint, int | None]]:
        """Every point, at each clock where the clock makes a difference, the highest first."""
        points = live_points(self.spec, self._plan)
        if self._device.modelled is not None:
            return [(str(point.number), point, None) for point in points]
        clocks = sorted(self._device.clocks_mhz, reverse=True)
        return [(f"{point.number}@{clock}", point, clock) for point in points for clock in clocks]

    # ---- before the first point ----------------------------------------------------------------------------------

    async def _begin(self) -> None:
        """Check that the engine is idle, warm it up, and find what it accepts and reports and a request's overhead."""
        load = self._load
        limit_s = now() + self._listen_s
        while not load.reported and now() < limit_s:
            await load.wait(self._listen_s)
        await load.idle()
        await self._prompts.begin()
        for _ in range(2):
            warm = [await load.open(SHORT_PROMPT, WARM_OUTPUT_TOKENS) for _ in range(min(2, self.spec.max_batch))]
            await load.ended(warm)
        steps = [report for report in load.reports if report.seconds and report.generated_tokens]
        self.summary.by = STEPS if steps else STREAMS
        self._exact = bool(steps) and all(report.decode_sequences is not None for report in steps)
        self.summary.notes = self._prompts.notes
        if not load.reported:
            self.summary.notes += ("the engine does not report its load: requests of other clients go unnoticed",)
        await load.idle()
        self._overhead_s = await self._overhead()

    async def _overhead(self) -> float:
        """The time to the first token of a prompt of one token, less a decode step."""
        found = []
        for _ in range(OVERHEAD_TRIES):
            stream = await self._load.open(1, LONE_OUTPUT_TOKENS)
            await self._load.ended([stream])
            if (gap_s := stream.gap_s) is not None:
                found.append(stream.times_s[0] - stream.sent_s - gap_s)
        return max(0.0, statistics.median(found)) if found else 0.0

    async def _switches(self) -> Rows:
        """What switches of the clocks take while one request decodes."""
        streams = list[Stream]()
        longest = min(SWITCHES_OUTPUT_TOKENS, self.spec.max_context_tokens - SHORT_PROMPT)

        async def at_work() -> None:
            if not streams or _any_ended(streams):
                streams[:] = [await self._load.open(SHORT_PROMPT, longest)]
                await self._load.until(lambda: streams[0].length > 1 or _any_ended(streams))

        device = self._device
        found = await timed_switches(device.gpu, device.clocks_mhz, at_work, seed=self._plan.seed)
        await self._load.idle()
        self.summary.switches = found
        return [dataclasses.asdict(each) for each in found]

    # ---- one point -----------------------------------------------------------------------------------------------

    async def _point_at(self, point: LivePoint, clock_mhz: int | None) -> Rows:
        """Its iterations at one clock. Raises ClockError if the GPUs did not run at it throughout."""
        gpu = self._device.gpu
        if clock_mhz is None:
            return await self._point(point)
        await gpu.set_clock(clock_mhz)
        began_s = now()
        rows = await self._point(point)
        work = Work(seconds=now() - began_s, decode_sequences=0, kv_tokens=0, prefill_tokens=0, prefill_pairs=0.0)
        gpu.worked(work)
        reading = gpu.read()
        if reading.misplaced:
            raise ClockError(reading.misplaced)
        if (why := reading.trouble or reading.held) or reading.clock_mhz != clock_mhz:
            raise ClockError(f"{clock_mhz} MHz, at {reading.clock_mhz} MHz: {why or 'may the keeper set it? --clocks'}")
        return rows

    async def _point(self, point: LivePoint) -> Rows:
        """Its iterations; measured again if another client used the engine meanwhile, and with longer outputs if some
        ended before all had begun.
        """
        for attempt in range(TRIES):
            try:
                await self._load.idle()
                rows = await (self._batch(point) if point.batch else self._lone(point))
                while not rows and (more := longer(point, self.spec)) is not None:
                    self._load.check()
                    await self._load.idle()
                    point, rows = more, await self._batch(more)
                self._load.check()
                if self.summary.by == STREAMS and any(report.accepted_tokens for report in self._load.reports):
                    raise EngineError(_NO_STEPS, status=503)
                break
            except ExternalLoadError:
                self.summary.repeated += 1
                if attempt == TRIES - 1:
                    raise
        await self._load.idle()
        self.summary.empty += not rows
        return rows

    async def _lone(self, point: LivePoint) -> Rows:
        """Prompts one at a time in an otherwise idle engine."""
        found: Rows = []
        alone = Decoding(batch=0, exact=self._exact)
        for burst in point.bursts:
            watts, streams, steps = self._meter(), list[Stream](), list[Iteration]()
            while not steps and len(streams) < LONE_TRIES:
                await self._load.idle()
                streams.append(await self._load.open(burst.tokens, point.output_tokens))
                await self._load.ended(streams)
                lengths = [streams[-1].prompt_tokens]
                steps = prefill_steps(self._load.reports, lengths, self.spec.block_tokens, alone)
            timed = lone_prompt(streams, self._overhead_s, self.spec.block_tokens)
            found += _rows(steps[:1] or ([timed] if timed else []), watts())
        return found

    async def _batch(self, point: LivePoint) -> Rows:
        """A batch held constant: its decode iterations, then those of the bursts of prompts sent into it."""
        load = self._load
        streams = [await load.open(point.context_tokens, point.output_tokens) for _ in range(point.batch)]
        await load.until(lambda: all(stream.length > 1 for stream in streams) or _any_ended(streams))
        watts, mark, least_s = self._meter(), len(load.reports), now() + (METER_S if self._plan.quick else 0.0)
        await load.until(
            lambda: _any_ended(streams) or (now() >= least_s and len(self._decoded(streams, mark)) >= self._plan.steps)
        )
        decoded = self._decoded(streams, mark)[: self._plan.steps]
        decode_w = watts()
        found = _rows(decoded, decode_w)
        if not decoded:
            return found
        # Contexts grow, and a step takes longer with them: the decode step is measured again before each burst.
        recent_s = [statistics.median(each.seconds for each in decoded)]
        rate = statistics.mean(each.tokens_per_step for each in decoded)
        for burst in point.bursts:
            if _any_ended(streams):
                break
            decoding = Decoding(batch=point.batch, exact=self._exact, decode_s=statistics.mean(recent_s[-RECENT:]))
            if decoding.neighbours:
                began_s = now()
                await self._further(streams, 2 * decoding.neighbours)
                if step_s := decode_seconds(streams, began_s, now()):
                    recent_s.append(step_s * rate)
                decoding = dataclasses.replace(decoding, decode_s=statistics.mean(recent_s[-RECENT:]))
            lengths = [burst.tokens] * burst.count
            rows = await self._burst(streams, lengths, decoding, decode_w)
            if self._plan.quick and rows and not _any_ended(streams):
                alone_s = statistics.median(float(str(row["seconds"])) for row in rows)
                copies = min(MOST_COPIES, math.ceil(METER_S / alone_s))
                rows = await self._burst(streams, lengths * copies, decoding, decode_w) or rows
            found += rows
        return found

    def _decoded(self, streams: Sequence[Stream], mark: int) -> list[Iteration]:
        """The decode iterations since the report `mark`."""
        if self.summary.by == STEPS:
            return decode_steps(self._load.reports[mark:], Decoding(batch=len(streams), exact=self._exact))
        return decode_windows(streams, self.spec.block_tokens) if _all_began(streams) else []

    async def _burst(
        self, streams: Sequence[Stream], lengths: Sequence[int], decoding: Decoding, decode_w: float | None
    ) -> Rows:
        """Send prompts into a batch, whose own steps draw `decode_w`, and measure the iterations that process them."""
        load, watts, mark, began_s = self._load, self._meter(), len(self._load.reports), now()
        await self._further(streams, decoding.neighbours)
        prompts = [await load.open(tokens, BURST_OUTPUT_TOKENS) for tokens in lengths]
        await load.ended(prompts)
        await self._further(streams, decoding.neighbours + 1)
        if _any_ended(streams) or not _all_began(prompts):
            return []
        if self.summary.by == STEPS:
            counted = [prompt.prompt_tokens for prompt in prompts]
            reports = load.reports[mark:]
            steps = prefill_steps(reports, counted, self.spec.block_tokens, decoding)
            prompts_s = sum(report.seconds or 0.0 for report in reports if report.prompt_tokens)
        else:
            steps = list(prefill_delays(streams, prompts, self.spec.block_tokens, decoding))
            prompts_s = sum(step.seconds for step in steps)
        return _rows(steps, _without_decode(watts(), now() - began_s, prompts_s, decode_w))

    async def _further(self, streams: Sequence[Stream], tokens: int) -> None:
        """Wait until every stream has received this many more tokens."""
        goals = [(stream, stream.length + tokens) for stream in streams]
        await self._load.until(lambda: _any_ended(streams) or all(stream.length >= goal for stream, goal in goals))

    def _meter(self) -> Callable[[], float | None]:
        """A function that returns the mean watts since this call; None if they are modelled."""
        if self._device.modelled is not None:
            return lambda: None
        began_s, began_j = now(), self._device.gpu.read().energy_j

        def watts() -> float | None:
            passed_s = now() - began_s
            return (self._device.gpu.read().energy_j - began_j) / passed_s if passed_s > 0 else None

        return watts


def _rows(iterations: Sequence[Iteration], watts: float | None) -> Rows:
    return [dataclasses.asdict(each) | {"watts": watts} for each in iterations]


def _without_decode(watts: float | None, passed_s: float, prompts_s: float, decode_w: float | None) -> float | None:
    """Mean watts of the steps with prompts, which took `prompts_s`, from the mean over all steps of `passed_s`."""
    if watts is None or decode_w is None or not MOSTLY * passed_s < prompts_s < passed_s:
        return watts
    return (watts * passed_s - decode_w * (passed_s - prompts_s)) / prompts_s


def _any_ended(streams: Sequence[Stream]) -> bool:
    return any(stream.ended_s is not None for stream in streams)


def _all_began(streams: Sequence[Stream]) -> bool:
    return all(stream.times_s for stream in streams)
