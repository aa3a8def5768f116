"""All GPUs of one state file: made, renewed, opened; the driver, faults of calls, the log of writes.

What moves a clock or energy goes through the library, as what NVML's callers write does; the rest is single words.
"""

from __future__ import annotations

import ctypes
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from . import build
from .gpu import FakeGpu
from .layout import FAULTS, GPUS, MAGIC, VERSION, WRITES, MachineLayout, Op
from .part import Part, PartError, a100, h100, rtx4090
from .state import SIZE, MachineError, State

__all__ = ["FakeGpu", "Machine", "MachineError", "Op", "Part", "PartError", "Write", "a100", "h100", "rtx4090"]
STATE = "FAKE_NVML_STATE"
ANY = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """One write through NVML as its caller asked for it, also a refused one. Clocks in MHz, a power limit in mW."""

    at_s: float
    """CLOCK_MONOTONIC."""
    pid: int
    gpu: int
    op: Op
    low: int
    high: int
    result: int


class Machine:
    """A mapped state file. A context manager, which unmaps; the file stays."""

    def __init__(self, state: State) -> None:
        self._state = state
        self.file, self.library_folder = state.file, state.library_folder
        self.gpus = tuple(FakeGpu(state, index) for index in range(state.layout.gpu_count))

    @classmethod
    def create(cls, file: Path, parts: Sequence[Part], *, library: Path | None = None) -> Self:
        """A new machine. `library` is a folder made by `build.library`; None builds one beside the file."""
        if not 1 <= len(parts) <= GPUS:
            raise MachineError(f"{len(parts)} GPUs: 1 to {GPUS}")
        file.unlink(missing_ok=True)
        with file.open("xb") as opened:
            opened.truncate(SIZE)
        state = State(file, library or build.library(file.parent))
        _describe(state.layout, parts)
        machine = cls(state)
        machine.reset()
        state.layout.magic = MAGIC  # last: from here on every process can open it
        return machine

    @classmethod
    def open(cls, file: Path, *, library: Path | None = None) -> Self:
        """A machine that exists. Raises MachineError for a file that is none."""
        if not file.is_file() or file.stat().st_size != SIZE:
            raise MachineError(f"{file}: not a state file of {SIZE} bytes; Machine.create makes one")
        state = State(file, library or build.library(file.parent))
        layout = state.layout
        if (layout.magic, layout.version, layout.size) != (MAGIC, VERSION, SIZE):
            raise MachineError(f"{file}: not a state file of version {VERSION}; Machine.create makes one")
        return cls(state)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmaps; the GPUs cannot be used any more, the file can."""
        self._state.close()

    def environment(self, library_folder: Path | None = None, base: Mapping[str, str] = os.environ) -> dict[str, str]:
        """What a process needs in its environment to see these GPUs, in addition to what it has."""
        folder, before = str((library_folder or self.library_folder).resolve()), base.get("LD_LIBRARY_PATH")
        return {STATE: str(self.file.resolve()), "LD_LIBRARY_PATH": f"{folder}:{before}" if before else folder}

    def reset(self) -> None:
        """As new, but for the driver's generation: a process that had initialised NVML before still has."""
        layout = self._state.layout
        self.clear_faults()
        layout.stop_inside_pid = 0
        ctypes.memset(ctypes.addressof(layout) + MachineLayout.writes.offset, 0, MachineLayout.writes.size)
        layout.write_count = 0
        for gpu in self.gpus:
            control = gpu.control
            ctypes.memset(ctypes.addressof(control), 0, ctypes.sizeof(control))
            control.root_only, control.temperature_c = 1, 40
            gpu.change(Op.RESET)
        layout.driver |= 1

    def driver(self, loaded: bool) -> None:
        """Takes the driver away, or brings it back: without locks, and unknown to earlier users of NVML."""
        layout = self._state.layout
        if not loaded:
            layout.driver = (layout.driver >> 1) + 1 << 1
        for gpu in self.gpus:
            gpu.change(Op.DRIVER)  # also before it comes back: a write may have been under way when it went
        if loaded:
            layout.driver |= 1

    def fault(
        self,
        call: str,
        *,
        sleep_s: float | None = None,
        error: int | None = None,
        times: int | None = None,
        kill: Literal["before", "after"] | None = None,
        nth: int = 1,
        gpu: int | None = None,
        pid: int | None = None,
    ) -> None:
        """From the nth matching call on, for `times` calls (None: for ever): sleeps, fails with a code of NVML, or
        kills its caller before or after the effect. `call` is the C name, versions included (`nvmlInitWithFlags`).
        """
        if not hasattr(self._state.library, call) or not call.startswith("nvml") or call == "nvmlErrorString":
            raise MachineError(f"{call}: no call of this library that can fail; give the name in C")
        if sleep_s is None and error is None and kill is None:
            raise MachineError(f"{call}: give sleep_s, error or kill")
        free = next((index for index in range(FAULTS) if not self._state.layout.faults[index].active), None)
        if free is None:
            raise MachineError(f"{FAULTS} faults at most; clear_faults")
        fault = self._state.layout.faults[free]
        fault.call, fault.nth, fault.seen = call.encode(), nth, 0
        fault.gpu, fault.pid, fault.error = ANY if gpu is None else gpu, pid or 0, error or 0
        fault.kill = {None: 0, "before": 1, "after": 2}[kill]
        fault.times, fault.sleep_ns = ANY if times is None else times, round((sleep_s or 0) * 1e9)
        fault.active = 1
        self._state.layout.faults_active = 1

    def stop_inside(self, pid: int) -> None:
        """That process stops itself (SIGSTOP) at the worst moment of its next write."""
        self._state.layout.stop_inside_pid = pid

    def clear_faults(self) -> None:
        """No call is slow, fails or kills any more."""
        self._state.layout.faults_active = 0
        for fault in self._state.layout.faults:
            fault.active = 0

    def writes(self) -> list[Write]:
        """The last 1,024, the oldest first; one that its process was killed in may be missing."""
        entries = [entry for entry in self._state.layout.writes if entry.number]
        return [
            Write(
                at_s=entry.at_ns / 1e9,
                pid=entry.pid,
                gpu=entry.gpu,
                op=Op(entry.op),
                low=entry.low,
                high=entry.high,
                result=entry.result,
            )
            for entry in sorted(entries, key=lambda entry: int(entry.number))[-WRITES:]
        ]


def _describe(layout: MachineLayout, parts: Sequence[Part]) -> None:
    layout.version, layout.size, layout.gpu_count, layout.nonce = VERSION, SIZE, len(parts), secrets.randbits(64)
    layout.driver_version, layout.nvml_version, layout.cuda_version = b"580.95.05", b"13.580.95.05", 13000
    for index, part in enumerate(parts):
        _fill(layout, index, part)


def _fill(layout: MachineLayout, index: int, part: Part) -> None:
    into, clocks = layout.gpus[index].part, part.clocks_mhz
    into.uuid, into.name, into.serial = part.uuid.encode(), part.name.encode(), f"13208210{index:05d}".encode()
    into.bus_id = f"00000000:{index + 1:02X}:00.0".encode()
    into.pci_device_id, into.memory_mhz, into.memory_bytes = part.pci_device_id, part.memory_mhz, part.memory_bytes
    into.cores, into.memory_bus_bits = part.cores or 0, part.memory_bus_bits or 0
    into.architecture, (into.capability_major, into.capability_minor) = part.architecture, part.capability
    into.limit_mw, (low_w, high_w) = round(part.limit_w * 1000), part.limits_w
    into.limit_min_mw, into.limit_max_mw = round(low_w * 1000), round(high_w * 1000)
    into.context, into.refresh_ns, into.idle_w = part.context_keeps_clock, round(part.refresh_s * 1e9), part.idle_w
    into.clocks, into.idle_clock = len(clocks), clocks.index(clocks[0] if part.idle_mhz is None else part.idle_mhz)
    into.boost_clock = clocks.index(clocks[-1] if part.boost_mhz is None else part.boost_mhz)
    for place, clock in enumerate(clocks):
        into.clock_mhz[place], into.busy_w[place] = clock, part.busy_w[place]
        into.switch_ns[place] = round(part.switch_s(clock) * 1e9)
