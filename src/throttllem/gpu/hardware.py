"""Real GPUs of one engine: read by a sampler, set through a keeper (or zeusd), and read back whether they followed.

Three modes: `on` sets clocks; `dry-run` only reports what it would set, and so does `on` for as long as it is not let;
`off` does neither. Knows nothing of requests or plans.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from enum import StrEnum
from types import TracebackType
from typing import Protocol, Self

from throttllem.gpu.device import Reading, Work, nothing
from throttllem.gpu.nvml import Brake, Nvml, NvmlError, NvmlGpu, Sample
from throttllem.gpu.sampler import Sampler

log = logging.getLogger("throttllem.gpu")

WATCH_S = 0.1
HELD_S = 0.3
"""A clock that is elsewhere for so long does not just switch."""
FOLLOW_S = 0.3
LOOK_S = 0.004
AGAIN_S = 1.0
"""So long after a set that failed the next is tried."""
NEAR_MHZ = 8
OTHERS = "another controller sets these clocks"


class Mode(StrEnum):
    """What may be done with clocks."""

    OFF = "off"
    DRY_RUN = "dry-run"
    ON = "on"


class ClockSetter(Protocol):
    """Sets the clocks of a group of GPUs, all or none."""

    async def set(self, mhz: int, sent: Callable[[], None] = nothing) -> int:
        """The clock that they are set to, which may be the nearest that is allowed. Raises OSError."""

    async def give_back(self) -> None:
        """As they were before. Raises OSError."""


class HardwareGpu:
    """The GPUs of one engine, named by UUID or by their number here. To be used as a context manager.

    `clocks_mhz`, ascending, are all that will be asked for. The highest is the GPUs' own top clock; where nothing is
    asked for, it counts as asked.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        *,
        mode: Mode,
        setter: Callable[[tuple[NvmlGpu, ...]], ClockSetter],
        clocks_mhz: tuple[int, ...],
    ) -> None:
        self.names, self._make_setter = names, setter
        self.mode, self._clocks_mhz, self._top_mhz = mode, clocks_mhz, clocks_mhz[-1]
        self.uuids: tuple[str, ...] = ()
        self.ladder_mhz: tuple[int, ...] = ()
        """What they can be locked to, ascending; known once the block has begun, where clocks matter."""
        self._stack = AsyncExitStack()
        self._sampler: Sampler | None = None
        self._setter: ClockSetter | None = None
        self._gate = asyncio.Lock()
        self._asked_mhz: int | None = None
        self._set_mhz: int | None = None
        self._trouble: str | None = None
        self._set_s = self._failed_s = -math.inf  # when it last did; not yet
        self._away_s: float | None = None
        self._held: tuple[int, str] | None = None
        self._allowed_mhz: int | None = None

    async def __aenter__(self) -> Self:
        """Find them. Raises NvmlError if they are not here, ValueError if their clocks are not to be set."""
        async with AsyncExitStack() as stack:
            library = stack.enter_context(ExitStack())
            nvml = library.enter_context(Nvml())
            gpus = tuple(found_gpu(nvml, name) for name in self.names)
            self.uuids = tuple(gpu.uuid for gpu in gpus)
            if len(set(self.uuids)) < len(gpus):
                raise ValueError(f"engines: gpus = {list(self.names)}: one of them is named twice")
            for gpu in gpus if self.mode is not Mode.OFF else ():
                if (use := gpu.use()) is not None:
                    raise ValueError(f"engines: gpus: {gpu.uuid}: {use.value}; leave it out, or [clocks] mode = 'off'")
                self.ladder_mhz = gpu.clocks_mhz()
                strange = sorted(set(self._clocks_mhz) - set(self.ladder_mhz))
                if strange or self.ladder_mhz[-1] != self._clocks_mhz[-1]:
                    why = f"has no {strange[-1]} MHz" if strange else f"goes up to {self.ladder_mhz[-1]} MHz"
                    raise ValueError(
                        f"engines: gpus: {gpu.uuid}, {gpu.name()}, {why}, and the engine's `gpu` goes up to "
                        f"{self._clocks_mhz[-1]} MHz; name its kind (engines.N.gpu, --gpu)"
                    )
            self._sampler = await stack.enter_async_context(
                Sampler(gpus, left_behind=library.pop_all)  # closing NVML would wait for the call that hangs
            )
            self._setter = self._make_setter(gpus)
            stack.push_async_callback(self._leave)
            watching = asyncio.get_running_loop().create_task(self._watch())
            stack.callback(watching.cancel)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    @property
    def advising(self) -> bool:
        """Whether clocks are decided and not set."""
        return self.mode is Mode.DRY_RUN or (self.mode is Mode.ON and self._trouble is not None)

    async def set_clock(self, mhz: int | None, sent: Callable[[], None] = nothing) -> int | None:
        """As the protocol says. Where clocks may not be set this is no error: it is advice then, and said."""
        self._asked_mhz = mhz
        if mhz is None:
            await self._leave()
        elif self.mode is Mode.ON:
            async with self._gate:
                if self._asked_mhz == mhz and time.monotonic() - self._failed_s > AGAIN_S:
                    await self._set(mhz, sent)
        return self.read().planned_on_mhz

    def read(self) -> Reading:
        """The last reading: no call of NVML. Raises OSError while they cannot be read."""
        sampler = self._reading_of()
        samples = sampler.last()
        slowest = min(sample.clock_mhz for sample in samples)
        follows = self._set_mhz is not None and all(_follows(sample, self._set_mhz) for sample in samples)
        allowed = None if self._allowed_mhz is None else (self._allowed_mhz, "the keeper allows no more")
        limit_mhz, held = self._held or allowed or (None, None)
        asked_mhz = self._asked_mhz or self._top_mhz
        return Reading(
            clock_mhz=self._set_mhz if follows else slowest,
            watts=sum(sample.watts for sample in samples),
            energy_j=sampler.joules(),
            advised_mhz=asked_mhz if self.advising else self._top_mhz if self.mode is Mode.OFF else None,
            stands_for_mhz=asked_mhz if follows and self._set_mhz is not None and asked_mhz < self._set_mhz else None,
            limit_mhz=limit_mhz,
            held=held,
            trouble=self._trouble,
        )

    def worked(self, work: Work) -> None:
        """The GPU knows."""

    def idled(self, seconds: float) -> None:
        """The GPU knows."""

    # ---- setting ---------------------------------------------------------------------------------------------

    async def _set(self, mhz: int, sent: Callable[[], None]) -> None:
        """Set, and see what comes of it."""
        assert self._setter is not None
        try:
            got_mhz = await self._setter.set(mhz, sent)
        except OSError as error:
            self._set_mhz, self._allowed_mhz, self._failed_s = None, None, time.monotonic()
            with contextlib.suppress(OSError):  # at what it was set to before it would be too slow for what was asked
                await self._setter.give_back()
            if self._trouble != str(error):
                log.error("clocks are not set, only advised: %s", error)
            self._trouble = str(error)
            return
        if self._trouble is not None:
            log.warning("clocks are set again")
        self._set_mhz, self._set_s, self._trouble = got_mhz, time.monotonic(), None
        self._away_s = None
        if self._held is not None and got_mhz < self._held[0]:
            self._held = None
        self._allowed_mhz = got_mhz if got_mhz < mhz else None
        with contextlib.suppress(OSError):  # what cannot be read is said where it is read
            await self._followed(got_mhz, mhz)

    async def _followed(self, mhz: int, asked_mhz: int) -> None:
        """Wait until they are there, or so long that they will not be, or until another clock is asked for."""
        sampler = self._reading_of()
        while self._asked_mhz == asked_mhz:
            if sampler.newer_than(self._set_s) and all(_follows(sample, mhz) for sample in sampler.last()):
                return
            if time.monotonic() - self._set_s > FOLLOW_S:
                self._judge(sampler.last(), at_once=True)
                return
            sampler.soon()
            await asyncio.sleep(LOOK_S)

    async def _leave(self) -> None:
        self._asked_mhz = None
        async with self._gate:
            self._set_mhz = self._held = self._allowed_mhz = None
            try:
                if self._setter is not None:
                    await self._setter.give_back()  # also where a set has failed half-way
            except OSError as error:
                log.error("clocks were not given back by us: %s", error)

    # ---- watching --------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """A set that failed is tried again; clocks that leave what was set are noticed."""
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                since_s = time.monotonic() - max(self._failed_s, self._set_s)
                again = self._trouble is not None or (self._held is not None and self._held[1] == OTHERS)
                if again and since_s > AGAIN_S and self._asked_mhz is not None and self.mode is Mode.ON:
                    await self.set_clock(self._asked_mhz)
                self._judge(self._reading_of().last())
            except OSError:
                continue  # said by whoever reads
            except Exception:
                log.exception("clocks were not watched this time")

    def _judge(self, samples: tuple[Sample, ...], *, at_once: bool = False) -> None:
        """What holds the clocks, if they are not where they were set to."""
        now_s = time.monotonic()
        if self._set_mhz is not None:
            wanted_mhz = self._set_mhz
            away = [sample for sample in samples if not _follows(sample, wanted_mhz)]
        else:  # free GPUs are as fast as what is advised, or faster
            wanted_mhz = self._asked_mhz or 0
            away = [sample for sample in samples if sample.clock_mhz < wanted_mhz and not _follows(sample, wanted_mhz)]
        if not away:
            if self._held is not None:
                log.warning("clocks follow again: %d MHz", wanted_mhz)
            self._away_s = self._held = None
            return
        self._away_s = now_s if self._away_s is None else self._away_s
        if at_once or now_s - max(self._away_s, self._set_s) > HELD_S:
            slowest = min(away, key=lambda sample: sample.clock_mhz)
            brake = slowest.brake & ~Brake.IDLE
            why = brake.words if brake else OTHERS
            self._hold(slowest.clock_mhz, why)

    def _hold(self, mhz: int, why: str) -> None:
        if self._held is None or self._held[1] != why:
            log.warning("clocks do not follow: %d MHz where %s were asked for: %s", mhz, self._asked_mhz, why)
        self._held = mhz, why

    def _reading_of(self) -> Sampler:
        if self._sampler is None:
            raise OSError("the GPUs have not been found yet")
        return self._sampler


def check_apart(groups: Sequence[HardwareGpu]) -> None:
    """Raise ValueError if two engines have a GPU in common."""
    seen: set[str] = set()
    for uuid in (uuid for group in groups for uuid in group.uuids):
        if uuid in seen:
            raise ValueError(f"engines: gpus: {uuid} is named for two engines; an engine has its GPUs for itself")
        seen.add(uuid)


def found_gpu(nvml: Nvml, name: str) -> NvmlGpu:
    """A GPU by its UUID or its number. Raises NvmlError, ValueError naming those that are here."""
    numbered = nvml.gpus()
    here = {number: uuid for number, uuid in numbered.items() if isinstance(uuid, str)}
    name = here.get(int(name), name) if name.isdecimal() else name
    if name not in here.values():
        are = ", ".join(f"{number} = {uuid}" for number, uuid in here.items()) or "none"
        lacking = "".join(f"; {error}" for error in numbered.values() if isinstance(error, NvmlError))
        raise ValueError(f"engines: gpus: {name} is not here; here are {are}{lacking}")
    return NvmlGpu(nvml, name)


def _follows(sample: Sample, mhz: int) -> bool:
    """At the clock that was set, or idle and below it."""
    return abs(sample.clock_mhz - mhz) <= NEAR_MHZ or (sample.clock_mhz < mhz and sample.brake == Brake.IDLE)
