"""Reads GPUs periodically, in a thread: the event loop takes the last reading and never waits for NVML.

Knows nothing of clocks being set.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from throttllem.gpu.counter import EnergyCounter
from throttllem.gpu.nvml import NvmlError, NvmlGpu, Sample, Trouble

log = logging.getLogger("throttllem.gpu")

PERIOD_S = 0.05
STALE_S = 1.0
"""A reading older than this counts as none."""
END_S = 1.0
"""A call of NVML that has not returned by then, at the end, hangs; its thread is abandoned."""


class Sampler:
    """The GPUs of one engine, read while the context is open. `hung`: at the end, whether a call of NVML hangs; then
    NVML must stay open, since closing it would wait for that call.
    """

    def __init__(self, gpus: Sequence[NvmlGpu], period_s: float = PERIOD_S) -> None:
        self.gpus = tuple(gpus)
        self.hung = False
        self._period_s = period_s
        self._counters = tuple(EnergyCounter() for _ in gpus)
        self._last: tuple[Sample, ...] = ()
        self._at_s: float | None = None
        self._error: OSError | None = None
        self._gate = threading.Lock()
        self._wake, self._stop = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="gpu sampler", daemon=True)

    async def __aenter__(self) -> Self:
        """Raises NvmlError if the GPUs cannot be read now."""
        self.read()
        end_s = time.monotonic() + STALE_S
        while any(counter.watts is None for counter in self._counters):  # watts are the slope of the counter
            if time.monotonic() > end_s:
                text = f"{self.gpus[0].uuid}: no power reading, and its energy counter stands still: no watts are known"
                raise NvmlError(text, Trouble.UNSUPPORTED)
            await asyncio.sleep(self._period_s)
            self.read()
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._stop = True
        self._wake.set()
        try:
            await asyncio.to_thread(self._thread.join, END_S)
        finally:
            self.hung = self._thread.is_alive()
            if self.hung:
                log.error("a reading of %s has not returned: its thread is abandoned", self.gpus[0].uuid)

    def read_soon(self) -> None:
        """Start the next reading now instead of at the end of the period."""
        self._wake.set()

    def newer_than(self, at_s: float) -> bool:
        """Whether the last reading began after that time of the monotonic clock."""
        return bool(self._last) and min(sample.at_s for sample in self._last) > at_s

    def read(self) -> tuple[Sample, ...]:
        """Read the GPUs now; once the context is open, only its thread does. Raises NvmlError."""
        found = tuple(gpu.sample() for gpu in self.gpus)
        with self._gate:
            for counter, sample in zip(self._counters, found, strict=True):
                counter.sample(sample.at_s, sample.watts, sample.energy_j)
            self._last, self._at_s, self._error = found, time.monotonic(), None
        return found

    def last(self) -> tuple[Sample, ...]:
        """The last reading. Raises OSError with the reason if it is too old."""
        if self._at_s is None:
            raise OSError(f"{self.gpus[0].uuid} has not been read yet")
        age_s = time.monotonic() - self._at_s
        if age_s > STALE_S:
            raise self._error or OSError(f"no reading of {self.gpus[0].uuid} for {age_s:.1f} s: a call of NVML hangs")
        return self._last

    def joules(self) -> float:
        """Energy of all GPUs since the first reading."""
        now_s = time.monotonic()
        with self._gate:
            return sum(counter.joules(now_s) for counter in self._counters)

    def watts(self) -> float:
        """Power of all GPUs at the last reading."""
        with self._gate:
            return sum(counter.watts or 0.0 for counter in self._counters)

    def trouble(self) -> str | None:
        """Why an energy counter is not used although there is one."""
        pairs = zip(self.gpus, self._counters, strict=True)
        return next((f"{gpu.uuid}: {counter.trouble}" for gpu, counter in pairs if counter.trouble), None)

    def _run(self) -> None:
        while not self._stop:
            self._wake.wait(self._period_s)
            self._wake.clear()
            try:
                self.read()
            except OSError as error:
                self._error = error
