"""The real GPUs of one engine: read by a sampler, set through the keeper (or zeusd), watched whether they follow.

Knows nothing of requests and plans.
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

from throttllem.gpu.boards.users import Activity, Place, Placement, placement
from throttllem.gpu.clock_limit import NOT_REACHED, OTHER_CONTROLLER, LimitDetector, follows, near
from throttllem.gpu.device import Reading, Switch, Work
from throttllem.gpu.nvml import Nvml, NvmlError, NvmlGpu, Sample
from throttllem.gpu.sampler import Sampler
from throttllem.gpu.setters import ClockClient, MakeClient

log = logging.getLogger("throttllem.gpu")

# How a clock gets from a decision to the GPU
#
# `set_clock` stores the decision and hands it to the setter; one command at a time, and a decision that a later one
# has replaced in the meantime is not sent. The keeper's answer says that the driver took it, not that the GPU runs at
# it. So `set_clock` then waits for a reading that shows the clock, up to FOLLOW_S, and returns what is in force. The
# time from the command to that reading is the switch's latency, in steps of POLL_S and a reading's own time. It is no
# latency where the GPUs were at that clock before, are idle below it, or are held down by heat or a power cap.
#
# Afterwards the GPU may leave that clock at any time (power cap, heat, another program), or the keeper may be gone. A
# task looks at every reading and keeps two things up to date: the limit that holds the clocks down, with its reason,
# and the trouble that the setter had. Both are in `Reading`, so that the core plans with the clock that really is in
# force. The task also sets the decided clock again after a failure, where another program has changed it, and at once
# where the keeper has ended the lease (`_lose`).
#
# While clocks cannot be set, the mode "on" is a dry run: nothing is lost but the saving, and serving goes on.

WATCH_S = 0.1
FOLLOW_S = 0.3
POLL_S = 0.004
LONGEST_SWITCH_S = 2.0
"""A clock that is reached later was not just switching."""
RETRY_S = 1.0
"""The time between a set that failed, or that another controller undid, and the next one; doubled each time."""
MOST_RETRY_S = 60.0
PLACE_S, PLACED_S = 15.0, 60.0
"""The time between two checks of the processes, until the engine was found on its GPUs and after that."""


class Mode(StrEnum):
    """What is done with clocks. `DRY_RUN`: they are decided and reported, not set."""

    OFF = "off"
    DRY_RUN = "dry-run"
    ON = "on"


class HardwareGpu:
    """The GPUs of one engine, by UUID or by number. An async context manager, which restores their clocks.

    `clocks_mhz`, ascending: every clock that will be decided. The last one must be the highest that the GPUs support;
    it counts as the decision while there is none. `setter` makes the client that sets them, once they are found.
    `url`: where the engine listens that should run on them; None: that is not checked.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        *,
        mode: Mode,
        setter: MakeClient,
        clocks_mhz: tuple[int, ...],
        url: str | None = None,
    ) -> None:
        self.names, self._make_setter, self._url = names, setter, url
        self.mode, self._clocks_mhz = mode, clocks_mhz
        self.uuids: tuple[str, ...] = ()
        self.ladder_mhz: tuple[int, ...] = ()
        """The clocks that they can be locked to, ascending; known once the context is open, unless the mode is off."""
        self._stack = AsyncExitStack()
        self._sampler: Sampler | None = None
        self._setter: ClockClient | None = None
        self._one_command = asyncio.Lock()
        self._decided_mhz: int | None = None
        self._set_mhz: int | None = None
        self._allowed_mhz: int | None = None
        """The highest clock that the keeper may set, where more was decided."""
        self._trouble: str | None = None
        self._lost = asyncio.Event()
        """The keeper has ended the lease: the clock is set again at once."""
        self._set_s = self._failed_s = -math.inf
        self._switching_since_s: float | None = None
        """When the command of a switch was given whose end has not been seen."""
        self._switch: Switch | None = None
        self._retry_s = RETRY_S
        self._limits = LimitDetector()
        self.placement: Placement | None = None
        """Whether the engine runs on them, by the processes; None: not checked."""
        self._activity = Activity(len(names))
        self._misplaced: str | None = None

    # ---- finding the GPUs, and leaving them as they were ---------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Find them and start to read them. Raises NvmlError if they are not here, ValueError if they cannot be set."""
        async with AsyncExitStack() as stack:
            library = stack.enter_context(ExitStack())
            nvml = library.enter_context(Nvml())
            gpus = tuple(found_gpu(nvml, name) for name in self.names)
            self.uuids = tuple(gpu.uuid for gpu in gpus)
            if len(set(self.uuids)) < len(gpus):
                raise ValueError(f"engines: gpus = {list(self.names)}: one of them is named twice")
            if self.mode is not Mode.OFF:
                for gpu in gpus:
                    self._check_settable(gpu)

            sampler = Sampler(gpus)
            stack.callback(lambda: library.pop_all() if sampler.hung else None)  # closing NVML would hang, too
            self._sampler = await stack.enter_async_context(sampler)
            self._setter = self._make_setter(gpus, self._lose)
            stack.push_async_callback(self._restore)
            if self._url is not None:
                await self._place(nvml, self._url)
                stack.push_async_callback(_end, asyncio.create_task(self._place_again(nvml, self._url)))
            stack.push_async_callback(_end, asyncio.create_task(self._watch()))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def _check_settable(self, gpu: NvmlGpu) -> None:
        """Raises ValueError if other clients share it, or if its clocks are not those of the engine's `gpu`."""
        if (sharing := gpu.sharing()) is not None:
            raise ValueError(f"engines: gpus: {gpu.uuid}: {sharing.value}; leave it out, or [clocks] mode = 'off'")
        self.ladder_mhz = gpu.clocks_mhz()
        unknown, top_mhz = sorted(set(self._clocks_mhz) - set(self.ladder_mhz)), self._clocks_mhz[-1]
        if unknown or self.ladder_mhz[-1] != top_mhz:
            why = f"has no {unknown[-1]} MHz" if unknown else f"goes up to {self.ladder_mhz[-1]} MHz"
            raise ValueError(
                f"engines: gpus: {gpu.uuid}, {gpu.name()}, {why}, and its performance table, or its `gpu` without one, "
                f"goes up to {top_mhz} MHz; profile and train with its maximum clock, or name its kind "
                "(engines.N.gpu, --gpu)"
            )

    # ---- what the gateway calls ------------------------------------------------------------------------------------

    @property
    def dry_run(self) -> bool:
        """Whether clocks are decided and not set."""
        return self.mode is Mode.DRY_RUN or (self.mode is Mode.ON and self._trouble is not None)

    async def set_clock(self, mhz: int | None, sent: Callable[[], None] | None = None) -> int | None:
        """See `device.Gpu`. A clock that cannot be set is no error but a dry run, and is logged."""
        self._decided_mhz = mhz
        if mhz is None:
            await self._restore()
        elif self.mode is Mode.ON:
            async with self._one_command:
                if self._decided_mhz == mhz and time.monotonic() - self._failed_s > RETRY_S:
                    await self._set(mhz, sent)
        return self.read().planned_on_mhz

    def read(self) -> Reading:
        """The sampler's last reading, without a call of NVML. Raises OSError while the GPUs cannot be read."""
        sampler = self._running_sampler()
        samples = sampler.last()
        set_mhz = self._set_mhz
        followed = set_mhz is not None and all(follows(sample, set_mhz) for sample in samples)

        top_mhz = self._clocks_mhz[-1]
        decided_mhz = top_mhz if self._decided_mhz is None else self._decided_mhz
        dry_run_mhz = decided_mhz if self.dry_run else top_mhz if self.mode is Mode.OFF else None
        below_allowed = followed and set_mhz is not None and decided_mhz < set_mhz

        limit_mhz, held = self._allowed_mhz, "the keeper allows no more" if self._allowed_mhz is not None else None
        if (limit := self._limits.limit) is not None:
            limit_mhz, held = limit.mhz, limit.reason
        return Reading(
            clock_mhz=set_mhz if followed else min(sample.clock_mhz for sample in samples),
            watts=sampler.watts(),
            energy_j=sampler.joules(),
            dry_run_mhz=dry_run_mhz,
            stands_for_mhz=decided_mhz if below_allowed else None,
            limit_mhz=limit_mhz,
            held=held,
            trouble=self._trouble,
            counter_trouble=sampler.trouble(),
            misplaced=self._misplaced,
            switch=self._switch,
        )

    def worked(self, work: Work) -> None:
        """Its energy is the counter's; whether the GPUs took part in it is seen by their activity."""
        self._activity.worked(time.monotonic(), work.seconds)

    def idled(self, seconds: float) -> None:
        """Nothing to do: the GPU's counter measures it."""

    # ---- setting -------------------------------------------------------------------------------------------------

    async def _set(self, mhz: int, sent: Callable[[], None] | None) -> None:
        """Set a clock, and wait until the GPUs follow."""
        assert self._setter is not None
        began_s, self._switching_since_s = time.monotonic(), None
        before: tuple[Sample, ...] = ()
        with contextlib.suppress(OSError):
            before = self._running_sampler().last()
        try:
            set_mhz = await self._setter.set(mhz, sent)
        except OSError as error:
            self._set_mhz, self._allowed_mhz, self._failed_s = None, None, time.monotonic()
            with contextlib.suppress(OSError):  # the clock that was set before may be too slow for this decision
                await self._setter.restore()
            if self._trouble != str(error):
                log.error("clocks are not set (dry run): %s", error)
            self._trouble = str(error)
            return

        if self._trouble is not None:
            log.warning("clocks are set again")
        self._set_mhz, self._set_s, self._trouble = set_mhz, time.monotonic(), None
        self._allowed_mhz = set_mhz if set_mhz < mhz else None
        self._limits.was_set(set_mhz)
        if not all(near(sample, set_mhz) for sample in before):
            self._switching_since_s = began_s
        with contextlib.suppress(OSError):  # a GPU that cannot be read is reported by `read`
            await self._wait_until_followed(set_mhz, mhz)

    def _lose(self, why: str) -> None:
        """The keeper has ended the lease without being asked: the clock that was set is no longer in force."""
        if self._decided_mhz is not None:
            log.error("clocks are no longer set: %s", why)
            self._set_mhz, self._allowed_mhz, self._trouble = None, None, why
            self._lost.set()

    async def _wait_until_followed(self, set_mhz: int, decided_mhz: int) -> None:
        """Return when the GPUs run at that clock, when FOLLOW_S have passed, or when another clock is decided."""
        sampler = self._running_sampler()
        while self._decided_mhz == decided_mhz:
            if sampler.newer_than(self._set_s) and all(follows(sample, set_mhz) for sample in sampler.last()):
                self._detect_limit()
                return
            if time.monotonic() - self._set_s > FOLLOW_S:
                self._detect_limit(switched=True)
                return
            sampler.read_soon()
            await asyncio.sleep(POLL_S)

    async def _restore(self) -> None:
        self._decided_mhz = None
        async with self._one_command:
            self._set_mhz = self._allowed_mhz = None
            self._limits.clear()
            try:
                if self._setter is not None:
                    await self._setter.restore()  # also after a set that failed half-way
            except OSError as error:
                log.error("clocks were not restored by the gateway: %s", error)

    # ---- watching ------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Until it is cancelled: retry what failed, and look at every reading."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._lost.wait(), WATCH_S)
            lost = self._lost.is_set()
            self._lost.clear()
            try:
                limit = self._limits.limit
                taken = limit is not None and limit.reason == OTHER_CONTROLLER
                since_s = time.monotonic() - max(self._failed_s, self._set_s)
                if limit is None and since_s > self._retry_s:
                    self._retry_s = RETRY_S
                if self._decided_mhz is None or self.mode is not Mode.ON:
                    pass
                elif lost or (self._trouble is not None and since_s > RETRY_S) or (taken and since_s > self._retry_s):
                    self._retry_s = min(2 * self._retry_s, MOST_RETRY_S) if taken else RETRY_S
                    await self.set_clock(self._decided_mhz)
                self._detect_limit()
                self._detect_misplaced()
            except OSError:
                continue  # a GPU that cannot be read is reported by `read`
            except Exception:
                log.exception("clocks were not watched this time")

    async def _place_again(self, nvml: Nvml, url: str) -> None:
        """Until it is cancelled: check again whether the engine runs on them; it may start later, or be restarted."""
        while True:
            right = self.placement is not None and self.placement.place is Place.RIGHT
            await asyncio.sleep(PLACED_S if right else PLACE_S)
            try:
                await self._place(nvml, url)
            except Exception:
                log.exception("it was not checked which GPUs the engine runs on")

    async def _place(self, nvml: Nvml, url: str) -> None:
        self.placement = await asyncio.to_thread(placement, nvml, self.uuids, url)

    def _detect_misplaced(self) -> None:
        """Say that the engine runs elsewhere, by its processes or by the GPUs' activity."""
        self._activity.saw(time.monotonic(), [sample.busy for sample in self._running_sampler().last()])
        misplaced = None
        if self.placement is not None and self.placement.place is Place.WRONG:
            misplaced = self.placement.text
        elif (idle := self._activity.idle()) is not None:
            misplaced = f"{self.uuids[idle]} is idle while the engine works: does the engine run on another GPU?"
        if misplaced is not None and misplaced != self._misplaced:
            log.error("%s", misplaced)
        self._misplaced = misplaced

    def _detect_limit(self, *, switched: bool = False) -> None:
        """Raises OSError while the GPUs cannot be read."""
        locked = self._set_mhz is not None
        target_mhz = self._set_mhz if self._set_mhz is not None else self._decided_mhz or 0
        self._limits.update(
            self._running_sampler().last(),
            target_mhz,
            time.monotonic(),
            locked=locked,
            set_s=self._set_s,
            switched=switched,
        )
        if self._set_mhz is not None:
            self._measure_switch(self._set_mhz)

    def _measure_switch(self, set_mhz: int) -> None:
        """Note how long the switch under way took, once the last reading shows its end."""
        began_s, limit = self._switching_since_s, self._limits.limit
        if began_s is None:
            return
        samples = self._running_sampler().last()
        seconds = max(sample.at_s for sample in samples) - began_s
        held = limit is not None and limit.reason not in (NOT_REACHED, OTHER_CONTROLLER)
        if held or seconds > LONGEST_SWITCH_S:
            self._switching_since_s = None
        elif all(follows(sample, set_mhz) for sample in samples):
            self._switching_since_s = None
            if all(near(sample, set_mhz) for sample in samples):
                self._switch = Switch(mhz=set_mhz, seconds=seconds)

    def _running_sampler(self) -> Sampler:
        if self._sampler is None:
            raise OSError("the GPUs have not been found yet")
        return self._sampler


class Grouped(Protocol):
    """GPUs of one engine, by UUID."""

    uuids: tuple[str, ...]


def check_apart(groups: Sequence[Grouped]) -> None:
    """Raise ValueError if two engines have a GPU in common."""
    seen: set[str] = set()
    for uuid in (uuid for group in groups for uuid in group.uuids):
        if uuid in seen:
            raise ValueError(f"engines: gpus: {uuid} is named for two engines; give each engine its own GPUs")
        seen.add(uuid)


def found_gpu(nvml: Nvml, name: str) -> NvmlGpu:
    """A GPU by UUID or number. Raises NvmlError; ValueError, with those that are here, if it is none of them."""
    numbered = nvml.gpus()
    here = {number: uuid for number, uuid in numbered.items() if isinstance(uuid, str)}
    name = here.get(int(name), name) if name.isdecimal() else name
    if name not in here.values():
        are = ", ".join(f"{number} = {uuid}" for number, uuid in here.items()) or "none"
        unreadable = "".join(f"; {error}" for error in numbered.values() if isinstance(error, NvmlError))
        raise ValueError(f"engines: gpus: {name} is not here; here are {are}{unreadable}")
    return NvmlGpu(nvml, name)


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel a task, and return when it has ended: no task outlives what it watches."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
