"""`serve --check`: the resolved configuration, where each value came from, and what it would do. Changes nothing."""

from __future__ import annotations

import asyncio
import ipaddress
import shlex
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from throttllem.agent.remote_gpu import RemoteGpu
from throttllem.config import Options, ServerOptions
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.clocks.savings_estimate import dearer_loads
from throttllem.core.forecast.performance_table import Calibrated, PerformanceTable, TableVerdict
from throttllem.core.options import ControllerOptions
from throttllem.engines.base import Connected, EngineError
from throttllem.engines.step_reports import check_folder, read_secret
from throttllem.files import WriteError, open_to_others, writable_dir
from throttllem.gateway.build import Gateway, build_gateway
from throttllem.gateway.control.backend import Backend
from throttllem.gateway.control.backend_factory import RealGpu
from throttllem.gateway.http.server import bind
from throttllem.gpu.hardware import HardwareGpu, Mode, check_apart
from throttllem.gpu.keeper_client import keeper_status
from throttllem.gpu.zeusd import reach
from throttllem.option_sources import leaves

_LOOK_AGAIN_S = 0.05
_REACH_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the answer. `mark`: "ok", "--" (to be known), "!!" (to be mended); `fatal`: serve would not start."""

    mark: str
    text: str
    fatal: bool = False


async def check_configuration(options: Options, origins: dict[str, str], cache_dir: Path) -> list[Finding]:
    """Everything worth saying, in the order in which `serve` would come to it."""
    findings = [
        *_values(options, origins),
        *_ports(options),
        *_access(options),
        *_secrets(origins),
        *_folders(options, cache_dir),
        *_slos(options),
        *_step_reports(options),
    ]
    try:
        gateway = build_gateway(options, cache_dir, version="", now=time.monotonic, learn=False)
    except (ValueError, OSError) as error:
        return [*findings, Finding(mark="!!", text=str(error), fatal=True)]
    return [*findings, *await _engines(gateway, options, origins)]


def verdict(findings: Sequence[Finding]) -> tuple[int, str]:
    """The exit code and the last line: 0 without any "!!", 1 if serve would start all the same, 2 if it would not."""
    wrong = sum(finding.mark == "!!" for finding in findings)
    if any(finding.fatal for finding in findings):
        return 2, f"{wrong} to correct; serve would not start"
    return (1, f"{wrong} to correct; serve would start all the same") if wrong else (0, "nothing to correct")


def _values(options: Options, origins: dict[str, str]) -> Iterator[Finding]:
    """Every option that was set, and where."""
    for path, value in leaves(options):
        if path in origins:
            yield Finding(mark="ok", text=f"{path} = {value}   ({origins[path]})")
    yield Finding(mark="--", text="everything else has its default (docs/reference/configuration.md)")


def _ports(options: Options) -> Iterator[Finding]:
    try:
        bind(options.server).close()
    except OSError as error:
        yield Finding(mark="!!", text=str(error), fatal=True)
        return
    server = options.server
    yield Finding(mark="ok", text=f"would listen on {server.host}:{server.port}")
    if server.metrics_port is not None:
        where = f"{server.metrics_host}:{server.metrics_port}"
        yield Finding(mark="ok", text=f"metrics and dashboard on {where}, which needs no key")


def _access(options: Options) -> Iterator[Finding]:
    server = options.server
    if door := _keyless(server):
        yield Finding(mark="!!", text=door)
    elif server.api_keys:
        yield Finding(mark="ok", text=f"{len(server.api_keys)} API keys: a request must carry one of them")
    else:
        yield Finding(mark="ok", text="no API keys: every client on this machine is served")
    if door := _public_metrics(server):
        yield Finding(mark="--", text=door)


def open_doors(server: ServerOptions) -> Iterator[str]:
    """Where clients of other machines need no key."""
    yield from filter(None, (_keyless(server), _public_metrics(server)))


def exposed(options: Options, cache_dir: Path) -> Iterator[str]:
    """Folders that another user of this machine can write to, and so decide: the state, and the performance tables."""
    named = {"state_dir": options.state_dir.expanduser(), "cache_dir": cache_dir}
    named |= {f"engines.{index}.tables": entry.tables for index, entry in enumerate(options.engines) if entry.tables}
    if options.recorder.enabled:
        named["recorder.folder"] = (options.recorder.folder or options.state_dir / "flight").expanduser()
    for name, folder in named.items():
        if text := open_to_others(folder):
            yield f"{name}: {text}"


def _secrets(origins: dict[str, str]) -> Iterator[Finding]:
    """Files from which a key was read that other users of this machine can read or change."""
    from_file = {origin.rpartition(":")[0] for name, origin in origins.items() if "_key" in name and ":" in origin}
    for file in sorted(from_file):
        try:
            mode = Path(file).expanduser().stat().st_mode
        except OSError:  # It was removed or replaced since it was read: nothing is exposed there.
            continue
        if mode & 0o077:
            text = f"{file} holds keys, and other users can read or write it (mode {stat.S_IMODE(mode):04o})"
            yield Finding(mark="!!", text=f"{text}: chmod 600 {file}")


def _keyless(server: ServerOptions) -> str | None:
    if server.api_keys or _is_loopback(server.host):
        return None
    return f"no API keys, and {server.host} is not loopback: every client that reaches it is served"


def _public_metrics(server: ServerOptions) -> str | None:
    if server.metrics_port is None or _is_loopback(server.metrics_host):
        return None
    return f"{server.metrics_host} is not loopback: every client that reaches it sees metrics and the dashboard"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _folders(options: Options, cache_dir: Path) -> Iterator[Finding]:
    state = options.state_dir.expanduser()
    try:
        writable_dir(state)
    except WriteError as error:
        yield Finding(mark="!!", text=f"state_dir: {error}", fatal=True)
        return
    yield Finding(mark="ok", text=f"learned output lengths are stored in {state}")
    for text in exposed(options, cache_dir):
        yield Finding(mark="!!", text=text)
    recorder = options.recorder
    if recorder.enabled:
        folder = (recorder.folder or options.state_dir / "flight").expanduser()
        most = recorder.files * recorder.file_bytes / 2**20
        yield Finding(mark="ok", text=f"flight recorder: {folder}, at most {most:.0f} MiB per model")


def _slos(options: Options) -> Iterator[Finding]:
    for name, slo in (("by default", options.slo), *((f"class {name}", slo) for name, slo in options.classes.items())):
        parts = [
            f"{part[:-2].upper()} {getattr(slo, part):g} s"
            for part in ("e2e_s", "tbt_s", "ttft_s")
            if getattr(slo, part)
        ]
        parts += ["requests can wait, and may be held to run together"] if slo.batch else []
        yield Finding(mark="ok" if parts else "--", text=f"SLO {name}: {', '.join(parts) or 'none'}")


def _step_reports(options: Options) -> Iterator[Finding]:
    """Where steps of a plug-in could not be received or believed, whether or not its engine is up."""
    for index, entry in enumerate(options.engines):
        if entry.stats is None:
            continue
        try:
            check_folder(entry.stats)
            if entry.stats_secret is not None:
                read_secret(entry.stats_secret)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            yield Finding(mark="!!", text=f"engines.{index}.stats: {why or error}")


async def _engines(gateway: Gateway, options: Options, origins: dict[str, str]) -> list[Finding]:
    findings = []
    for model in gateway.models.served:
        aware = model.loop.controller.options.slo_aware
        for backend in model.loop.backends:
            findings += await _engine(backend, model.loop.controller.options, options)
            findings += await _hardware(backend, options, origins)
            findings += [Finding(mark="--", text=f"engine {backend.name}: {note}") for note in backend.gpu_notes]
            if aware and backend.tp not in model.loop.controller.options.tables:
                findings.append(_no_table(backend))
            table = model.loop.controller.options.tables.get(backend.tp)
            if table is not None and not table.clocks_measured:
                findings.append(_no_clock_axis(backend))
            elif table is not None and backend.kind != "simulated":
                findings.append(_judged(backend, table.verdict))
            if table is not None and table.calibrated is not None:
                findings.append(_calibrated(backend, table.calibrated))
    try:
        check_apart(gateway.hardware)
    except ValueError as error:
        findings.append(Finding(mark="!!", text=str(error), fatal=True))
    return findings


async def _engine(backend: Backend, core: ControllerOptions, options: Options) -> list[Finding]:
    try:
        async with asyncio.timeout(_REACH_S):
            connected = await backend.engine.connect()
    except TimeoutError:
        return [Finding(mark="!!", text=f"engine {backend.name}: no answer within {_REACH_S:g} s")]
    except EngineError as error:
        if backend.process.starts_it:
            return [_would_start(backend, str(error))]
        return [Finding(mark="!!", text=f"engine {backend.name}: {error}; serve would wait for it")]
    finally:
        if backend.close is not None:
            await backend.close()
    if refused := backend.model.refused(connected):
        return [Finding(mark="!!", text=f"engine {backend.name}: {refused}", fatal=True)]
    described = Finding(mark="ok", text=_described(backend, connected, core, options))
    return [
        described,
        *_model(backend, connected),
        *_notes(backend, connected),
        *_dearer(backend, connected, core, options),
    ]


def _would_start(backend: Backend, error: str) -> Finding:
    """What serve would do about an engine that is not reached and has a command."""
    words = backend.process.command().words
    if shutil.which(words[0]) is None:
        text = f"engine {backend.name}: {error}; its command cannot be started: there is no program {words[0]}"
        return Finding(mark="!!", text=text)
    return Finding(mark="--", text=f"engine {backend.name}: {error}; serve would start it: {shlex.join(words)}")


def _described(backend: Backend, connected: Connected, core: ControllerOptions, options: Options) -> str:
    spec, clocks = connected.spec, connected.spec.clocks_mhz
    table = None if spec.unknown else core.tables.get(backend.tp)
    if table is not None:
        clocks = table.clocks_mhz
    chosen = f"would choose among {len(clocks)} clocks, {clocks[0]} to {clocks[-1]} MHz,"
    if isinstance(backend.gpu, RealGpu) and backend.gpu.mode is Mode.OFF:
        chosen = "would choose no clock, and plan with the top one"
    elif core.throttle.policy is ClockPolicy.FIXED:
        chosen = f"would keep to {core.throttle.fixed_mhz} MHz"
    elif core.throttle.policy is ClockPolicy.TOP or (core.slo_aware and _without_choice(backend, table)):
        chosen = "would keep to the top clock"
    simulated = "a simulated " if backend.clock.mode == "simulated" else ""
    if spec.unknown:
        capacities = f"{', '.join(spec.unknown)} unknown"
    else:
        capacities = (
            f"{spec.kv_blocks} KV blocks of {spec.block_tokens} tokens, {spec.max_batch} requests, "
            f"context {spec.max_context_tokens}"
        )
    serves = f"engine {backend.name} serves {', '.join(connected.models)}: {capacities}"
    return f"{serves}; policy {options.policy} {chosen} of {simulated}{backend.catalogue_gpu}"


def _dearer(backend: Backend, connected: Connected, core: ControllerOptions, options: Options) -> Iterator[Finding]:
    """Loads at which `throttllem` would cost more energy than the maximum clock."""
    table = None if connected.spec.unknown else core.tables.get(backend.tp)
    if core.throttle.policy is not ClockPolicy.THROTTLLEM or table is None or not table.clocks_measured:
        return
    spec = replace(connected.spec, clocks_mhz=table.clocks_mhz)
    loads = dearer_loads(table, spec, options.slo, reserve=core.throttle.margin + core.throttle.reserve)
    if loads is not None:
        text = (
            f"by its performance table, policy {options.policy} takes up to {loads.most:.0%} more energy than the "
            f"maximum clock between {loads.low_rps:.2g} and {loads.high_rps:.2g} requests/s (of {loads.prompt_tokens} "
            f"prompt and {loads.output_tokens} output tokens): it takes the lowest clock, whatever the GPUs draw at "
            "it; least-energy takes the cheapest"
        )
        yield Finding(mark="--", text=f"engine {backend.name}: {text}")


def _model(backend: Backend, connected: Connected) -> Iterator[Finding]:
    """Which model a real engine serves, as the catalogue knows it."""
    model = backend.model
    if backend.kind == "simulated":
        return
    model.reached(connected)
    if model.known and model.physics is not None:
        origin = "as it reports" if model.configured is None else "as configured"
        text = f"engine {backend.name}: its model is {model.name}, {origin}: {model.physics.model.described}"
        yield Finding(mark="ok", text=text)
    for note in model.notes:
        yield Finding(mark="!!" if model.known else "--", text=f"engine {backend.name}: {note}")


def _without_choice(backend: Backend, table: PerformanceTable | None) -> bool:
    """Whether no table tells one clock from another; that of a simulated engine is made at the first start."""
    return backend.kind != "simulated" if table is None else not table.clocks_measured


async def _hardware(backend: Backend, options: Options, origins: dict[str, str]) -> list[Finding]:
    """Real GPUs are found and read, never set; the finding names the mode that clocks would run in."""
    gpu = backend.gpu
    if isinstance(gpu, RemoteGpu):
        return [await _remote(backend.name, gpu)]
    if not isinstance(gpu, HardwareGpu):
        text = f"engine {backend.name}: clocks are simulated: it names no GPUs (engines.N.gpus, --gpus)"
        return [Finding(mark="--", text=text)]
    try:
        async with gpu:
            reading = gpu.read()
    except (OSError, ValueError) as error:
        return [Finding(mark="!!", text=f"engine {backend.name}: {error}", fatal=True)]
    count = "1 GPU" if len(gpu.names) == 1 else f"{len(gpu.names)} GPUs"
    text = f"engine {backend.name}: {count} of kind {backend.catalogue_gpu}"
    text += f" at {reading.clock_mhz} MHz, {reading.watts:.0f} W"
    why = f"clocks.mode = {gpu.mode.value}, {origins.get('clocks.mode', 'the default')}"
    findings = [Finding(mark="ok", text=text), await _clocks(backend.name, gpu, options, why)]
    if gpu.placement is not None:
        findings.append(Finding(mark=gpu.placement.place.value, text=f"engine {backend.name}: {gpu.placement.text}"))
    return findings


async def _remote(name: str, gpu: RemoteGpu) -> Finding:
    """What an agent says of its GPUs, which are read and not set."""
    until_s = asyncio.get_running_loop().time() + _REACH_S
    async with gpu:
        while True:
            try:
                reading = gpu.read()
                break
            except OSError as error:
                if asyncio.get_running_loop().time() > until_s:
                    return Finding(mark="!!", text=f"engine {name}: {error}; serve would go on without clocks")
            await asyncio.sleep(_LOOK_AGAIN_S)
    text = f"engine {name}: {', '.join(gpu.uuids)} at agent {gpu.address}, {reading.clock_mhz} MHz, "
    text += f"{reading.watts:.0f} W; clocks would be {gpu.mode.value}"
    return Finding(
        mark="!!" if reading.trouble else "ok", text=f"{text}: {reading.trouble}" if reading.trouble else text
    )


async def _clocks(name: str, gpu: HardwareGpu, options: Options, why: str) -> Finding:
    """Which mode an engine's clocks would run in, and why."""
    match gpu.mode:
        case Mode.OFF:
            return Finding(mark="ok", text=f"engine {name}: clocks would be off ({why}): left alone")
        case Mode.DRY_RUN:
            text = f"engine {name}: clocks would be a dry run ({why}): decided, recorded and shown, never set"
            return Finding(mark="ok", text=text)
    try:
        mark, text = await _setter(gpu, options)
    except OSError as error:
        return Finding(mark="!!", text=f"engine {name}: clocks would be a dry run (though {why}): {error}")
    return Finding(mark=mark, text=f"engine {name}: clocks would be on ({why}): {text}")


async def _setter(gpu: HardwareGpu, options: Options) -> tuple[str, str]:
    """The mark, and how clocks would be set. Raises OSError where they would not be."""
    if (zeusd := options.clocks.zeusd) is not None:
        await asyncio.to_thread(reach, zeusd)
        return "ok", f"set through zeusd at {zeusd}"
    status = await keeper_status(options.clocks.keeper)
    if missing := [uuid for uuid in gpu.uuids if uuid not in status["allowed"]]:
        raise OSError(f"the keeper was not given --gpu {', '.join(missing)}")
    text, top = f"set through the keeper at {options.clocks.keeper}", gpu.ladder_mhz[-1]
    low, high = (pick(status["allowed"][uuid][end] for uuid in gpu.uuids) for end, pick in enumerate((max, min)))
    if not any(low <= clock <= high for clock in gpu.ladder_mhz):
        return "!!", f"{text}, which may set {low} to {high} MHz, where these GPUs have no clock: mend its --gpu"
    if high < top:
        return "--", f"{text}, at most {high} of {top} MHz: its --gpu allows no more"
    if taken := [f"{uuid} ({status['held'][uuid]['by']})" for uuid in gpu.uuids if uuid in status["held"]]:
        return "--", f"{text}, once its present holder releases {', '.join(taken)}"
    return "ok", text


def _notes(backend: Backend, connected: Connected) -> Iterator[Finding]:
    for note in connected.notes:
        yield Finding(mark="--", text=f"engine {backend.name}: {note}")


def _calibrated(backend: Backend, basis: Calibrated) -> Finding:
    return Finding(
        mark="--",
        text=f"engine {backend.name}: its table is calibrated on a quick profile at "
        f"{', '.join(map(str, basis.clocks_mhz))} MHz, not measured at every clock. Nine tenths of the held-out "
        f"seconds were within {basis.seconds_error:.1%}, of the watts within {basis.watts_error:.1%}. At least "
        f"{basis.seconds_error:.1%} of each SLO is reserved, and no clock below {basis.clocks_mhz[0]} MHz is set",
    )


def _no_clock_axis(backend: Backend) -> Finding:
    return Finding(
        mark="--",
        text=f"engine {backend.name}: the clock axis of its table was not measured (a profile without --gpus, or "
        "of one clock): the clock stays at its maximum, and no saving is estimated; profile again with --gpus and "
        "--clocks",
    )


def _judged(backend: Backend, verdict: TableVerdict | None) -> Finding:
    """What `train` found of the engine's table."""
    if verdict is None:
        text = (
            "its table was not judged (an earlier version trained it): `throttllem train` again says what it is worth"
        )
        return Finding(mark="--", text=f"engine {backend.name}: {text}")
    errors = (("seconds", verdict.seconds_error), ("watts", verdict.watts_error))
    known = [f"{name} {error:.1%} off" for name, error in errors if error is not None]
    if not verdict.faults:
        text = f"engine {backend.name}: its table is sound: held-out {', '.join(known)}"
        return Finding(mark="--" if verdict.doubts else "ok", text="; but ".join([text, *verdict.doubts]))
    text = f"engine {backend.name}: of its table `train` found: {'; '.join(verdict.faults)}"
    if verdict.accepted:
        return Finding(mark="--", text=f"{text}; accepted with --accept")
    return Finding(mark="!!", text=f"{text}; --clocks on refuses it")


def _no_table(backend: Backend) -> Finding:
    if backend.kind == "simulated":
        return Finding(
            mark="--", text=f"engine {backend.name}: its performance table is trained at the first start (cached)"
        )
    dry_run = isinstance(backend.gpu, RealGpu) and backend.gpu.mode is not Mode.OFF
    prior = (
        "; until then what other clocks would save is estimated from the catalogue's law of "
        f"{backend.catalogue_gpu}, with a range (dashboard, metrics), and nothing is set by it"
    )
    return Finding(
        mark="--",
        text=f"engine {backend.name} has no performance table: the clock stays at its maximum, and admission does not "
        "check SLOs; "
        f"`throttllem profile --url ...`, `throttllem train`, then tables = FOLDER{prior if dry_run else ''}",
    )
