"""What `throttllem serve` can be told: one frozen tree, each option written once, here or where it is used.

The TOML has one table per field (`[server]`, `[[engines]]` ...); flags and environment variables come from the same
names. Knows nothing of how it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from throttllem.config import EngineOptions, Noise
from throttllem.core.admission import AdmissionOptions
from throttllem.core.clocks.policy import ThrottleOptions
from throttllem.core.clocks.sizing import AutoscaleOptions
from throttllem.core.types import Slo, check
from throttllem.engines.http import check_address
from throttllem.gpu.keeper_client import SOCKET, TTL_S


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where the gateway listens, and who may ask. `metrics_port`: `/metrics`, `/health` and `/dashboard` on a port of
    their own, of `metrics_host`, where no key is asked for. `api_keys`: a request must carry one of them (none:
    anybody may ask).
    """

    host: str = "127.0.0.1"
    port: int = 8000
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    api_keys: tuple[str, ...] | None = field(default=None, repr=False)
    seed: int = 0

    def __post_init__(self) -> None:
        check("server", port=(self.port, 0, 65535))
        if self.metrics_port is not None:
            check("server", metrics_port=(self.metrics_port, 0, 65535))
            if self.port and (self.metrics_host, self.metrics_port) == (self.host, self.port):
                raise ValueError(f"server.metrics_port = {self.port}: must differ from server.port, or be absent")
        if self.api_keys is not None:
            _check_keys(self.api_keys)


def _check_keys(keys: tuple[str, ...]) -> None:
    if not keys:
        raise ValueError("server.api_keys: set, but there is no key in it; leave it out if anybody may ask")
    if any(not key or key != key.strip() for key in keys):
        raise ValueError("server.api_keys: a key is empty, or begins or ends with a blank; no request could carry it")


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitOptions:
    """Bounds on what one client, or one engine, can make the gateway hold. Seconds, bytes.

    `queue_wait_s`: a request that waited so long for its place is refused (503). `engine_wait_s`: how long a request
    waits for an engine when none is up. `silence_s`: an engine that gives a running request nothing for so long has
    failed it (504). `drain_s`: after SIGTERM running requests have so long to finish. `slow_reader_s`: a client that
    takes nothing for so long is cut off. `connections`: open at once.
    """

    body_bytes: int = 8 * 1024 * 1024
    header_bytes: int = 64 * 1024
    connections: int = 4096
    queue_wait_s: float = 600.0
    engine_wait_s: float = 30.0
    silence_s: float = 120.0
    drain_s: float = 30.0
    slow_reader_s: float = 60.0

    def __post_init__(self) -> None:
        check("limits", body_bytes=(self.body_bytes, 1024, 1 << 30), header_bytes=(self.header_bytes, 1024, 1 << 20))
        check("limits", connections=(self.connections, 1, 1 << 20), queue_wait_s=(self.queue_wait_s, 0.1, 86400))
        check("limits", engine_wait_s=(self.engine_wait_s, 0, 86400), silence_s=(self.silence_s, 0.1, 86400))
        check("limits", drain_s=(self.drain_s, 0, 86400), slow_reader_s=(self.slow_reader_s, 0.1, 86400))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEntry:
    """One engine. `kind`: "simulated" (embedded, in real time), "openai" (vLLM and its kin) or "triton".

    `gpu`, `model`: names of the catalogue, for clocks and energy. `tp`: its GPUs. `tables`: folder that `train` wrote
    (None: for a simulated engine trained at the first start and cached; for others the top clock until there is one).
    `served_as`: the name that clients use (None: what the engine says; for Triton the name of its model repository
    entry). `tokenizer`: a tokenizer.json for engines that cannot count tokens. `stats`: where vLLM's plug-in sends its
    steps, a Unix socket path or HOST:PORT of loopback. `gpus`: the GPUs that it runs on, by UUID or number, all of them
    (None: GPUs of the catalogue are simulated). `max_batch`, `max_context_tokens`, `kv_blocks`, `block_tokens`
    only where the engine does not tell. `api_key` is sent to the engine in place of the client's own.
    """

    kind: Literal["simulated", "openai", "triton"] = "simulated"
    url: str | None = None
    gpu: str = "a100-40gb-sxm"
    model: str = "llama-3-8b"
    tp: int = 1
    tables: Path | None = None
    served_as: str | None = None
    tokenizer: Path | None = None
    stats: str | None = None
    gpus: tuple[str, ...] | None = None
    metrics_url: str | None = None
    max_batch: int | None = None
    max_context_tokens: int | None = None
    kv_blocks: int | None = None
    block_tokens: int | None = None
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.kind != "simulated" and self.url is None:
            raise ValueError(f"engines: kind {self.kind!r} needs url, as in url = 'http://127.0.0.1:8001'")
        if self.kind == "simulated" and self.url is not None:
            raise ValueError("engines: a simulated engine has no url; kind = 'openai' or 'triton' has")
        if self.gpus is not None and self.kind == "simulated":
            raise ValueError("engines: gpus: a simulated engine has none; give a real one its url (--engine, --triton)")
        if self.gpus is not None and len(set(self.gpus)) < len(self.gpus):
            raise ValueError(f"engines: gpus = {','.join(self.gpus)}: one of them is named twice")
        if self.gpus is not None and len(self.gpus) != self.tp:
            raise ValueError(
                f"engines: gpus = {','.join(self.gpus)}: {len(self.gpus)} of them, and tp = {self.tp}; "
                "name all its GPUs, and how many they are (engines.N.tp, --tp)"
            )
        for name in ("url", "metrics_url"):
            if (address := getattr(self, name)) is not None:
                check_address(f"engines: {name}", address)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockOptions:
    """How clocks of real GPUs (`engines.N.gpus`) are set. `mode`: "on"; "advise" decides, records and shows, and sets
    nothing; "off" leaves clocks alone. `keeper` is the socket of `throttllem keeper`, from which a lease of `ttl_s` is
    taken: so long after this process fell silent, clocks are restored (to the baseline of the keeper's --normally, else
    they are reset). `zeusd`: the socket of a zeusd to use instead (it resets nothing when this process is killed).
    """

    mode: Literal["on", "advise", "off"] = "advise"
    keeper: Path = SOCKET
    zeusd: Path | None = None
    ttl_s: float = TTL_S

    def __post_init__(self) -> None:
        check("clocks", ttl_s=(self.ttl_s, 0.2, 60))


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveLengthOptions:
    """How answers' lengths are predicted live. `predictor`: "online" learns from what finished, "max-tokens" knows
    nothing. `exceed`: the fraction of answers that may outgrow their prediction.
    """

    predictor: Literal["online", "max-tokens"] = "online"
    exceed: float = 0.1

    def __post_init__(self) -> None:
        check("length", exceed=(self.exceed, 0.001, 0.5))


@dataclass(frozen=True, slots=True, kw_only=True)
class RecorderOptions:
    """The flight recorder: `files` files of about `file_bytes` each per model, in `folder` (None: `flight` in the
    state's folder).
    """

    enabled: bool = True
    folder: Path | None = None
    file_bytes: int = 32 * 1024 * 1024
    files: int = 4

    def __post_init__(self) -> None:
        check("recorder", file_bytes=(self.file_bytes, 64 * 1024, 1 << 40), files=(self.files, 2, 1000))


RESOLVED = ("throttle.policy", "throttle.fixed_mhz")
"""What `policy` says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Everything `serve` can be told. `slo` is the promise of a request that names none; `classes` are promises by
    name, chosen with the header `x-slo-class`. `state_dir` keeps what survives a restart: what was learned of
    answers' lengths, and the flight recorder's files. `catalogue`: GPUs and models of your own.
    """

    policy: str = "least-energy"
    server: ServerOptions = field(default_factory=ServerOptions)
    limits: LimitOptions = field(default_factory=LimitOptions)
    engines: tuple[EngineEntry, ...] = (EngineEntry(),)
    clocks: ClockOptions = field(default_factory=ClockOptions)
    slo: Slo = field(default_factory=Slo)
    classes: Mapping[str, Slo] = field(default_factory=dict)
    throttle: ThrottleOptions = field(default_factory=ThrottleOptions)
    admission: AdmissionOptions = field(default_factory=AdmissionOptions)
    autoscale: AutoscaleOptions = field(default_factory=AutoscaleOptions)
    length: LiveLengthOptions = field(default_factory=LiveLengthOptions)
    recorder: RecorderOptions = field(default_factory=RecorderOptions)
    batching: EngineOptions = field(default_factory=EngineOptions)
    noise: Noise = field(default_factory=Noise)
    state_dir: Path = Path("~/.local/state/throttllem")
    catalogue: Path | None = None

    def __post_init__(self) -> None:
        if self.clocks.mode == "on" and not any(entry.gpus for entry in self.engines):
            raise ValueError("clocks.mode = 'on': no engine names its GPUs; set engines.0.gpus (--gpus 0)")
