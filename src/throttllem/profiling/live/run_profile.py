"""Measure a live engine: hold batches constant over synthetic requests, send prompts into them, time every iteration.

By its steps where it tells them, else by the arrival of tokens. A GPU that is only modelled: once, for all its clocks.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from throttllem.core.types import EngineSpec
from throttllem.engines.base import Connected, LiveEngine
from throttllem.gpu.device import ClockError, Gpu, Work
from throttllem.profiling.live.answer import Answer, now
from throttllem.profiling.live.checkpoint import Checkpoint
from throttllem.profiling.live.plan import (
    BURST_ANSWER_TOKENS,
    LONE_ANSWER_TOKENS,
    LivePlan,
    LivePoint,
    live_points,
    points_in_all,
)
from throttllem.profiling.live.prompts import Prompts
from throttllem.profiling.live.rig import ForeignError, Rig
from throttllem.profiling.live.rows import (
    STEPS,
    STREAMS,
    Pace,
    Row,
    burst_rows,
    decode_sequences,
    gap_s,
    lone_row,
    mean_gap,
    prefill_rows,
    window_rows,
)

Progress = Callable[[str, float], None]
"""Called with what is being done and the share that is done (0 to 1)."""

LISTEN_S, LISTEN_EXACT_S = 1.0, 0.05
WARM_ANSWER_TOKENS = 24
TRIES, OVERHEAD_TRIES, LONE_TRIES = 3, 9, 3
SHORT_PROMPT = 16
RECENT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The GPUs of the engine. `modelled(clock_mhz, work)`: watts of a GPU that is only simulated, whose clock changes
    nothing; None: a real one, whose clock is set and whose energy counter is read.
    """

    gpu: Gpu
    clocks_mhz: tuple[int, ...]
    modelled: Callable[[int, Work], float] | None = None


@dataclass(slots=True)
class Told:
    """What people should know of a profile; filled while it is made."""

    by: str = STREAMS
    notes: tuple[str, ...] = ()
    thrown_away: int = 0
    empty: int = 0


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
        self.told = Told()
        self._device = device
        self._plan = plan
        self._prompts = Prompts(engine, served_as or connected.models[0])
        # An engine that tells every step says nothing while it has none.
        self._listen_s = LISTEN_EXACT_S if connected.exact else LISTEN_S
        self._rig = Rig(engine, self._prompts, quiet_s=2 * self._listen_s)
        self._overhead_s = 0.0
        self._exact = False

    async def run(self, checkpoint: Checkpoint, progress: Progress = lambda *_: None) -> None:
        """Measure every point that the checkpoint lacks, until the plan's end. Raises EngineError; ForeignError if
        somebody else will not leave.
        """
        keys = self._keys()
        async with self._rig.watching():
            await self._begin()
            began_s = now()
            for done, (key, point, clock_mhz) in enumerate(keys):
                spent_s = now() - began_s
                if self._plan.seconds is not None and spent_s >= self._plan.seconds:
                    break
                progress(_described(point), self._share(done, len(keys), spent_s))
                if key not in checkpoint.points:
                    checkpoint.add(key, await self._point_at(point, clock_mhz))
        progress("measured", 1.0)

    async def _point_at(self, point: LivePoint, clock_mhz: int | None) -> list[dict[str, object]]:
        """Raises ClockError where the GPUs leave the clock: what is measured is of another one then."""
        if clock_mhz is None:
            return await self._point(point)
        await self._device.gpu.set_clock(clock_mhz)
        measured = await self._point(point)
        reading = self._device.gpu.read()
        if (why := reading.trouble or reading.held) or reading.clock_mhz != clock_mhz:
            raise ClockError(f"{clock_mhz} MHz, at {reading.clock_mhz} MHz: {why or 'may the keeper set it? --clocks'}")
        return measured

    def _keys(self) -> list[tuple[str, LivePoint, int | None]]:
        """Every point, at every clock where that makes a difference."""
        count = points_in_all(self.spec, self._plan)
        points = [point for point, _ in zip(live_points(self.spec, self._plan), range(count), strict=False)]
        if self._device.modelled is not None:
            return [(str(point.number), point, None) for point in points]
        clocks = sorted(self._device.clocks_mhz, reverse=True)
        return [(f"{point.number}@{clock}", point, clock) for point in points for clock in clocks]

    def _share(self, done: int, count: int, spent_s: float) -> float:
        by_time = 0.0 if self._plan.seconds is None else spent_s / self._plan.seconds
        return min(1.0, max(by_time, done / count))

    # ---- before ----------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        """Is it ours alone, what does it take, what does it tell, what does a request cost beside its iterations?"""
        rig = self._rig
        await self._listen()
        await rig.idle()
        await self._prompts.begin()
        for _ in range(2):
            warm = [await rig.ask(SHORT_PROMPT, WARM_ANSWER_TOKENS) for _ in range(min(2, self.spec.max_batch))]
            await rig.ended(warm)
        steps = [report for report in rig.reports if report.seconds and report.generated_tokens]
        self.told.by = STEPS if steps else STREAMS
        # Else the times are those at which somebody outside the engine heard of its steps.
        self._exact = bool(steps) and all(report.decode_sequences is not None for report in steps)
        notes = list(self._prompts.notes)
        if not rig.speaks:
            notes.append("the engine does not say what runs in it: requests of others would go unnoticed")
        self.told.notes = tuple(notes)
        await rig.idle()
        self._overhead_s = await self._overhead()

    async def _listen(self) -> None:
        """Give the engine time to say what runs in it, before it is asked anything."""
        limit_s = now() + self._listen_s
        while not self._rig.speaks and now() < limit_s:
            await self._rig.pause(self._listen_s)

    async def _overhead(self) -> float:
        """Of the time to a first token, what is not its iteration: that of one prompt token, less a decode step."""
        found = []
        for _ in range(OVERHEAD_TRIES):
            answer = await self._rig.ask(1, LONE_ANSWER_TOKENS)
            await self._rig.ended([answer])
            gap = gap_s(answer)
            if gap is not None:
                found.append(answer.times_s[0] - answer.sent_s - gap)
        return max(0.0, statistics.median(found)) if found else 0.0

    # ---- one point -------------------------------------------------------------------------------------------

    async def _point(self, point: LivePoint) -> list[dict[str, object]]:
        """Its rows; tried again if somebody else was in the engine meanwhile."""
        for attempt in range(TRIES):
            try:
                await self._rig.idle()
                rows = await (self._lone(point) if not point.batch else self._held(point))
                self._rig.check()
            except ForeignError:
                self.told.thrown_away += 1
                if attempt == TRIES - 1:
                    raise
            else:
                break
        await self._rig.idle()
        self.told.empty += not rows
        return rows

    async def _lone(self, point: LivePoint) -> list[dict[str, object]]:
        """Prompts one by one in an engine with nothing else to do."""
        written: list[dict[str, object]] = []
        for burst in point.bursts:
            meter, answers, rows = self._meter(), [], []
            for _ in range(LONE_TRIES):
                await self._rig.idle()
                answers.append(await self._rig.ask(burst.tokens, point.output_tokens))
                await self._rig.ended(answers)
                lengths = [answers[-1].prompt_tokens]
                alone = Pace(batch=0, exact=self._exact)
                rows = prefill_rows(self._rig.reports, lengths, self.spec.block_tokens, alone)
                if rows:
                    break
            timed = lone_row(answers, self._overhead_s, self.spec.block_tokens)
            written += self._written(rows[:1] or ([timed] if timed is not None else []), meter)
        return written

    async def _held(self, point: LivePoint) -> list[dict[str, object]]:
        """A batch that stays as it is: its decode rows, then the bursts that are sent into it."""
        rig = self._rig
        answers = [await rig.ask(point.context_tokens, point.output_tokens) for _ in range(point.batch)]
        await rig.until(lambda: all(answer.length > 1 for answer in answers) or _some_ended(answers))
        meter, mark = self._meter(), len(rig.reports)
        await rig.until(lambda: _some_ended(answers) or len(self._decoded(answers, mark)) >= self._plan.steps)
        rows = self._decoded(answers, mark)[: self._plan.steps]
        written = self._written(rows, meter)
        if not rows:
            return written
        paces = [statistics.median(row.seconds for row in rows)]
        for burst in point.bursts:
            if _some_ended(answers):
                break
            pace = Pace(batch=point.batch, exact=self._exact, decode_s=statistics.mean(paces[-RECENT:]))
            paces += await self._stretch(answers, 2 * pace.neighbours)
            pace = dataclasses.replace(pace, decode_s=statistics.mean(paces[-RECENT:]))
            written += await self._burst(answers, [burst.tokens] * burst.count, pace)
        return written

    async def _stretch(self, answers: Sequence[Answer], tokens: int) -> list[float]:
        """Seconds per step over so many that only decode: contexts grow, and a step takes longer with them."""
        began_s = now()
        await self._further(answers, tokens)
        paces = [pace for answer in answers if (pace := mean_gap(answer, began_s, now())) is not None]
        return [statistics.median(paces)] if paces and tokens else []

    def _decoded(self, answers: Sequence[Answer], mark: int) -> list[Row]:
        if self.told.by == STEPS:
            return decode_sequences(self._rig.reports[mark:], Pace(batch=len(answers), exact=self._exact))
        return window_rows(answers, self.spec.block_tokens) if _began(answers) else []

    async def _burst(self, answers: Sequence[Answer], lengths: Sequence[int], pace: Pace) -> list[dict[str, object]]:
        """Prompts sent into a batch, and a few steps around them."""
        rig, meter, mark = self._rig, self._meter(), len(self._rig.reports)
        await self._further(answers, pace.neighbours)
        prompts = [await rig.ask(tokens, BURST_ANSWER_TOKENS) for tokens in lengths]
        await rig.ended(prompts)
        await self._further(answers, pace.neighbours + 1)
        if _some_ended(answers) or not _began(prompts):
            return []
        if self.told.by == STEPS:
            counted = [prompt.prompt_tokens for prompt in prompts]
            rows = prefill_rows(rig.reports[mark:], counted, self.spec.block_tokens, pace)
        else:
            rows = list(burst_rows(answers, prompts, self.spec.block_tokens, pace))
        return self._written(rows, meter)

    async def _further(self, answers: Sequence[Answer], tokens: int) -> None:
        """Wait until all answers have given so many more tokens."""
        goal = [answer.length + tokens for answer in answers]
        await self._rig.until(
            lambda: (
                _some_ended(answers)
                or all(answer.length >= length for answer, length in zip(answers, goal, strict=True))
            )
        )

    # ---- watts -----------------------------------------------------------------------------------------------

    def _meter(self) -> Callable[[], float | None]:
        """Mean watts from here until it is asked; None where they are modelled."""
        if self._device.modelled is not None:
            return lambda: None
        began_s, began_j = now(), self._device.gpu.read().energy_j

        def watts() -> float | None:
            passed_s = now() - began_s
            return (self._device.gpu.read().energy_j - began_j) / passed_s if passed_s > 0 else None

        return watts

    def _written(self, rows: Sequence[Row], meter: Callable[[], float | None]) -> list[dict[str, object]]:
        watts = meter()
        return [dataclasses.asdict(row) | {"watts": watts} for row in rows]


def _some_ended(answers: Sequence[Answer]) -> bool:
    return any(answer.ended_s is not None for answer in answers)


def _began(answers: Sequence[Answer]) -> bool:
    return all(answer.times_s for answer in answers)


def _described(point: LivePoint) -> str:
    return f"batch {point.batch} of {point.context_tokens} tokens" if point.batch else "prompts alone"
