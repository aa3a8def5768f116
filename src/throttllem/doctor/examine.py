"""The whole examination: driver, GPUs, their locks and whose they are, rights, keeper, zeusd. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from throttllem.doctor.finding import Finding, note, ok, trouble
from throttllem.doctor.gpus import HANG_S, Gpu, described, driver, look, no_driver
from throttllem.doctor.keeping import Keeper, ask_keeper, keeper_findings, left_behind
from throttllem.doctor.rights import missing_right, who
from throttllem.doctor.waiting import within
from throttllem.gpu.nvml import Nvml, NvmlError


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """What was found, in words and as it is."""

    findings: tuple[Finding, ...]
    gpus: tuple[Gpu, ...]
    keeper: Keeper


def examine(state: Path, socket: Path, zeusd: Path, measure_s: float | None) -> Examined:
    """Never raises for what it finds; takes about 0.2 s and what is measured."""
    keeper, gpus, findings = ask_keeper(state, socket), list[Gpu](), list[Finding]()
    try:
        with ExitStack() as stack:
            nvml = within(HANG_S, lambda: stack.enter_context(Nvml()))
            findings.append(within(HANG_S, lambda: driver(nvml)))
            gpus, faults, hangs = look(nvml, measure_s)
            if hangs:  # closing would hang too
                stack.pop_all()
    except (NvmlError, TimeoutError) as error:
        faults = [no_driver(error)]
    here = {gpu.uuid: gpu.subject for gpu in gpus}
    for gpu in gpus:
        findings += [*described(gpu), *lock_of(gpu, keeper)]
    findings += faults
    findings += keeper_findings(keeper, here if gpus and not faults else None, who())
    findings += left_behind(keeper, here)
    findings += rights(gpus, keeper)
    findings += _zeusd(zeusd)
    return Examined(findings=tuple(findings), gpus=tuple(gpus), keeper=keeper)


def lock_of(gpu: Gpu, keeper: Keeper) -> Iterator[Finding]:
    """What the keeper knows about its lock; else a hint, if its clock stands still. NVML does not report locks."""
    subject, uuid, steady = gpu.subject, gpu.uuid, gpu.steady_mhz
    mhz, baseline = keeper.set_mhz(uuid), keeper.status.get("normally", {}).get(uuid)
    if keeper.returning(uuid):
        yield trouble(
            subject,
            "still being restored by the keeper: the driver refuses, or hangs",
            "`journalctl -u throttllem-keeper` shows why; the keeper retries",
        )
    elif (holder := keeper.holder_of(uuid)) is not None:
        locked = "not set yet" if mhz is None else f"locked to {mhz} MHz"
        yield ok(subject, f"{locked} by the keeper, for {holder}")
    elif steady is None:
        yield ok(subject, "no sign of a lock (NVML does not report locks; one that limits no clock now has no sign)")
    elif baseline is not None and baseline[0] <= steady <= baseline[1]:
        yield ok(subject, f"steady at {steady} MHz, within its baseline (the keeper's --normally)")
    elif uuid in keeper.left:
        if keeper.runs:
            yield note(subject, f"locked at {steady} MHz by the keeper, according to its journal")
    else:
        yield note(
            subject,
            f"steady at {steady} of {gpu.clocks_mhz[-1]} MHz: another program's lock, or the boost clock of a busy GPU",
            f"`nvidia-smi -i {gpu.number} -rgc` as root, or `throttllem doctor --restore --gpu {uuid}`, resets a lock; "
            "so does the end of a lease, unless the keeper's --normally states it as the baseline",
        )


def rights(gpus: list[Gpu], keeper: Keeper) -> Iterator[Finding]:
    """Whether this user can have clocks set, by himself or by the keeper; nothing is tried."""
    if not gpus:
        return
    missing, kept = missing_right(), [gpu for gpu in gpus if keeper.range_of(gpu.uuid) is not None]
    for gpu in kept:
        low, high = keeper.range_of(gpu.uuid) or (0, 0)
        text, top = f"the keeper sets {gpu.subject} for {who()}, from {low} to {high} MHz", gpu.clocks_mhz[-1]
        if not any(low <= clock <= high for clock in gpu.clocks_mhz):
            yield trouble("rights", f"{text}, and it has no clock there", "mend --gpu in the service's options")
        elif high < top:
            yield note("rights", f"{text} of {top}", "`profile` needs the top one; --gpu in the service's options")
        else:
            yield ok("rights", text)
    if kept and len(kept) < len(gpus):
        others = ", ".join(gpu.subject for gpu in gpus if gpu not in kept)
        yield note("rights", f"the keeper does not set {others}", "if it should, add --gpu to the service's options")
    if missing is None:
        only = "" if kept else "; `serve` does it through a keeper only"
        yield ok("rights", f"{who()} may set clocks, as far as can be told without setting one{only}")
    elif not kept:
        yield trouble(
            "rights",
            f"{who()} may not set clocks (missing: {missing}), and no keeper does it for them: clocks are only advised",
            "`throttllem keeper --gpu UUID=MHZ-MHZ --user NAME --unit` prints a service for root; "
            "until then [clocks] mode = 'dry-run'",
        )


def _zeusd(path: Path) -> Iterator[Finding]:
    if path.exists():
        yield note(
            "zeusd", f"there is one at {path}: [clocks] zeusd can stand in the keeper's place, but restores nothing"
        )
