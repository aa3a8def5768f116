"""Leases on groups of GPUs. Nothing is locked before what was there is in the journal; whatever ends a lease, its GPUs
are given back, again and again until it worked. One thread a GPU makes its calls, in order: one that hangs holds up no
other. Knows nothing of sockets.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from throttllem.gpu.locks import LockableGpu
from throttllem.gpu.nvml import Lock, Nvml
from throttllem.keeper.journal import Journal, log

LEAST_TTL_S, MOST_TTL_S, SETS_PER_S, SETS_AT_ONCE, SWEEP_S, RETRY_S = 0.2, 60.0, 20.0, 40.0, 0.05, 0.25


class RefusedError(Exception):
    """Not done: a code for programs, and words."""


Gone = Callable[[], bool]


@dataclass(slots=True, eq=False)
class Lease:
    """Who may set these GPUs until when; `gone`: he hung up. `mhz`: what all are locked to; `touched`: they may be."""

    gpus: tuple[str, ...]
    holder: str
    ttl_s: float
    until_s: float
    gone: Gone
    mhz: int | None = None
    noting: bool = False
    touched: bool = False
    ended: str | None = None


class Leases:
    """All of them, on one event loop. By UUID: the `clocks` that may be set, and the lock that is `normally` there."""

    def __init__(self, nvml: Nvml, clocks: Mapping[str, Lock], normally: Mapping[str, Lock], journal: Journal) -> None:
        self.clocks, self.normally, self._journal, self._pen = clocks, normally, journal, asyncio.Lock()
        self._sets = dict.fromkeys(clocks, SETS_AT_ONCE)
        self.held, self.returning = dict[str, Lease](), dict[str, asyncio.Task[None]]()
        self.before = journal.read()
        self._hands = {uuid: (LockableGpu(nvml, uuid), ThreadPoolExecutor(1)) for uuid in {*clocks, *self.before}}

    def take(self, gpus: tuple[str, ...], ttl_s: float, holder: str, gone: Gone) -> Lease:
        """A lease on GPUs that are allowed and nobody's. Raises RefusedError."""
        if not gpus or len(set(gpus)) < len(gpus) or not LEAST_TTL_S <= ttl_s <= MOST_TTL_S:
            raise RefusedError("malformed", f"a lease is on GPUs, each once, for {LEAST_TTL_S:g} to {MOST_TTL_S:g} s")
        for uuid in gpus:
            if uuid not in self.clocks:
                raise RefusedError("not-allowed", f"{uuid} is none of the GPUs that the keeper may set")
            if uuid in self.held or uuid in self.returning:
                by = self.held[uuid].holder if uuid in self.held else "nobody, but still being given back"
                raise RefusedError("held", f"{uuid} is held by {by}")
        lease = Lease(gpus=gpus, holder=holder, ttl_s=ttl_s, until_s=time.monotonic() + ttl_s, gone=gone)
        self.held |= dict.fromkeys(gpus, lease)
        return lease

    def beat(self, lease: Lease) -> None:
        """Its holder lives. Raises RefusedError if it has ended."""
        if lease.ended:
            raise RefusedError("lost", f"the lease has ended: {lease.ended}")
        lease.until_s = time.monotonic() + lease.ttl_s

    async def set(self, lease: Lease, mhz: int) -> None:
        """Lock all its GPUs to one clock, side by side; where one cannot be, the lease ends and all are as before it.
        Raises RefusedError.
        """
        self.beat(lease)
        for low, high in (self.clocks[uuid] for uuid in lease.gpus):
            if not low <= mhz <= high:
                raise RefusedError("range", f"{mhz} MHz: only {low} to {high} MHz may be set")
        if min(self._sets[uuid] for uuid in lease.gpus) < 1.0:
            raise RefusedError("rate", f"more than {SETS_PER_S:g} sets a second: ask again in a moment")
        self._sets |= {uuid: self._sets[uuid] - 1.0 for uuid in lease.gpus}
        try:
            if not lease.touched:
                await self._note(lease)
            locking = (self._do(uuid, lambda gpu: gpu.lock(Lock(mhz, mhz))) for uuid in lease.gpus)
            done = await asyncio.gather(*locking, return_exceptions=True)
            self.beat(lease)  # where it ended meanwhile, giving back comes after these calls
            if failed := [error for error in done if isinstance(error, BaseException)]:
                self.end(lease, f"a GPU was not set: {failed[0]}")
                raise failed[0]
        except OSError as error:
            raise RefusedError("gpu", str(error)) from error
        lease.mhz = mhz

    def end(self, lease: Lease, why: str) -> None:
        """It is over, whatever the reason; its GPUs go back."""
        if not lease.ended:
            lease.ended = why
            log.info("lease of %s on %s: %s", lease.holder, ", ".join(lease.gpus), why)
            if not lease.noting:
                self._free(lease)

    def give_back(self, gpus: Iterable[str]) -> None:
        """What is in `before` of them, until it worked."""
        for uuid in gpus:
            self.returning[uuid] = asyncio.get_running_loop().create_task(self._return(uuid))
            self.returning[uuid].add_done_callback(lambda task: task.cancelled() or task.result())  # loud if it failed

    async def sweep(self, alive: Callable[[], None]) -> None:
        """For ever: end what is silent."""
        while True:
            self._sets = {uuid: min(SETS_AT_ONCE, sets + SWEEP_S * SETS_PER_S) for uuid, sets in self._sets.items()}
            for lease in set(self.held.values()):
                if lease.gone() or time.monotonic() > lease.until_s:
                    self.end(lease, "its holder is gone" if lease.gone() else f"no heartbeat for {lease.ttl_s:g} s")
            alive()
            await asyncio.sleep(SWEEP_S)

    async def _note(self, lease: Lease) -> None:
        """What its GPUs are now, into the journal; nothing is locked yet, and nobody else gets them meanwhile."""
        lease.noting = True
        try:
            looks = (self._do(uuid, lambda gpu: gpu.before(self.normally.get(gpu.uuid))) for uuid in lease.gpus)
            self.before |= dict(zip(lease.gpus, await asyncio.gather(*looks), strict=True))
            await self._write()
            self.beat(lease)
            lease.touched = True
        finally:
            lease.noting = False
            if lease.ended:
                self._free(lease)
            if not lease.touched:
                self.before = {uuid: lock for uuid, lock in self.before.items() if uuid not in lease.gpus}
                with contextlib.suppress(OSError):
                    await self._write()

    def _free(self, lease: Lease) -> None:
        self.held = {uuid: other for uuid, other in self.held.items() if other is not lease}
        self.give_back(lease.gpus if lease.touched else ())

    async def _return(self, uuid: str) -> None:
        told = None
        while True:
            try:
                await self._do(uuid, lambda gpu: gpu.give_back(self.before[uuid]))
                break
            except OSError as error:
                if told != (told := str(error)):
                    log.error("not given back yet: %s", error)
            await asyncio.sleep(RETRY_S)
        del self.before[uuid], self.returning[uuid]
        with contextlib.suppress(OSError):  # it stays in the journal: the next keeper gives it back once more
            await self._write()

    def _do(self, uuid: str, call: Callable[[LockableGpu], Any]) -> asyncio.Future[Any]:
        gpu, thread = self._hands[uuid]
        return asyncio.get_running_loop().run_in_executor(thread, call, gpu)

    async def _write(self) -> None:
        async with self._pen:
            await asyncio.to_thread(self._journal.write, dict(self.before))
