"""Leases on groups of GPUs. No GPU is locked before it is in the journal. Whatever ends a lease, its GPUs are restored:
to the baseline that `--normally` states, else their clocks are reset; it is retried until it succeeds. Each GPU has one
thread, which makes its calls in order: a call that hangs delays no other GPU. Knows nothing of sockets.
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
    """All leases, on one event loop. By UUID: the `clocks` that may be set; `normally`, the stated baselines; and
    `baselines`, what each GPU that may be locked now will be restored to (None: reset). A GPU of the journal that the
    options do not name keeps the baseline that was stated to the keeper before.
    """

    def __init__(self, nvml: Nvml, clocks: Mapping[str, Lock], normally: Mapping[str, Lock], journal: Journal) -> None:
        self.clocks, self.normally, self._journal, self._pen = clocks, normally, journal, asyncio.Lock()
        self._sets = dict.fromkeys(clocks, SETS_AT_ONCE)
        self.held, self.returning = dict[str, Lease](), dict[str, asyncio.Task[None]]()
        self.baselines = {uuid: normally.get(uuid) if uuid in clocks else lock for uuid, lock in journal.read().items()}
        self._hands = {uuid: (LockableGpu(nvml, uuid), ThreadPoolExecutor(1)) for uuid in {*clocks, *self.baselines}}

    def take(self, gpus: tuple[str, ...], ttl_s: float, holder: str, gone: Gone) -> Lease:
        """A lease on GPUs that are allowed and nobody's. Raises RefusedError."""
        if not gpus or len(set(gpus)) < len(gpus) or not LEAST_TTL_S <= ttl_s <= MOST_TTL_S:
            raise RefusedError("malformed", f"a lease is on GPUs, each once, for {LEAST_TTL_S:g} to {MOST_TTL_S:g} s")
        for uuid in gpus:
            if uuid not in self.clocks:
                raise RefusedError("not-allowed", f"{uuid} is none of the GPUs that the keeper may set")
            if uuid in self.held or uuid in self.returning:
                by = self.held[uuid].holder if uuid in self.held else "nobody, but still being restored"
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
        """Lock all its GPUs to one clock, in parallel; if one fails, the lease ends and all are restored. Raises
        RefusedError.
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
            self.beat(lease)  # if it ended meanwhile, its GPUs are restored after these calls
            if failed := [error for error in done if isinstance(error, BaseException)]:
                self.end(lease, f"a GPU was not set: {failed[0]}")
                raise failed[0]
        except OSError as error:
            raise RefusedError("gpu", str(error)) from error
        lease.mhz = mhz

    def end(self, lease: Lease, why: str) -> None:
        """It is over, whatever the reason; its GPUs are restored."""
        if not lease.ended:
            lease.ended = why
            log.info("lease of %s on %s: %s", lease.holder, ", ".join(lease.gpus), why)
            if not lease.noting:
                self._free(lease)

    def restore(self, gpus: Iterable[str]) -> None:
        """To their `baselines`, retried until it succeeds."""
        for uuid in gpus:
            self.returning[uuid] = asyncio.get_running_loop().create_task(self._return(uuid))
            self.returning[uuid].add_done_callback(lambda task: task.cancelled() or task.result())  # an error is raised

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
        """Its GPUs and baselines, into the journal; nothing is locked yet, and no other lease gets them meanwhile."""
        lease.noting = True
        try:
            await asyncio.gather(*(self._do(uuid, LockableGpu.check) for uuid in lease.gpus))
            self.baselines |= {uuid: self.normally.get(uuid) for uuid in lease.gpus}
            await self._write()
            self.beat(lease)
            lease.touched = True
        finally:
            lease.noting = False
            if lease.ended:
                self._free(lease)
            if not lease.touched:
                self.baselines = {uuid: lock for uuid, lock in self.baselines.items() if uuid not in lease.gpus}
                with contextlib.suppress(OSError):
                    await self._write()

    def _free(self, lease: Lease) -> None:
        self.held = {uuid: other for uuid, other in self.held.items() if other is not lease}
        self.restore(lease.gpus if lease.touched else ())

    async def _return(self, uuid: str) -> None:
        logged = None
        while True:
            try:
                await self._do(uuid, lambda gpu: gpu.restore(self.baselines[uuid]))
                break
            except OSError as error:
                if logged != (logged := str(error)):
                    log.error("not restored yet: %s", error)
            await asyncio.sleep(RETRY_S)
        del self.baselines[uuid], self.returning[uuid]
        with contextlib.suppress(OSError):  # it stays in the journal: the next keeper restores it once more
            await self._write()

    def _do(self, uuid: str, call: Callable[[LockableGpu], Any]) -> asyncio.Future[Any]:
        gpu, thread = self._hands[uuid]
        return asyncio.get_running_loop().run_in_executor(thread, call, gpu)

    async def _write(self) -> None:
        async with self._pen:
            await asyncio.to_thread(self._journal.write, dict(self.baselines))
