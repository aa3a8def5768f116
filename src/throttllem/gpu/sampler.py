"""Reads some GPUs again and again, in a thread of its own: whoever asks gets the last reading and never waits for NVML.

Knows nothing of who sets their clocks.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from throttllem.gpu.counter import EnergyCounter
from throttllem.gpu.device import nothing
from throttllem.gpu.nvml import NvmlGpu, Sample

log = logging.getLogger("throttllem.gpu")

PERIOD_S = 0.05
STALE_S = 1.0
"""After so long without a reading the GPUs count as not readable."""
END_S = 1.0
"""A reading that has not come back by then hangs, and is left behind."""


class Sampler:
    """The GPUs of one engine, read while a block lasts. `left_behind` is called if a reading hangs as it ends."""

    def __init__(
        self, gpus: Sequence[NvmlGpu], left_behind: Callable[[], object] = nothing, period_s: float = PERIOD_S
    ) -> None:
        self.gpus = tuple(gpus)
        self._left_behind, self._period_s = left_behind, period_s
        self._counters = tuple(EnergyCounter() for _ in gpus)
        self._last: tuple[Sample, ...] = ()
        self._at_s: float | None = None
        self._error: OSError | None = None
        self._gate = threading.Lock()
        self._wake, self._stop = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="gpu sampler", daemon=True)

    async def __aenter__(self) -> Self:
        """Raises NvmlError if they cannot be read now."""
        self.look()
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
            if self._thread.is_alive():
                log.error("a reading of %s has not come back: its thread is left behind", self.gpus[0].uuid)
                self._left_behind()

    def soon(self) -> None:
        """The next reading is wanted at once."""
        self._wake.set()

    def newer_than(self, at_s: float) -> bool:
        """Whether the last reading was begun after that (of the monotonic clock)."""
        return bool(self._last) and min(sample.at_s for sample in self._last) > at_s

    def look(self) -> tuple[Sample, ...]:
        """Read them now, in the one thread that reads. Raises NvmlError."""
        found = tuple(gpu.sample() for gpu in self.gpus)
        with self._gate:
            for counter, sample in zip(self._counters, found, strict=True):
                counter.sample(sample.at_s, sample.watts, sample.energy_j)
            self._last, self._at_s, self._error = found, time.monotonic(), None
        return found

    def last(self) -> tuple[Sample, ...]:
        """The last reading. Raises OSError if it is too old, with the reason."""
        if self._at_s is None:
            raise OSError(f"{self.gpus[0].uuid} has not been read yet")
        late_s = time.monotonic() - self._at_s
        if late_s > STALE_S:
            raise self._error or OSError(f"no reading of {self.gpus[0].uuid} for {late_s:.1f} s: a call hangs")
        return self._last

    def joules(self) -> float:
        """Of all of them since the block began."""
        now_s = time.monotonic()
        with self._gate:
            return sum(counter.joules(now_s) for counter in self._counters)

    def _run(self) -> None:
        while not self._stop:
            self._wake.wait(self._period_s)
            self._wake.clear()
            try:
                self.look()
            except OSError as error:
                self._error = error
