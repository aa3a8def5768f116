"""What can be read of the GPUs here: what they are, what they do, who works on them, whether their clock stands still.

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
from throttllem.doctor.waiting import side_by_side, within
from throttllem.gpu.nvml import Brake, Nvml, NvmlError, NvmlGpu, Trouble, Use

MEASURE_S = 0.5
HANG_S = 3.0
"""A call that has not come back by then hangs."""
_LOOK_S = 0.002
_ENGINES = ("vllm", "sglang", "trtllm", "tritonserver", "text-generation", "lmdeploy", "llama-server", "ollama")
_BRAKES_OF_HARDWARE = (
    Brake.HARDWARE | Brake.THERMAL | Brake.HARDWARE_THERMAL | Brake.POWER_BRAKE | Brake.APPLICATION_CLOCKS
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU as it is now. `steady_mhz`: its clock, if it stands still for no reason that NVML reports. `refresh_s`:
    of its energy counter, None: not measured.
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
    brake: Brake
    use: Use | None
    pids: tuple[int, ...]
    steady_mhz: int | None

    @property
    def subject(self) -> str:
        """What findings call it."""
        return f"GPU {self.number}"


def driver(nvml: Nvml) -> Finding:
    """Its version. Raises NvmlError."""
    library = nvml.ask("NVML's version", pynvml.nvmlSystemGetNVMLVersion)
    return ok("driver", f"NVIDIA {nvml.driver()}, NVML {library}")


def no_driver(error: OSError) -> Finding:
    """Why there is no GPU to speak of."""
    if isinstance(error, TimeoutError):
        return trouble("driver", f"it hangs: {error}", "see `dmesg`; what helps is a reboot")
    return trouble(
        "driver",
        f"no NVIDIA driver here: {error.__cause__ or error}",
        "load the driver (`nvidia-smi` must work; in a container, start it with --gpus); "
        "without one throttllem simulates GPUs",
    )


def look(nvml: Nvml, measure_s: float | None) -> tuple[list[Gpu], list[Finding], bool]:
    """All that can be read, why the others cannot, and whether a call hangs. Raises OSError where NVML says nothing."""
    numbered = within(HANG_S, nvml.gpus)
    if not numbered:
        return (
            [],
            [trouble("driver", "it drives no GPU", "see `dmesg` and `lspci`; in a container, pass one in")],
            False,
        )
    calls = {
        number: partial(_one, number, NvmlGpu(nvml, uuid), measure_s)
        for number, uuid in numbered.items()
        if isinstance(uuid, str)
    }
    looks: dict[int, object] = {**numbered, **side_by_side(calls, HANG_S + (measure_s or 0.0))}
    return (
        [one for one in looks.values() if isinstance(one, Gpu)],
        [_unread(number, one) for number, one in looks.items() if isinstance(one, OSError)],
        any(isinstance(one, TimeoutError) for one in looks.values()),
    )


def described(gpu: Gpu, process: Path = Path("/proc")) -> list[Finding]:
    """Everything about it except its lock."""
    subject, clocks = gpu.subject, gpu.clocks_mhz
    facts = f"{len(clocks)} clocks from {clocks[0]} to {clocks[-1]} MHz, now {gpu.clock_mhz} MHz"
    findings = [ok(subject, f"{gpu.uuid}, {gpu.name}: {facts}, {gpu.watts:.0f} of {gpu.limit_w:.0f} W")]
    if not gpu.has_counter:
        findings.append(note(subject, "no energy counter: joules are summed up from watts, a few percent less exact"))
    elif gpu.refresh_s is not None:
        findings.append(ok(subject, f"energy counter, refreshed every {_rounded(gpu.refresh_s)}"))
    else:
        findings.append(ok(subject, "energy counter"))
    if gpu.brake & _BRAKES_OF_HARDWARE:
        remedy = "cooling, power supply or another tool: `nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER`"
        findings.append(trouble(subject, f"slowed down by {gpu.brake.words}", remedy))
    elif slowing := gpu.brake & ~Brake.IDLE:
        findings.append(note(subject, f"slowed down by {slowing.words}"))
    if gpu.use is not None:
        findings.append(trouble(subject, f"its clock is not to be set: {gpu.use.value}", "leave it out of `gpus`"))
    if gpu.pids:
        findings.append(note(subject, f"computing on it: {', '.join(_process(pid, process) for pid in gpu.pids)}"))
    return findings


def _one(number: int, gpu: NvmlGpu, measure_s: float | None) -> Gpu:
    steady, refresh_s, sample = steady_mhz(gpu), _refresh_s(gpu, measure_s) if measure_s else None, gpu.sample()
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
        brake=sample.brake,
        use=gpu.use(),
        pids=gpu.processes(),
        steady_mhz=steady,
    )


def _unread(number: int, error: OSError) -> Finding:
    remedy = "`nvidia-smi -q` tells more; throttllem cannot use this GPU"
    if isinstance(error, TimeoutError):
        remedy = "see `dmesg`; reset it (`nvidia-smi --gpu-reset`) or reboot: a lock on it cannot be taken off before"
    elif isinstance(error, NvmlError) and error.trouble is Trouble.LOST:
        remedy = "it fell off the bus: see `dmesg`; reset it (`nvidia-smi --gpu-reset`) or reboot"
    return trouble(f"GPU {number}", str(error).split("; ", maxsplit=1)[0], remedy)


def _refresh_s(gpu: NvmlGpu, for_s: float) -> float | None:
    """How often its energy counter moves; None where it does so less than twice."""
    moved_s, last_j, ends_s = list[float](), gpu.sample().energy_j, time.monotonic() + for_s
    while time.monotonic() < ends_s and last_j is not None:
        time.sleep(_LOOK_S)
        sample = gpu.sample()
        if sample.energy_j != last_j:
            moved_s.append(sample.at_s)
            last_j = sample.energy_j
    gaps = [after - before for before, after in itertools.pairwise(moved_s)]
    return statistics.median(gaps) if gaps else None


def _rounded(seconds: float) -> str:
    return f"{round(seconds * 100) * 10} ms" if seconds > 0.02 else f"{seconds * 1e3:.0f} ms or less"


def _process(pid: int, process: Path) -> str:
    """What it is called; of its command line, which may hold secrets, only whether an engine is named in it."""
    try:
        line = (process / str(pid) / "cmdline").read_bytes().decode(errors="replace").lower()
        name = (process / str(pid) / "comm").read_text(errors="replace").strip()
    except OSError:
        return f"process {pid} (of another container)"
    engine = next((engine for engine in _ENGINES if engine in line), None)
    return f"process {pid} ({name}, an engine: {engine})" if engine else f"process {pid} ({name})"
