"""The whole examination: driver, GPUs, their locks, this user's rights, the keeper, zeusd. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from throttllem.doctor.finding import Finding, note, ok, trouble
from throttllem.doctor.gpus import HANG_S, Gpu, driver_finding, gpu_findings, no_driver_finding, read_gpus
from throttllem.doctor.keeper_state import KeeperState, keeper_findings, left_locked, read_keeper_state
from throttllem.doctor.rights import missing_right, this_user
from throttllem.doctor.timeouts import call_within
from throttllem.gpu.nvml import Nvml, NvmlError
from throttllem.physics.catalogue import Catalogue


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """The findings, and the facts behind them."""

    findings: tuple[Finding, ...]
    gpus: tuple[Gpu, ...]
    keeper: KeeperState


def examine(state: Path, socket: Path, zeusd: Path, measure_s: float | None, catalogue: Catalogue) -> Examined:
    """Takes about 0.2 s and `measure_s` for the energy counters. Raises nothing for what it finds."""
    keeper, gpus, findings = read_keeper_state(state, socket), list[Gpu](), list[Finding]()
    try:
        with ExitStack() as stack:
            nvml = call_within(HANG_S, lambda: stack.enter_context(Nvml()))
            findings.append(call_within(HANG_S, lambda: driver_finding(nvml)))
            gpus, faults, hang = read_gpus(nvml, measure_s)
            if hang:  # closing NVML would hang, too
                stack.pop_all()
    except (NvmlError, TimeoutError) as error:
        faults = [no_driver_finding(error)]
    here = {gpu.uuid: gpu.subject for gpu in gpus}
    for gpu in gpus:
        findings += [*gpu_findings(gpu, catalogue), *lock_findings(gpu, keeper)]
    findings += faults
    findings += keeper_findings(keeper, here if gpus and not faults else None, this_user())
    findings += left_locked(keeper, here)
    findings += rights_findings(gpus, keeper)
    if zeusd.exists():
        findings.append(
            note("zeusd", f"there is one at {zeusd}: [clocks] zeusd can replace the keeper, but it restores nothing")
        )
    return Examined(findings=tuple(findings), gpus=tuple(gpus), keeper=keeper)


def lock_findings(gpu: Gpu, keeper: KeeperState) -> Iterator[Finding]:
    """What the keeper knows about its lock; else a hint, if its clock stands still. NVML does not report locks."""
    subject, uuid, steady = gpu.subject, gpu.uuid, gpu.steady_mhz
    baseline = keeper.baseline_of(uuid)
    if keeper.restoring(uuid):
        yield trouble(
            subject,
            "still being restored by the keeper: the driver refuses, or hangs",
            "`journalctl -u throttllem-keeper` shows why; the keeper retries",
        )
    elif (holder := keeper.holder_of(uuid)) is not None:
        mhz = keeper.set_mhz(uuid)
        state = "leased, not set yet," if mhz is None else f"locked to {mhz} MHz"
        yield ok(subject, f"{state} by the keeper, for {holder}")
    elif steady is None:
        yield ok(subject, "no sign of a lock (NVML does not report locks; one that limits no clock now has no sign)")
    elif baseline is not None and baseline.low_mhz <= steady <= baseline.high_mhz:
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


def rights_findings(gpus: list[Gpu], keeper: KeeperState) -> Iterator[Finding]:
    """Whether this user can have clocks set, through the keeper or directly; nothing is tried."""
    if not gpus:
        return
    user = this_user()
    through_keeper = [gpu for gpu in gpus if keeper.range_of(gpu.uuid) is not None]
    for gpu in through_keeper:
        yield _range_finding(gpu, keeper, user)
    if through_keeper and len(through_keeper) < len(gpus):
        left_out = ", ".join(gpu.subject for gpu in gpus if gpu not in through_keeper)
        yield note("rights", f"the keeper does not set {left_out}", "if it should, add --gpu to the service's options")
    missing = missing_right()
    if missing is None:
        only = "" if through_keeper else "; `serve` sets them through a keeper only"
        yield ok("rights", f"{user} may set clocks, as far as can be known without setting one{only}")
    elif not through_keeper:
        yield trouble(
            "rights",
            f"{user} may not set clocks (missing: {missing}), and there is no keeper: the gateway only does a dry run",
            "`throttllem keeper --gpu UUID=MHZ-MHZ --user NAME --unit` prints a service for root; "
            "until then [clocks] mode = 'dry-run'",
        )


def _range_finding(gpu: Gpu, keeper: KeeperState, user: str) -> Finding:
    low_mhz, high_mhz = keeper.range_of(gpu.uuid) or (0, 0)
    text = f"the keeper sets {gpu.subject} for {user}, from {low_mhz} to {high_mhz} MHz"
    if not any(low_mhz <= clock <= high_mhz for clock in gpu.clocks_mhz):
        return trouble("rights", f"{text}, and it has no clock there", "correct --gpu in the service's options")
    if high_mhz < (top_mhz := gpu.clocks_mhz[-1]):
        return note("rights", f"{text} of {top_mhz}", "`profile` needs the highest one; --gpu in the service's options")
    return ok("rights", text)
