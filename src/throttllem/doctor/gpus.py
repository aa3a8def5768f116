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
from throttllem.gpu.boards.facts import read_board
from throttllem.gpu.boards.users import ENGINES
from throttllem.gpu.counter import STANDS_S, odd_counter
from throttllem.gpu.nvml import REMEDY, Nvml, NvmlError, NvmlGpu, Sample, Sharing, ThrottleReason, Trouble
from throttllem.physics.catalogue import Catalogue
from throttllem.physics.recognition import Board, recognise

MEASURE_S = 0.5
HANG_S = 3.0
"""A call that has not returned by then hangs."""
_POLL_S = 0.002
_NEEDS_A_REMEDY = (
    ThrottleReason.HARDWARE
    | ThrottleReason.THERMAL
    | ThrottleReason.HARDWARE_THERMAL
    | ThrottleReason.POWER_BRAKE
    | ThrottleReason.APPLICATION_CLOCKS
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter:
    """An energy counter. `refresh_s`: its period. `times_watts`: its slope over the power that was read meanwhile, 0 if
    it stood still. None: not measured.
    """

    refresh_s: float | None = None
    times_watts: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU as it is now. `counter`: what was seen of its energy counter; None: it has none. `watts`, `limit_w`
    None: not reported. `pids` None: NVML does not list them. `steady_mhz`: its clock, if it stands still for no reason
    that NVML reports.
    """

    number: int
    uuid: str
    board: Board
    clocks_mhz: tuple[int, ...]
    clock_mhz: int
    watts: float | None
    limit_w: float | None
    counter: Counter | None
    throttle: ThrottleReason
    sharing: Sharing | None
    pids: tuple[int, ...] | None
    steady_mhz: int | None

    @property
    def subject(self) -> str:
        """Its name in findings."""
        return f"GPU {self.number}"


def driver_finding(nvml: Nvml) -> Finding:
    """The versions of driver and NVML. Raises NvmlError."""
    try:
        library = nvml.call("NVML's version", pynvml.nvmlSystemGetNVMLVersion)
        return ok("driver", f"NVIDIA {nvml.driver()}, NVML {library}")
    except NvmlError as error:
        if error.trouble is not Trouble.UNSUPPORTED:
            raise
        return note("driver", "it does not report its version")


def no_driver_finding(error: OSError) -> Finding:
    """Why no GPU can be read at all."""
    if isinstance(error, TimeoutError):
        return trouble("driver", f"it hangs: {error}", "see `dmesg`; a reboot helps")
    if isinstance(error, NvmlError) and error.trouble is Trouble.MISMATCH:
        return trouble("driver", f"it cannot be used: {error.__cause__ or error}", REMEDY[Trouble.MISMATCH])
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


def gpu_findings(gpu: Gpu, catalogue: Catalogue, proc: Path = Path("/proc")) -> list[Finding]:
    """Everything about it except its lock."""
    subject, clocks = gpu.subject, gpu.clocks_mhz
    facts = f"{len(clocks)} clocks from {clocks[0]} to {clocks[-1]} MHz" if clocks else "no clocks that can be set"
    facts += f", now {gpu.clock_mhz} MHz"
    watts = "unknown" if gpu.watts is None else f"{gpu.watts:.0f}"
    limit = "" if gpu.limit_w is None else f" of {gpu.limit_w:.0f}"
    findings = [ok(subject, f"{gpu.uuid}, {gpu.board.name}: {facts}, {watts}{limit} W")]
    findings += [_kind(gpu, catalogue), _energy(gpu)]
    if gpu.throttle & _NEEDS_A_REMEDY:
        remedy = "cooling, power supply or another tool: `nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER`"
        findings.append(trouble(subject, f"slowed down by {gpu.throttle.text}", remedy))
    elif reasons := gpu.throttle & ~ThrottleReason.IDLE:
        findings.append(note(subject, f"slowed down by {reasons.text}"))
    if gpu.sharing is not None:
        findings.append(trouble(subject, f"its clock is not to be set: {gpu.sharing.value}", "leave it out of `gpus`"))
    if gpu.pids is None:
        findings.append(note(subject, "NVML does not list the processes that compute on it"))
    elif gpu.pids:
        findings.append(note(subject, f"computing on it: {', '.join(_process(pid, proc) for pid in gpu.pids)}"))
    return findings


def _kind(gpu: Gpu, catalogue: Catalogue) -> Finding:
    """Its kind, or how to add it."""
    found = recognise(gpu.board, catalogue)
    if found.listed:
        kind = found.gpu
        said = f"its kind is {kind.name}: seconds {kind.time_basis.kind}, watts {kind.power_basis.kind}"
        return ok(gpu.subject, said)
    remedy = (
        "until then it is used as modelled; to add it, paste this into a file for --catalogue, correct what is "
        f"guessed, then `throttllem calibrate`:\n{found.entry()}"
    )
    return note(gpu.subject, f"{gpu.board.text} {found.why}", remedy)


def _energy(gpu: Gpu) -> Finding:
    """What is to be known of its energy counter and its power reading."""
    counter = gpu.counter
    if counter is None:
        return note(gpu.subject, "no energy counter: power is integrated, a few percent less exact")
    if counter.times_watts is not None and (odd := odd_counter(counter.times_watts)):
        return note(gpu.subject, f"{odd}: power is integrated instead")
    if gpu.watts is None:
        return note(gpu.subject, "no power reading: watts are the slope of its energy counter")
    if counter.refresh_s is not None:
        return ok(gpu.subject, f"energy counter, refreshed every {_rounded(counter.refresh_s)}")
    return ok(gpu.subject, "energy counter")


def _read(number: int, gpu: NvmlGpu, measure_s: float | None) -> Gpu:
    board = read_board(gpu)
    steady = steady_mhz(gpu) if board.clocks_mhz else None
    counter = _counter(gpu, measure_s or 0.0)
    sample = gpu.sample()
    return Gpu(
        number=number,
        uuid=gpu.uuid,
        board=board,
        clocks_mhz=board.clocks_mhz,
        clock_mhz=sample.clock_mhz,
        watts=sample.watts,
        limit_w=gpu.limit_w(),
        counter=counter,
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


def _counter(gpu: NvmlGpu, measure_s: float) -> Counter | None:
    """Its energy counter, watched for that long; None: it has none."""
    first, end_s = gpu.sample(), time.monotonic() + measure_s
    if first.energy_j is None:
        return None
    moves, watts = list[Sample](), list[float]()
    last_j: float | None = first.energy_j
    while time.monotonic() < end_s:
        time.sleep(_POLL_S)
        sample = gpu.sample()
        if sample.watts is not None:
            watts.append(sample.watts)
        if sample.energy_j != last_j:
            moves.append(sample)
            last_j = sample.energy_j
    if len(moves) < 2:
        return Counter(times_watts=0.0 if not moves and watts and measure_s >= STANDS_S else None)
    lasted_s, counted_j = moves[-1].at_s - moves[0].at_s, (moves[-1].energy_j or 0.0) - (moves[0].energy_j or 0.0)
    mean_w = statistics.fmean(watts) if watts else 0.0
    return Counter(
        refresh_s=statistics.median(after.at_s - before.at_s for before, after in itertools.pairwise(moves)),
        times_watts=counted_j / lasted_s / mean_w if mean_w else None,
    )


def _rounded(seconds: float) -> str:
    return f"{round(seconds * 100) * 10} ms" if seconds > 0.02 else f"{seconds * 1e3:.0f} ms or less"


def _process(pid: int, proc: Path) -> str:
    """Its name. Of its command line, which may hold secrets, only whether an engine is named in it."""
    try:
        command = (proc / str(pid) / "cmdline").read_bytes().decode(errors="replace").lower()
        name = (proc / str(pid) / "comm").read_text(errors="replace").strip()
    except OSError:
        return f"process {pid} (of another container)"
    engine = next((engine for engine in ENGINES if engine in command), None)
    return f"process {pid} ({name}, an engine: {engine})" if engine else f"process {pid} ({name})"
