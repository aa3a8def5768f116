"""GPUs through NVML, to be read: clocks, watts, energy, what slows them down, who works on them. Sets nothing: that is
in `locks`, which only the keeper and the doctor import.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Flag, StrEnum
from types import TracebackType
from typing import Any, Self

import pynvml


class Trouble(StrEnum):
    """What kind of failure it is, for those who act on it."""

    NO_DRIVER = "no driver"
    DENIED = "not permitted"
    LOST = "GPU lost"
    UNSUPPORTED = "not supported"
    UNKNOWN_GPU = "no such GPU"
    OTHER = "failed"


class NvmlError(OSError):
    """NVML did not do what was asked; the message names what, where and the way out."""

    def __init__(self, message: str, trouble: Trouble) -> None:
        super().__init__(message)
        self.trouble = trouble


class Brake(Flag):
    """Why a clock is below what it was set to (NVML's clock event reasons, their bits)."""

    IDLE = 0x1
    APPLICATION_CLOCKS = 0x2
    POWER_CAP = 0x4
    HARDWARE = 0x8
    SYNC_BOOST = 0x10
    THERMAL = 0x20
    HARDWARE_THERMAL = 0x40
    POWER_BRAKE = 0x80
    DISPLAY = 0x100
    NONE = 0

    @property
    def words(self) -> str:
        """For people: "power cap, thermal"."""
        return ", ".join(str(part.name).lower().replace("_", " ") for part in self) or "none"


class Use(StrEnum):
    """Why a GPU's clock is not ours to set, whoever allows it."""

    MIG = "MIG is on: its instances share one clock, and their tenants did not agree to it"
    MPS = "MPS shares it: other clients' kernels would slow down too"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One GPU at one moment. `energy_j` since the driver was loaded; None where it has no counter."""

    at_s: float
    clock_mhz: int
    watts: float
    energy_j: float | None
    brake: Brake


_REMEDY = {
    Trouble.NO_DRIVER: "load the NVIDIA driver (`nvidia-smi` must work), or serve without [engines] gpus",
    Trouble.DENIED: "setting clocks needs root: run `throttllem keeper` as a service, or mode = 'dry-run'",
    Trouble.LOST: "it fell off the bus: see `dmesg`; reset or reboot it, the rest goes on without it",
    Trouble.UNKNOWN_GPU: "`throttllem doctor` lists the GPUs that are here",
}
_CODES = {
    pynvml.NVML_ERROR_UNINITIALIZED: Trouble.NO_DRIVER,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: Trouble.NO_DRIVER,
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: Trouble.NO_DRIVER,
    pynvml.NVML_ERROR_NO_PERMISSION: Trouble.DENIED,
    pynvml.NVML_ERROR_GPU_IS_LOST: Trouble.LOST,
    pynvml.NVML_ERROR_NOT_SUPPORTED: Trouble.UNSUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: Trouble.UNSUPPORTED,
    pynvml.NVML_ERROR_NOT_FOUND: Trouble.UNKNOWN_GPU,
}
_STALE = (pynvml.NVML_ERROR_UNINITIALIZED, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
"""The driver was unloaded since: what was opened before is worth nothing."""


class Nvml:
    """The library, opened for a block. Calls may come from any thread; a driver that was reloaded is opened anew."""

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._handles: dict[str, Any] = {}
        self._open = False
        self._generation = 0

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._gate:
            self._close()

    def gpus(self) -> dict[int, str | NvmlError]:
        """By number: the UUID, or why it cannot be had, which is no reason to miss the others. Raises NvmlError."""
        found = dict[int, str | NvmlError]()
        for number in range(self.ask("GPUs", pynvml.nvmlDeviceGetCount)):
            try:
                handle = self.ask(f"GPU {number}", pynvml.nvmlDeviceGetHandleByIndex, number)
                found[number] = str(self.ask(f"UUID of GPU {number}", pynvml.nvmlDeviceGetUUID, handle))
            except NvmlError as error:
                found[number] = error
        return found

    def driver(self) -> str:
        """Its version."""
        return str(self.ask("driver version", pynvml.nvmlSystemGetDriverVersion))

    def ask(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """A call that is about no GPU in particular. Raises NvmlError."""
        return self._tried(what, lambda: function(*arguments))

    def on(self, uuid: str, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """A call about one GPU: `function(handle, *arguments)`. Raises NvmlError."""
        try:
            return self._tried(f"{what} of {uuid}", lambda: function(self._handle(uuid), *arguments))
        except NvmlError as error:
            if error.trouble in (Trouble.LOST, Trouble.OTHER):  # it may come back under another handle
                self._handles.pop(uuid, None)
            raise

    def _tried(self, what: str, call: Callable[[], Any]) -> Any:
        before = self._generation
        try:
            return call()
        except pynvml.NVMLError as error:
            if error.value not in _STALE:
                raise _mapped(what, error) from error
        self._begin(before)
        try:
            return call()
        except pynvml.NVMLError as error:
            raise _mapped(what, error) from error

    def _handle(self, uuid: str) -> Any:
        handle = self._handles.get(uuid)
        if handle is None:
            handle = self._handles[uuid] = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return handle

    def _begin(self, before: int | None = None) -> None:
        """Open the library, unless another thread has done so since `before`."""
        with self._gate:
            if before is not None and before != self._generation:
                return
            self._close()
            try:
                pynvml.nvmlInit()
            except pynvml.NVMLError as error:
                raise _mapped("NVML", error) from error
            self._open = True
            self._generation += 1

    def _close(self) -> None:
        self._handles.clear()
        if self._open:
            self._open = False
            try:
                pynvml.nvmlShutdown()
            except pynvml.NVMLError as error:
                if error.value not in _STALE:
                    raise _mapped("NVML", error) from error


def _mapped(what: str, error: pynvml.NVMLError) -> NvmlError:
    trouble = _CODES.get(error.value, Trouble.OTHER)
    remedy = _REMEDY.get(trouble)
    return NvmlError(f"{what}: {error}{f'; {remedy}' if remedy else ''}", trouble)


@dataclass(frozen=True, slots=True)
class NvmlGpu:
    """One GPU, to be read. Every method raises NvmlError."""

    nvml: Nvml
    uuid: str

    def name(self) -> str:
        """As the driver calls it."""
        return str(self._ask("name", pynvml.nvmlDeviceGetName))

    def index(self) -> int:
        """Its number in `nvidia-smi`."""
        return int(self._ask("index", pynvml.nvmlDeviceGetIndex))

    def clocks_mhz(self) -> tuple[int, ...]:
        """The SM clocks that it can be locked to, ascending, at its highest memory clock."""
        memory = max(self._ask("memory clocks", pynvml.nvmlDeviceGetSupportedMemoryClocks))
        return tuple(sorted(self._ask("clocks", pynvml.nvmlDeviceGetSupportedGraphicsClocks, memory)))

    def clock_mhz(self) -> int:
        """The SM clock as it is now."""
        return int(self._ask("clock", pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM))

    def limit_w(self) -> float:
        """The power limit that is enforced."""
        return float(self._ask("power limit", pynvml.nvmlDeviceGetEnforcedPowerLimit)) / 1e3

    def brake(self) -> Brake:
        """What slows it down now."""
        bits = int(self._ask("clock event reasons", pynvml.nvmlDeviceGetCurrentClocksEventReasons))
        return Brake(bits & sum(part.value for part in Brake))

    def sample(self) -> Sample:
        """Everything that is read all the time, in some tens of microseconds."""
        try:
            energy_j = float(self._ask("energy", pynvml.nvmlDeviceGetTotalEnergyConsumption)) / 1e3
        except NvmlError as error:
            if error.trouble is not Trouble.UNSUPPORTED:
                raise
            energy_j = None
        return Sample(
            at_s=time.monotonic(),
            clock_mhz=self.clock_mhz(),
            watts=float(self._ask("power", pynvml.nvmlDeviceGetPowerUsage)) / 1e3,
            energy_j=energy_j,
            brake=self.brake(),
        )

    def use(self) -> Use | None:
        """Why nobody should set its clock; None: nothing."""
        if self._optional("MIG mode", pynvml.nvmlDeviceGetMigMode, default=(0, 0))[0]:
            return Use.MIG
        if self._optional("MPS clients", pynvml.nvmlDeviceGetMPSComputeRunningProcesses, default=()):
            return Use.MPS
        return None

    def processes(self) -> tuple[int, ...]:
        """Process ids that compute on it."""
        found = self._optional("processes", pynvml.nvmlDeviceGetComputeRunningProcesses, default=())
        return tuple(int(process.pid) for process in found)

    def _optional(self, what: str, function: Callable[..., Any], default: Any) -> Any:
        """For what older GPUs do not have."""
        try:
            return self._ask(what, function)
        except NvmlError as error:
            if error.trouble is not Trouble.UNSUPPORTED:
                raise
            return default

    def _ask(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.nvml.on(self.uuid, what, function, *arguments)


class Lock(tuple[int, int]):
    """A range that SM clocks are locked to: lowest, highest MHz."""

    __slots__ = ()

    def __new__(cls, low_mhz: int, high_mhz: int) -> Self:
        """Raises ValueError for a range that is none."""
        if not 0 < low_mhz <= high_mhz:
            raise ValueError(f"clocks {low_mhz} to {high_mhz} MHz: must be two positive numbers, the lower one first")
        return super().__new__(cls, (low_mhz, high_mhz))
