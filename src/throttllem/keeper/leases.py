"""Leases on groups of GPUs: which client may set their clocks, until when, and what happens afterwards.

Knows nothing of sockets and of the protocol.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from throttllem.gpu.clock_range import ClockRange
from throttllem.gpu.locks import LockableGpu
from throttllem.gpu.nvml import Nvml
from throttllem.keeper.journal import Journal
from throttllem.keeper.log import log

# The theory
#
# A locked clock stays locked when the program that locked it is gone. A lease ties the lock to a client that is alive:
# the client extends it with every `set` and heartbeat; when they stop for `ttl_s`, the lease ends. It also ends
# when the client releases it, when it disconnects (the kernel closes the connection of a process that dies), when a GPU
# could not be set, and when the keeper stops.
#
#     take           first set                        end
#     ----> held ----------------> held, journaled ---------> restoring ----> free
#             |                    (may be locked)            (in the journal until it succeeded)
#             +--- end ---> free
#
# Four rules make the guarantees of docs/keeper.md hold:
#
# 1. Before the first lock of a lease, all its GPUs and their baselines are in the journal. A keeper that is killed at
#    any moment leaves no lock that the next one does not know.
# 2. Every end goes through `end`, and every journaled GPU through `_restore_until_done`. There is no other way out.
# 3. Restoring is retried until it succeeds. The GPU can be leased again only then, and is in the journal as long.
# 4. Each GPU has one thread that makes its calls of NVML, in order. So a restore comes after the lock that was under
#    way when the lease ended, and a call that hangs or fails delays no other GPU.
#
# Everything else runs on one event loop, so there are no locks but `_writing`. Between two `await`s nothing else
# changes a lease; after each `await` it may have ended, and `extend` is called to find out.
#
# What a GPU is restored to is a baseline that the keeper's options state, else its clocks are reset. Nothing is
# inferred from a clock: NVML cannot read locks, and a steady clock may be a GPU's normal boost clock.

MIN_TTL_S, MAX_TTL_S = 0.2, 60.0
SETS_PER_S, SETS_AT_ONCE = 20.0, 40.0
"""The rate at which a GPU may be set, and the burst, over all leases: each one costs a call of the driver."""
SWEEP_S = 0.05
RETRY_S = 0.25


class RejectedError(Exception):
    """A request was not carried out. `code` is that of the protocol."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(slots=True, eq=False)
class Lease:
    """The right of one client to set these GPUs. `disconnected()`: whether the client has closed its connection."""

    gpus: tuple[str, ...]
    client: str
    ttl_s: float
    expires_s: float
    disconnected: Callable[[], bool]
    mhz: int | None = None
    """The clock that all of them are locked to."""
    journaling: bool = False
    """The journal is being written; until that is over, no other lease may have these GPUs."""
    journaled: bool = False
    """They are in the journal: they may be locked, and are restored when the lease ends."""
    ended: str | None = None
    """Why it has ended."""


class Leases:
    """All leases. `allowed`: by UUID, the clocks that may be set. `baselines`: those that the options state.

    `held`: the lease of each GPU that has one. `restoring`: the GPUs that are being restored. `restore_to`: the content
    of the journal, the GPUs that may be locked now and the baseline of each (None: reset). At first these are the GPUs
    that the last keeper may have left locked (all that may be set, if the journal is damaged). A GPU that the options
    name has the baseline that the options state now, any other GPU the one stated to the keeper that locked it.
    """

    def __init__(
        self, nvml: Nvml, allowed: Mapping[str, ClockRange], baselines: Mapping[str, ClockRange], journal: Journal
    ) -> None:
        self.allowed, self.baselines = allowed, baselines
        self.held: dict[str, Lease] = {}
        self.restoring: dict[str, asyncio.Task[None]] = {}
        self.restore_to = {
            uuid: baselines.get(uuid) if uuid in allowed else baseline for uuid, baseline in journal.read().items()
        }
        if journal.damaged:  # what it named is not known: each GPU that may be set
            self.restore_to |= {uuid: baselines.get(uuid) for uuid in allowed}
            journal.replace_damaged(self.restore_to)
        self._journal, self._writing = journal, asyncio.Lock()
        self._sets_left = dict.fromkeys(allowed, SETS_AT_ONCE)
        self._gpus = {uuid: (LockableGpu(nvml, uuid), ThreadPoolExecutor(1)) for uuid in {*allowed, *self.restore_to}}
        self._stopped = False

    # ---- requests of clients -------------------------------------------------------------------------------------

    def take(self, gpus: tuple[str, ...], ttl_s: float, client: str, disconnected: Callable[[], bool]) -> Lease:
        """A lease on GPUs that are allowed and free; nothing is locked yet. Raises RejectedError."""
        if not gpus or len(set(gpus)) < len(gpus) or not MIN_TTL_S <= ttl_s <= MAX_TTL_S:
            raise RejectedError("malformed", f"a lease is on GPUs, each once, for {MIN_TTL_S:g} to {MAX_TTL_S:g} s")
        if self._stopped:
            raise RejectedError("not-allowed", "the keeper is stopping")
        for uuid in gpus:
            if uuid not in self.allowed:
                raise RejectedError("not-allowed", f"{uuid} is none of the GPUs that the keeper may set")
            if uuid in self.held:
                raise RejectedError("held", f"{uuid} is held by {self.held[uuid].client}")
            if uuid in self.restoring:
                raise RejectedError("held", f"{uuid} is still being restored")
        lease = Lease(
            gpus=gpus, client=client, ttl_s=ttl_s, expires_s=time.monotonic() + ttl_s, disconnected=disconnected
        )
        self.held.update(dict.fromkeys(gpus, lease))
        return lease

    def extend(self, lease: Lease) -> None:
        """The client is alive: the lease runs for another `ttl_s`. Raises RejectedError if it has ended."""
        if lease.ended:
            raise RejectedError("lost", f"the lease has ended: {lease.ended}")
        lease.expires_s = time.monotonic() + lease.ttl_s

    async def set(self, lease: Lease, mhz: int) -> None:
        """Lock all GPUs of the lease to one clock, in parallel. If one fails, the lease ends and all are restored.
        Raises RejectedError.
        """
        self.extend(lease)
        for low_mhz, high_mhz in (self.allowed[uuid] for uuid in lease.gpus):
            if not low_mhz <= mhz <= high_mhz:
                raise RejectedError("range", f"{mhz} MHz: only {low_mhz} to {high_mhz} MHz may be set")
        if any(self._sets_left[uuid] < 1.0 for uuid in lease.gpus):
            raise RejectedError("rate", f"more than {SETS_PER_S:g} sets a second: try again in a moment")
        for uuid in lease.gpus:
            self._sets_left[uuid] -= 1.0

        if not lease.journaled:
            try:
                await self._enter_in_journal(lease)
            except OSError as error:
                raise RejectedError("gpu", str(error)) from error

        clock = ClockRange(mhz, mhz)
        calls = (self._call(uuid, lambda gpu: gpu.lock(clock)) for uuid in lease.gpus)
        results = await asyncio.gather(*calls, return_exceptions=True)
        self.extend(lease)  # if it ended in the meantime, its GPUs are restored after these calls
        for result in results:
            if isinstance(result, BaseException):
                self.end(lease, f"a GPU was not set: {result}")
                if isinstance(result, OSError):
                    raise RejectedError("gpu", str(result)) from result
                raise result
        lease.mhz = mhz

    def end(self, lease: Lease, why: str) -> None:
        """End a lease, for whatever reason, and start to restore its GPUs. Does nothing if it has ended already."""
        if lease.ended:
            return
        lease.ended = why
        log.info("lease of %s on %s: %s", lease.client, ", ".join(lease.gpus), why)
        if not lease.journaling:  # else `_enter_in_journal` frees them, as soon as the journal is written
            self._free(lease)

    async def restored(self, gpus: Iterable[str]) -> None:
        """Wait until these GPUs are restored."""
        if restoring := [self.restoring[uuid] for uuid in gpus if uuid in self.restoring]:
            await asyncio.wait(restoring)

    # ---- called by the keeper's process --------------------------------------------------------------------------

    def sweep(self) -> None:
        """End the leases of clients that are gone or silent; to be called every SWEEP_S."""
        for uuid, sets in self._sets_left.items():
            self._sets_left[uuid] = min(SETS_AT_ONCE, sets + SWEEP_S * SETS_PER_S)
        for lease in set(self.held.values()):
            if lease.disconnected():
                self.end(lease, "its client disconnected")
            elif time.monotonic() > lease.expires_s:
                self.end(lease, f"no heartbeat for {lease.ttl_s:g} s")

    def restore(self, gpus: Iterable[str]) -> None:
        """Start to restore these GPUs, which are in the journal."""
        for uuid in gpus:
            task = asyncio.get_running_loop().create_task(self._restore_until_done(uuid))
            # A failure that is no OSError is a bug. Raised in a callback, it reaches the loop's exception handler,
            # which ends the process: the next keeper restores what this one could not.
            task.add_done_callback(lambda task: task.cancelled() or task.result())
            self.restoring[uuid] = task

    def stop(self) -> None:
        """End all leases, and give none from now on."""
        self._stopped = True
        for lease in set(self.held.values()):
            self.end(lease, "the keeper stops")

    # ---- inside --------------------------------------------------------------------------------------------------

    async def _enter_in_journal(self, lease: Lease) -> None:
        """Write the GPUs of a lease into the journal, after a check that they may be locked. Raises OSError, and
        RejectedError if the lease ended in the meantime; then nothing was locked and no entry is left.
        """
        lease.journaling = True
        try:
            await asyncio.gather(*(self._call(uuid, LockableGpu.check) for uuid in lease.gpus))
            for uuid in lease.gpus:
                self.restore_to[uuid] = self.baselines.get(uuid)
            await self._write_journal()
            self.extend(lease)
            lease.journaled = True
        finally:
            lease.journaling = False
            if lease.ended:
                self._free(lease)
            if not lease.journaled:
                for uuid in lease.gpus:
                    self.restore_to.pop(uuid, None)
                with contextlib.suppress(OSError):
                    await self._write_journal()

    def _free(self, lease: Lease) -> None:
        for uuid in lease.gpus:
            del self.held[uuid]
        if lease.journaled:
            self.restore(lease.gpus)

    async def _restore_until_done(self, uuid: str) -> None:
        logged = None
        while True:
            try:
                await self._call(uuid, lambda gpu: gpu.restore(self.restore_to[uuid]))
                break
            except OSError as error:
                if logged != str(error):
                    logged = str(error)
                    log.error("not restored yet: %s", error)
            await asyncio.sleep(RETRY_S)
        del self.restore_to[uuid], self.restoring[uuid]
        with contextlib.suppress(OSError):  # the entry stays: the next keeper restores the GPU once more
            await self._write_journal()

    def _call(self, uuid: str, call: Callable[[LockableGpu], Any]) -> asyncio.Future[Any]:
        """Make a call in the thread of that GPU."""
        gpu, thread = self._gpus[uuid]
        return asyncio.get_running_loop().run_in_executor(thread, call, gpu)

    async def _write_journal(self) -> None:
        async with self._writing:
            await asyncio.to_thread(self._journal.write, dict(self.restore_to))
