"""Everything that can be read of the GPUs here: kind, clock, power, processes, whether the clock stands still.

Sets nothing. Knows nothing of keepers.
"""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pynvml

from throttllem.doctor.finding import Finding, note, ok, trouble
from throttllem.doctor.steady import steady_mhz
from throttllem.doctor.timeouts import call_all, call_within
from throttllem.gpu.nvml import Nvml, NvmlError, NvmlGpu, Sharing, ThrottleReason, Trouble

MEASURE_S = 0.5
HANG_S = 3.0
"""A call that has not returned by then hangs."""
_POLL_S = 0.002
_ENGINES = ("vllm", "sglang", "trtllm", "tritonserver", "text-generation", "lmdeploy", "llama-server", "ollama")
_NEEDS_A_REMEDY = (
    ThrottleReason.HARDWARE
    | ThrottleReason.THERMAL
    | ThrottleReason.HARDWARE_THERMAL
    | ThrottleReason.POWER_BRAKE
    | ThrottleReason.APPLICATION_CLOCKS
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU as it is now. `refresh_s`: the period at which its energy counter is refreshed; None: not measured.
    `steady_mhz`: its clock, if it stands still for no reason that NVML reports.
    """

    number: int
    uuid: str
    name: str
    clocks_mhz: tuple[int, ...]
    clock_mhz: int
    watts: float
    limit_w: float
    has_counter: bool
    refresh_s: float | None
    throttle: ThrottleReason
    sharing: Sharing | None
    pids: tuple[int, ...]
    steady_mhz: int | None

    @property
    def subject(self) -> str:
        """Its name in findings."""
        return f"GPU {self.number}"


def driver_finding(nvml: Nvml) -> Finding:
    """The versions of driver and NVML. Raises NvmlError."""
    library = nvml.call("NVML's version", pynvml.nvmlSystemGetNVMLVersion)
    return ok("driver", f"NVIDIA {nvml.driver()}, NVML {library}")


def no_driver_finding(error: OSError) -> Finding:
    """Why no GPU can be read at all."""
    if isinstance(error, TimeoutError):
        return trouble("driver", f"it hangs: {error}", "see `dmesg`; a reboot helps")
    return trouble(
        "driver",
        f"no NVIDIA driver here: {error.__cause__ or error}",
        "load the driver (`nvidia-smi` must work; in a container, start it with --gpus); "
        "without one throttllem simulates GPUs",
    )


def read_gpus(nvml: Nvml, measure_s: float | None) -> tuple[list[Gpu], list[Finding], bool]:
    """The GPUs that can be read, why the others cannot, and whether a call hangs. `measure_s`: how long their energy
    counters are watched. Raises OSError where NVML does not list them.
    """
    numbered = call_within(HANG_S, nvml.gpus)
    if not numbered:
        return (
            [],
            [trouble("driver", "it drives no GPU", "see `dmesg` and `lspci`; in a container, pass one in")],
            False,
        )
    calls = {
        number: partial(_read, number, NvmlGpu(nvml, uuid), measure_s)
        for number, uuid in numbered.items()
        if isinstance(uuid, str)
    }
    results: dict[int, object] = {**numbered, **call_all(calls, HANG_S + (measure_s or 0.0))}
    return (
        [result for result in results.values() if isinstance(result, Gpu)],
        [_unreadable(number, result) for number, result in results.items() if isinstance(result, OSError)],
        any(isinstance(result, TimeoutError) for result in results.values()),
    )


def gpu_findings(gpu: Gpu, proc: Path = Path("/proc")) -> list[Finding]:
    """Everything about it except its lock."""
    subject, clocks = gpu.subject, gpu.clocks_mhz
    facts = f"{len(clocks)} clocks from {clocks[0]} to {clocks[-1]} MHz, now {gpu.clock_mhz} MHz"
    findings = [ok(subject, f"{gpu.uuid}, {gpu.name}: {facts}, {gpu.watts:.0f} of {gpu.limit_w:.0f} W")]
    if not gpu.has_counter:
        findings.append(note(subject, "no energy counter: power is integrated, a few percent less exact"))
    elif gpu.refresh_s is not None:
        findings.append(ok(subject, f"energy counter, refreshed every {_rounded(gpu.refresh_s)}"))
    else:
        findings.append(ok(subject, "energy counter"))
    if gpu.throttle & _NEEDS_A_REMEDY:
        remedy = "cooling, power supply or another tool: `nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER`"
        findings.append(trouble(subject, f"slowed down by {gpu.throttle.text}", remedy))
    elif reasons := gpu.throttle & ~ThrottleReason.IDLE:
        findings.append(note(subject, f"slowed down by {reasons.text}"))
    if gpu.sharing is not None:
        findings.append(trouble(subject, f"its clock is not to be set: {gpu.sharing.value}", "leave it out of `gpus`"))
    if gpu.pids:
        findings.append(note(subject, f"computing on it: {', '.join(_process(pid, proc) for pid in gpu.pids)}"))
    return findings


def _read(number: int, gpu: NvmlGpu, measure_s: float | None) -> Gpu:
    steady = steady_mhz(gpu)
    refresh_s = _refresh_s(gpu, measure_s) if measure_s else None
    sample = gpu.sample()
    return Gpu(
        number=number,
        uuid=gpu.uuid,
        name=gpu.name(),
        clocks_mhz=gpu.clocks_mhz(),
        clock_mhz=sample.clock_mhz,
        watts=sample.watts,
        limit_w=gpu.limit_w(),
        has_counter=sample.energy_j is not None,
        refresh_s=refresh_s,
        throttle=sample.throttle,
        sharing=gpu.sharing(),
        pids=gpu.processes(),
        steady_mhz=steady,
    )


def _unreadable(number: int, error: OSError) -> Finding:
    remedy = "`nvidia-smi -q` shows more; throttllem cannot use this GPU"
    if isinstance(error, TimeoutError):
        remedy = "see `dmesg`; reset it (`nvidia-smi --gpu-reset`) or reboot: a lock on it cannot be removed before"
    elif isinstance(error, NvmlError) and error.trouble is Trouble.LOST:
        remedy = "it fell off the bus: see `dmesg`; reset it (`nvidia-smi --gpu-reset`) or reboot"
    return trouble(f"GPU {number}", str(error).split("; ", maxsplit=1)[0], remedy)


def _refresh_s(gpu: NvmlGpu, measure_s: float) -> float | None:
    """The period at which its energy counter is refreshed; None: it was refreshed less than twice."""
    moved_s, last_j, end_s = list[float](), gpu.sample().energy_j, time.monotonic() + measure_s
    while time.monotonic() < end_s and last_j is not None:
        time.sleep(_POLL_S)
        sample = gpu.sample()
        if sample.energy_j != last_j:
            moved_s.append(sample.at_s)
            last_j = sample.energy_j
    gaps = [after - before for before, after in itertools.pairwise(moved_s)]
    return statistics.median(gaps) if gaps else None


def _rounded(seconds: float) -> str:
    return f"{round(seconds * 100) * 10} ms" if seconds > 0.02 else f"{seconds * 1e3:.0f} ms or less"


def _process(pid: int, proc: Path) -> str:
    """Its name. Of its command line, which may hold secrets, only whether an engine is named in it."""
    try:
        command = (proc / str(pid) / "cmdline").read_bytes().decode(errors="replace").lower()
        name = (proc / str(pid) / "comm").read_text(errors="replace").strip()
    except OSError:
        return f"process {pid} (of another container)"
    engine = next((engine for engine in _ENGINES if engine in command), None)
    return f"process {pid} ({name}, an engine: {engine})" if engine else f"process {pid} ({name})"
