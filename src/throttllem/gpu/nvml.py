"""GPUs read through NVML: clock, power, energy, throttle reasons, processes.

This module sets nothing: that is in `locks`, which only the keeper and the doctor import.
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
    """The kind of a failure."""

    NO_DRIVER = "no driver"
    DENIED = "not permitted"
    LOST = "GPU lost"
    UNSUPPORTED = "not supported"
    UNKNOWN_GPU = "no such GPU"
    MISMATCH = "driver and library differ"
    OTHER = "failed"


class NvmlError(OSError):
    """A call of NVML failed; the message names the call, the GPU and the remedy."""

    def __init__(self, message: str, trouble: Trouble) -> None:
        super().__init__(message)
        self.trouble = trouble


class ThrottleReason(Flag):
    """Why a clock is below the one that was set: the bits of NVML's clock event reasons."""

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
    def text(self) -> str:
        """ "power cap, thermal"."""
        return ", ".join(str(reason.name).lower().replace("_", " ") for reason in self) or "none"


class Sharing(StrEnum):
    """How a GPU is shared by clients that did not agree to another clock; such a GPU is not locked."""

    MIG = "MIG is on: its instances share one clock, and their tenants did not agree to it"
    MPS = "MPS shares it: other clients' kernels would slow down too"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One GPU at one moment (`at_s` of the monotonic clock). `energy_j`: since the driver was loaded; None: the GPU has
    no counter. `watts` None: it has no power reading; it has one of the two. `busy`: whether kernels ran lately; None:
    it does not report its utilization.
    """

    at_s: float
    clock_mhz: int
    watts: float | None
    energy_j: float | None
    throttle: ThrottleReason
    busy: bool | None = None


REMEDY = {
    Trouble.NO_DRIVER: "load the NVIDIA driver (`nvidia-smi` must work), or leave out --gpus (gpus of [[engines]])",
    Trouble.DENIED: "setting clocks needs root: run `throttllem keeper` as a service, or mode = 'dry-run'",
    Trouble.LOST: "it fell off the bus: see `dmesg`; reset or reboot it, the other GPUs go on without it",
    Trouble.UNKNOWN_GPU: "`throttllem doctor` lists the GPUs that are here",
    Trouble.MISMATCH: (
        "the driver was updated while its old kernel module stays loaded: reboot, or stop all users of the GPUs and "
        "reload the modules (`rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia; modprobe nvidia`); restart containers"
    ),
}
_TROUBLE = {
    pynvml.NVML_ERROR_UNINITIALIZED: Trouble.NO_DRIVER,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: Trouble.NO_DRIVER,
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: Trouble.NO_DRIVER,
    pynvml.NVML_ERROR_NO_PERMISSION: Trouble.DENIED,
    pynvml.NVML_ERROR_GPU_IS_LOST: Trouble.LOST,
    pynvml.NVML_ERROR_NOT_SUPPORTED: Trouble.UNSUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: Trouble.UNSUPPORTED,
    pynvml.NVML_ERROR_NOT_FOUND: Trouble.UNKNOWN_GPU,
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: Trouble.MISMATCH,
}
_UNLOADED = (pynvml.NVML_ERROR_UNINITIALIZED, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
"""The driver was unloaded: the library must be opened again, and every handle looked up again."""


class Nvml:
    """The library, open while the context is. Calls may come from any thread.

    A gateway and a keeper outlive driver updates. So a call that finds the driver reloaded opens the library again and
    is made once more; `_generation` counts the openings, so that of several threads only one does it.
    """

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._handles: dict[str, Any] = {}
        self._is_open = False
        self._generation = 0

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._gate:
            self._close()

    def gpus(self) -> dict[int, str | NvmlError]:
        """By number: the UUID, or why it cannot be read; a GPU that is lost hides no other. Raises NvmlError."""
        found = dict[int, str | NvmlError]()
        for number in range(self.call("GPUs", pynvml.nvmlDeviceGetCount)):
            try:
                handle = self.call(f"GPU {number}", pynvml.nvmlDeviceGetHandleByIndex, number)
                found[number] = str(self.call(f"UUID of GPU {number}", pynvml.nvmlDeviceGetUUID, handle))
            except NvmlError as error:
                found[number] = error
        return found

    def driver(self) -> str:
        """The driver's version. Raises NvmlError."""
        return str(self.call("driver version", pynvml.nvmlSystemGetDriverVersion))

    def call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """A call about no particular GPU; `what` names it in errors. Raises NvmlError."""
        return self._retried(what, lambda: function(*arguments))

    def call_gpu(self, uuid: str, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """A call about one GPU: `function(handle, *arguments)`. Raises NvmlError."""
        try:
            return self._retried(f"{what} of {uuid}", lambda: function(self._handle(uuid), *arguments))
        except NvmlError as error:
            if error.trouble in (Trouble.LOST, Trouble.OTHER):  # it may come back under another handle
                self._handles.pop(uuid, None)
            raise

    def _retried(self, what: str, call: Callable[[], Any]) -> Any:
        generation = self._generation
        try:
            return call()
        except pynvml.NVMLError as error:
            if error.value not in _UNLOADED:
                raise _mapped(what, error) from error
        self._open(generation)
        try:
            return call()
        except pynvml.NVMLError as error:
            raise _mapped(what, error) from error

    def _handle(self, uuid: str) -> Any:
        handle = self._handles.get(uuid)
        if handle is None:
            handle = self._handles[uuid] = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return handle

    def _open(self, generation: int | None = None) -> None:
        """Open the library, unless another thread has opened it since `generation`."""
        with self._gate:
            if generation is not None and generation != self._generation:
                return
            self._close()
            try:
                pynvml.nvmlInit()
            except pynvml.NVMLError as error:
                raise _mapped("NVML", error) from error
            self._is_open = True
            self._generation += 1

    def _close(self) -> None:
        self._handles.clear()
        if self._is_open:
            self._is_open = False
            try:
                pynvml.nvmlShutdown()
            except pynvml.NVMLError as error:
                if error.value not in _UNLOADED:
                    raise _mapped("NVML", error) from error


def _mapped(what: str, error: pynvml.NVMLError) -> NvmlError:
    trouble = _TROUBLE.get(error.value, Trouble.OTHER)
    remedy = REMEDY.get(trouble)
    return NvmlError(f"{what}: {error}{f'; {remedy}' if remedy else ''}", trouble)


@dataclass(frozen=True, slots=True)
class NvmlGpu:
    """One GPU, read-only. Every method raises NvmlError."""

    nvml: Nvml
    uuid: str

    def name(self) -> str:
        """The product's name."""
        return str(self._call("name", pynvml.nvmlDeviceGetName))

    def index(self) -> int:
        """Its number in `nvidia-smi`."""
        return int(self._call("index", pynvml.nvmlDeviceGetIndex))

    def clocks_mhz(self) -> tuple[int, ...]:
        """The SM clocks that it can be locked to, ascending, at its highest memory clock."""
        memory = max(self._call("memory clocks", pynvml.nvmlDeviceGetSupportedMemoryClocks))
        return tuple(sorted(self._call("clocks", pynvml.nvmlDeviceGetSupportedGraphicsClocks, memory)))

    def clock_mhz(self) -> int:
        """The SM clock now."""
        return int(self._call("clock", pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM))

    def limit_w(self) -> float | None:
        """The power limit: the enforced one, else the one that is set; None: it reports neither."""
        calls = (pynvml.nvmlDeviceGetEnforcedPowerLimit, pynvml.nvmlDeviceGetPowerManagementLimit)
        limit_mw = self.optional("power limit", *calls)
        return None if limit_mw is None else float(limit_mw) / 1e3

    def throttle(self) -> ThrottleReason:
        """What limits its clock now; none where it does not report that. Drivers before R535 have the older name."""
        calls = (pynvml.nvmlDeviceGetCurrentClocksEventReasons, pynvml.nvmlDeviceGetCurrentClocksThrottleReasons)
        bits = int(self.optional("clock event reasons", *calls) or 0)
        return ThrottleReason(bits & sum(reason.value for reason in ThrottleReason))

    def sample(self) -> Sample:
        """Everything that is read periodically, in some tens of microseconds."""
        energy_mj = self.optional("energy", pynvml.nvmlDeviceGetTotalEnergyConsumption)
        power_mw = self.optional("power", pynvml.nvmlDeviceGetPowerUsage)
        if energy_mj is None and power_mw is None:
            raise NvmlError(f"power of {self.uuid}: it has neither a power reading nor a counter", Trouble.UNSUPPORTED)
        rates = self.optional("utilization", pynvml.nvmlDeviceGetUtilizationRates)
        return Sample(
            at_s=time.monotonic(),
            clock_mhz=self.clock_mhz(),
            watts=None if power_mw is None else float(power_mw) / 1e3,
            energy_j=None if energy_mj is None else float(energy_mj) / 1e3,
            throttle=self.throttle(),
            busy=None if rates is None else rates.gpu > 0,
        )

    def sharing(self) -> Sharing | None:
        """How other clients share it, which forbids setting its clock; None: it is not shared."""
        if (self.optional("MIG mode", pynvml.nvmlDeviceGetMigMode) or (0, 0))[0]:
            return Sharing.MIG
        calls = (pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v3, pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v2)
        if self.optional("MPS clients", *calls):
            return Sharing.MPS
        return None

    def processes(self) -> tuple[int, ...] | None:
        """Ids of the processes that compute on it; None: it does not list them."""
        calls = (pynvml.nvmlDeviceGetComputeRunningProcesses_v3, pynvml.nvmlDeviceGetComputeRunningProcesses_v2)
        found = self.optional("processes", *calls)
        return None if found is None else tuple(int(process.pid) for process in found)

    def optional(self, what: str, *functions: Callable[..., Any], arguments: tuple[Any, ...] = ()) -> Any:
        """A call that not every GPU supports, under the names that drivers of some age have, newest first; None: it is
        not supported.
        """
        for function in functions:
            try:
                return self._call(what, function, *arguments)
            except NvmlError as error:
                if error.trouble is not Trouble.UNSUPPORTED:
                    raise
        return None

    def _call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.nvml.call_gpu(self.uuid, what, function, *arguments)
