"""Every option of the program: one frozen tree. An option is written once, as a field of its section, with its range;
its flag, key, variable and documentation follow from the field.

Knows nothing of how an option is set: `option_sources` reads files, variables and flags.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from throttllem.core.clocks.policy import ThrottleOptions
from throttllem.core.clocks.sizing import AutoscaleOptions
from throttllem.core.options import AdmissionOptions
from throttllem.core.types import OptionError, Slo, check

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s*A-Z]+")
_HOST = re.compile(r"(?:\*\.)?[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*\.?")
SIMULATED_MODEL = "llama-3-8b"
"""What the simulated engine serves by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where the gateway listens, and which clients it serves."""

    host: str = "127.0.0.1"
    """Address of the API."""
    port: int = 8000
    """Port of the API; 0 takes any free one."""
    metrics_port: int | None = None
    """A separate port for `/metrics`, `/health` and `/dashboard`, which needs no API key."""
    metrics_host: str = "127.0.0.1"
    """Address of that port."""
    api_keys: tuple[str, ...] | None = field(default=None, repr=False)
    """A request must carry one of these keys. Without the option every client is served."""
    admin_keys: tuple[str, ...] | None = field(default=None, repr=False)
    """A request that changes an engine for all its clients, such as one that loads a LoRA adapter, must carry one of
    these keys. Without the option such requests are refused."""
    allowed_origins: tuple[str, ...] | None = None
    """Origins of web pages that may call the gateway (CORS), as in `https://chat.example.org`; `*`: all. Without API
    keys, requests of other pages are refused."""
    allowed_hosts: tuple[str, ...] | None = None
    """Names beside the machine's own under which a gateway without API keys is reached, as in `llm.example.org` or
    `*.example.org`; `*`: all. IP addresses and names without a dot always are."""
    keep_alive_s: float | None = None
    """An event stream gets a comment before it was silent for so long, also while its request waits, so that no proxy
    in front closes it. Without the option the engine's bytes are all that is sent."""
    seed: int = 0
    """Seed of the simulated engine."""

    def __post_init__(self) -> None:
        check("server", port=(self.port, 0, 65535))
        if self.metrics_port is not None:
            check("server", metrics_port=(self.metrics_port, 0, 65535))
            if self.port and (self.metrics_host, self.metrics_port) == (self.host, self.port):
                raise OptionError("server", "metrics_port", self.port, "must differ from server.port, or be absent")
        if self.api_keys is not None and not self.api_keys:
            problem = "set, but there is no key in it; leave it out to serve every client"
            raise OptionError("server", "api_keys", "", problem, secret=True)
        for name, keys in (("api_keys", self.api_keys), ("admin_keys", self.admin_keys)):
            if any(not key or key != key.strip() for key in keys or ()):
                problem = "a key is empty, or begins or ends with a blank; no request could carry it"
                raise OptionError("server", name, "", problem, secret=True)
        if self.keep_alive_s is not None:
            check("server", keep_alive_s=(self.keep_alive_s, 0.01, 3600))
        for origin in self.allowed_origins or ():
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                problem = "must be SCHEME://HOST or SCHEME://HOST:PORT without a path, as browsers send it, or *"
                raise OptionError("server", "allowed_origins", repr(origin), problem)
        for host in self.allowed_hosts or ():
            if host != "*" and not _HOST.fullmatch(host):
                problem = "must be a host name without scheme, port and path, *.NAME, or *"
                raise OptionError("server", "allowed_hosts", repr(host), problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitOptions:
    """Bounds on what one client, or one engine, can make the gateway hold."""

    body_bytes: int = 32 * 1024 * 1024
    """Largest body of a request."""
    held_bytes: int = 1024 * 1024 * 1024
    """Most bytes of requests and held replies in all; then a request is refused (503). One client gets half at most."""
    body_bytes_per_s: int = 4096
    """Slowest body, on average over `slow_reader_s`; then it has failed (408)."""
    header_bytes: int = 64 * 1024
    """Most bytes of a request's headers."""
    connections: int = 4096
    """Most connections that are open at once; fewer where the limit of open files has no room for two a request."""
    queue_wait_s: float = 600.0
    """Longest time in the admission queue; then the request is rejected (503)."""
    engine_wait_s: float = 30.0
    """How long a request waits for an engine while none is up."""
    silence_s: float = 120.0
    """How long an engine may show no sign of life, or report fewer requests than it was sent, while a running request
    gets nothing; then the request has failed (504)."""
    request_s: float = 3600.0
    """How long a running request may get no token, whatever its engine does for others; then it has failed (504)."""
    drain_s: float = 30.0
    """How long running requests may go on after SIGTERM."""
    slow_reader_s: float = 60.0
    """How long a client may read nothing before it is disconnected."""

    def __post_init__(self) -> None:
        check("limits", body_bytes=(self.body_bytes, 1024, 1 << 30), header_bytes=(self.header_bytes, 1024, 1 << 20))
        check("limits", held_bytes=(self.held_bytes, 1 << 20, 1 << 50))
        check("limits", body_bytes_per_s=(self.body_bytes_per_s, 0, 1 << 30))
        check("limits", connections=(self.connections, 1, 1 << 20), queue_wait_s=(self.queue_wait_s, 0.1, 86400))
        check("limits", engine_wait_s=(self.engine_wait_s, 0, 86400), silence_s=(self.silence_s, 0.1, 86400))
        check("limits", request_s=(self.request_s, 0.1, 7 * 86400))
        check("limits", drain_s=(self.drain_s, 0, 86400), slow_reader_s=(self.slow_reader_s, 0.1, 86400))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEntry:
    """One engine, with what it does not report about itself."""

    kind: Literal["simulated", "openai", "triton"] = "simulated"
    """`simulated` (embedded, in real time), `openai` (vLLM and others with OpenAI's API) or `triton`."""
    url: str | None = None
    """Where a real engine listens, as in `http://127.0.0.1:8001`."""
    gpu: str | None = None
    """GPU of the catalogue: its clocks and its power. Without it that of the boards in `gpus`, as NVML reports them;
    where none are named, a100-40gb-sxm."""
    model: str | None = None
    """Model of the catalogue, checkpoint (OWNER/NAME), or a `config.json` (the file or its folder). Without it what a
    real engine reports; a simulated one serves `llama-3-8b`."""
    tp: int = 1
    """Number of its GPUs (tensor parallel degree)."""
    tables: Path | None = None
    """Folder that `train` wrote. Without it a simulated engine trains its table at the first start (cached), and any
    other runs at the maximum clock."""
    served_as: str | None = None
    """Model name that clients use. Without it the engine's own name; for Triton the name in its model repository."""
    aliases: tuple[str, ...] = ()
    """Other names that clients may use for its models: `ALIAS=NAME` each, as in `gpt-4o=Qwen/Qwen3-8B`. The engine gets
    its own name."""
    tokenizer: Path | None = None
    """A tokenizer.json, for an engine that cannot count tokens."""
    stats: str | None = None
    """Where vLLM's plug-in sends its steps: the path of a Unix socket in a folder of this user, or HOST:PORT on
    loopback with a `stats_secret`."""
    stats_secret: Path | None = field(default=None, repr=False)
    """File with the secret that the plug-in signs its steps with over UDP; only its owner may read it."""
    gpus: tuple[str, ...] | None = None
    """The GPUs that it runs on, all of them, by UUID or number. Without it the GPUs of the catalogue are simulated."""
    agent: str | None = None
    """HOST:PORT of the `throttllem agent` on the engine's host, which reads these `gpus` and sets their clocks there.
    Needs `gpu`, and the pool's secret in `clocks.agent_secret`."""
    metrics_url: str | None = None
    """Where a Triton server reports its metrics."""
    max_batch: int | None = None
    """Most sequences in one iteration; only where the engine does not report it."""
    max_context_tokens: int | None = None
    """Longest context; only where the engine does not report it."""
    kv_blocks: int | None = None
    """Blocks of the KV cache; only where the engine does not report it."""
    block_tokens: int | None = None
    """Tokens in a KV block; only where the engine does not report it."""
    api_key: str | None = field(default=None, repr=False)
    """Sent to the engine instead of the client's own key."""
    command: str | None = None
    """Command that starts the engine on this host where nothing listens at its `url`, as in `vllm serve {model} -tp
    {tp} --port {port}`; {model}, {served_as}, {tp}, {host} and {port} are those of this entry. No shell reads it."""
    launcher: Path | None = None
    """Socket of `python -m throttllem.launchers`, which starts the engine by its command on a Ray cluster, on the node
    of its `url`. Without it the engine is a process of this host."""
    ready_s: float = 900.0
    """How long an engine that was started may take until it answers; then it is stopped and started again."""
    keep_running: bool = False
    """Leave an engine that was started running when the gateway ends; the next gateway adopts it."""

    @property
    def command_words(self) -> tuple[str, ...]:
        """The words of `command` with the values of this entry."""
        url = urlsplit(self.url or "")
        values = {"model": self.model, "served_as": self.served_as, "tp": self.tp, "host": url.hostname}
        values["port"] = url.port
        return tuple(_PLACE.sub(lambda found: str(values[found[1]]), word) for word in shlex.split(self.command or ""))

    @property
    def kind_of_gpu(self) -> str:
        """`gpu`, or the kind that is simulated where none is named."""
        return self.gpu or "a100-40gb-sxm"

    def __post_init__(self) -> None:
        if self.kind == "simulated" and self.model is None:
            object.__setattr__(self, "model", SIMULATED_MODEL)
        check("engines", tp=(self.tp, 1, 1024))
        for name in ("max_batch", "max_context_tokens", "kv_blocks", "block_tokens"):
            if (value := getattr(self, name)) is not None:
                check("engines", **{name: (value, 1, 1 << 40)})
        if self.kind != "simulated" and self.url is None:
            problem = "needs the engine's url, as in url = 'http://127.0.0.1:8001'"
            raise OptionError("engines", "kind", repr(self.kind), problem)
        if self.kind == "simulated" and self.url is not None:
            _check_url("url", self.url)
            problem = "a simulated engine has no url; kind = 'openai' or 'triton' has"
            raise OptionError("engines", "url", repr(self.url), problem)
        for name in ("url", "metrics_url"):
            if (url := getattr(self, name)) is not None:
                _check_url(name, url)
        if self.stats is not None and "/" not in self.stats and self.stats_secret is None:
            problem = (
                "any user of this machine could send to it: use the path of a Unix socket, as in "
                "~/.throttllem/steps.sock, or set stats_secret to a file with a shared secret (and "
                "THROTTLLEM_STATS_SECRET in vLLM's process)"
            )
            raise OptionError("engines", "stats", repr(self.stats), problem)
        for each in self.aliases:
            alias, _, name = each.partition("=")
            if not (alias.strip() and name.strip()):
                problem = "must be ALIAS=NAME: the name that clients use, and the engine's own, as gpt-4o=Qwen/Qwen3-8B"
                raise OptionError("engines", "aliases", repr(each), problem)
        if self.gpus is not None:
            self._check_gpus(self.gpus)
        if self.agent is not None:
            self._check_agent(self.agent)
        if self.command is not None:
            self._check_command(self.command)
        if self.launcher is not None and (self.command is None or self.gpus is not None):
            lacks = "there is no command that it could start" if self.command is None else "it chooses GPUs itself"
            problem = f"{lacks}; {'set command' if self.command is None else 'leave gpus out'}, or leave this out"
            raise OptionError("engines", "launcher", repr(str(self.launcher)), problem)
        check("engines", ready_s=(self.ready_s, 1, 86400))

    def _check_agent(self, agent: str) -> None:
        host, _, port = agent.rpartition(":")
        problem = None
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            problem = "must be HOST:PORT, as in 10.0.0.7:9440"
        elif self.gpus is None or self.gpu is None:
            lacks = "gpus" if self.gpus is None else "gpu"
            problem = f"needs `{lacks}`: which GPUs of that host the engine has, and of which kind they are"
        elif self.command is not None:
            problem = "is on another host, and `command` starts an engine on this one; leave one of them out"
        if problem is not None:
            raise OptionError("engines", "agent", repr(agent), problem)

    def _check_command(self, command: str) -> None:
        problem = None
        try:
            words = shlex.split(command)
        except ValueError as error:
            words, problem = [], f"cannot be split into words: {str(error).lower()}"
        known = {"model": self.model, "served_as": self.served_as, "tp": self.tp, "host": self.url, "port": self.url}
        for place in _PLACE.findall(" ".join(words)):
            if place not in known:
                problem = f"{{{place}}} is unknown; it may hold {', '.join(f'{{{name}}}' for name in known)}"
            elif known[place] is None:
                problem = f"holds {{{place}}}, which this entry does not set"
        if self.url is None or urlsplit(self.url).port is None:
            problem = (
                "needs the url at which the engine will listen, with its port, as in url = 'http://127.0.0.1:8001'"
            )
        elif not words and problem is None:
            problem = "is empty; leave it out where the engine is started otherwise"
        if problem is not None:
            raise OptionError("engines", "command", repr(command), problem)

    def _check_gpus(self, gpus: tuple[str, ...]) -> None:
        shown = ",".join(gpus)
        if self.kind == "simulated":
            problem = "a simulated engine has no GPUs; set the url of a real one (--engine, --triton)"
            raise OptionError("engines", "gpus", shown, problem)
        if len(set(gpus)) < len(gpus):
            raise OptionError("engines", "gpus", shown, "a GPU is named twice")
        if len(gpus) != self.tp:
            problem = (
                f"{len(gpus)} GPUs, and tp = {self.tp}: name all GPUs of the engine, and set tp (--tp) to their number"
            )
            raise OptionError("engines", "gpus", shown, problem)


_PLACE = re.compile(r"\{([a-z_]+)\}")
_CREDENTIALS = re.compile(r"(?:[^/?#]*:)?(?://)?[^/?#]*@")


def _check_url(name: str, url: str) -> None:
    """Refuse what is no HTTP address. The error shows no password."""
    if _CREDENTIALS.match(url):
        problem = "must hold no user and password; where the engine needs a key, set api_key"
        raise OptionError("engines", name, "", problem, secret=True)
    if not url.startswith(("http://", "https://")):
        raise OptionError("engines", name, repr(url), "must begin with http:// or https://")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockOptions:
    """How the clocks of real GPUs (`engines.N.gpus`) are set."""

    mode: Literal["on", "dry-run", "off"] = "dry-run"
    """`on` sets clocks; `dry-run` decides, records and shows them, and sets nothing; `off` makes no decision."""
    keeper: Path = Path("/run/throttllem/keeper.sock")
    """Socket of `throttllem keeper`, which leases the GPUs and restores their clocks."""
    zeusd: Path | None = None
    """Socket of a zeusd to set clocks through instead; it restores nothing if the gateway is killed."""
    ttl_s: float = 3.0
    """Time to live of the lease: the keeper restores the clocks so long after the gateway's last heartbeat."""
    agent_secret: Path | None = field(default=None, repr=False)
    """File with the pool's key and certificate, the same at the gateway and at every agent (`engines.N.agent`); only
    its owner may read it."""

    def __post_init__(self) -> None:
        check("clocks", ttl_s=(self.ttl_s, 0.2, 60))


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthOptions:
    """How output lengths are predicted: online, as requests finish, in a gateway and in a simulation alike."""

    predictor: Literal["online", "oracle", "max-tokens"] | None = None
    """`online` learns from finished requests (the default), `max-tokens` takes the request's limit, and `oracle`, which
    only a simulation has, reads them from the trace."""
    exceed: float = 0.1
    """Fraction of outputs that may be longer than `online` predicts."""
    p95_error: float | None = None
    """Relative error of `oracle` at p95, 0 without; a simulation that is given one takes `oracle`."""
    inflation: float | None = None
    """Factor on the predictions of `oracle`. Without it 1 + `p95_error`: the paper inflates, and leaves open by how
    much."""

    def __post_init__(self) -> None:
        check("length", exceed=(self.exceed, 0.001, 0.5), p95_error=(self.error, 0, 0.99))
        check("length", inflation=(self.factor, 0.1, 100))
        if self.p95_error is not None and self.predictor not in (None, "oracle"):
            problem = f"only the oracle has such an error; leave it out, or length.predictor = {self.predictor}"
            raise OptionError("length", "p95_error", f"{self.p95_error:g}", problem)

    @property
    def simulated(self) -> Literal["online", "oracle", "max-tokens"]:
        """The predictor of a simulation."""
        return self.predictor or ("online" if self.p95_error is None else "oracle")

    @property
    def error(self) -> float:
        """Relative error of the oracle at p95."""
        return self.p95_error or 0.0

    @property
    def factor(self) -> float:
        """Factor on the oracle's predictions."""
        return 1.0 + self.error if self.inflation is None else self.inflation


@dataclass(frozen=True, slots=True, kw_only=True)
class RecorderOptions:
    """The flight recorder, whose files `throttllem replay` reads."""

    enabled: bool = True
    """Whether events and commands are recorded."""
    folder: Path | None = None
    """Folder of the files. Without it `flight` in `state_dir`."""
    file_bytes: int = 32 * 1024 * 1024
    """Size at which a new file is begun."""
    files: int = 4
    """Number of files for each model; then the oldest is removed."""

    def __post_init__(self) -> None:
        check("recorder", file_bytes=(self.file_bytes, 64 * 1024, 1 << 40), files=(self.files, 2, 1000))


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingOptions:
    """How the simulated engine batches: as `engine` does when it is started without options, but for what is set."""

    engine: Literal["vllm", "tensorrt-llm", "sglang"] = "vllm"
    """The engine whose defaults hold."""
    block_tokens: int | None = None
    """Tokens in a KV block."""
    max_batch: int | None = None
    """Most sequences in one iteration."""
    prefill_budget_tokens: int | None = None
    """Most tokens, prompts and decoding together, in one iteration."""
    chunked: bool | None = None
    """Whether prompts are split over iterations."""
    no_evict: bool | None = None
    """Whether KV blocks for prompt + max_tokens are reserved before a request starts (TensorRT-LLM's
    GUARANTEED_NO_EVICT); otherwise requests are preempted when blocks run out (its MAX_UTILIZATION)."""
    kv_cache_dtype: Literal["auto", "bfloat16", "fp8"] = "auto"
    """Type of the KV cache's values; `auto`: what the model's checkpoint says, else that of its activations."""
    max_tokens: int | None = None
    """`max_tokens` of the requests of a simulation. Without it the longest output of the trace, rounded up to a power
    of two."""

    def __post_init__(self) -> None:
        bounds = {
            "block_tokens": (1, 1024),
            "max_batch": (1, 4096),
            "prefill_budget_tokens": (16, 1 << 20),
            "max_tokens": (1, 1 << 20),
        }
        for name, (least, most) in bounds.items():
            if (value := getattr(self, name)) is not None:
                check("batching", **{name: (value, least, most)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Log-normal scatter of one iteration of the simulated engine. Whole runs of real engines scatter by about 4 % in
    time and 5 % in power; single iterations on an otherwise idle machine scatter less.
    """

    time: float = 0.02
    """Standard deviation of the logarithm of the time."""
    power: float = 0.03
    """Standard deviation of the logarithm of the power."""

    def __post_init__(self) -> None:
        check("noise", time=(self.time, 0, 1), power=(self.power, 0, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultOptions:
    """What goes wrong in a simulated pool (`simulate --gpus`), at times that follow from the seed."""

    gpus_per_host: int = 8
    """GPUs of a host; an engine is on one host."""
    host_mtbf_s: float | None = None
    """Mean time between two losses of one host, with all engines on it; default: none is lost."""
    host_repair_s: float = 600.0
    """Time after which a lost host takes engines again."""
    failed_starts: float = 0.0
    """Fraction of starts that fail when the engine would be up."""
    hung_starts: float = 0.0
    """Fraction of starts that never end."""

    def __post_init__(self) -> None:
        check("faults", gpus_per_host=(self.gpus_per_host, 1, 1024), host_repair_s=(self.host_repair_s, 0, 31622400))
        check("faults", failed_starts=(self.failed_starts, 0, 0.99), hung_starts=(self.hung_starts, 0, 0.99))
        if self.host_mtbf_s is not None:
            check("faults", host_mtbf_s=(self.host_mtbf_s, 1, 1e12))


@dataclass(frozen=True, slots=True, kw_only=True)
class CostOptions:
    """What energy comes to in reports: CO2 and money of a kWh."""

    co2_g_per_kwh: float = 445.0
    """Grams of CO2 of a kWh. The default is the world average of 2024 (IEA, Electricity 2025)."""
    price_per_kwh: float = 0.08
    """Price of a kWh in `currency`. The default is what U.S. industry paid in 2023 on average (EIA: 8.06 cents)."""
    currency: str = "USD"
    """Name of the currency."""

    def __post_init__(self) -> None:
        check("cost", co2_g_per_kwh=(self.co2_g_per_kwh, 0, 5000), price_per_kwh=(self.price_per_kwh, 0, 1e6))


class Options(BaseSettings):
    """Options that belong to no section."""

    model_config = SettingsConfigDict(
        env_prefix="THROTTLLEM_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
    )

    policy: str = "least-energy"
    """How `serve` chooses clocks: `triton` (maximum clock, the baseline), `throttllem` (the paper's), `least-energy`,
    or `fixed:<MHz>`; each also with `+autoscale`."""
    server: ServerOptions = ServerOptions()
    limits: LimitOptions = LimitOptions()
    engines: tuple[EngineEntry, ...] = (EngineEntry(),)
    clocks: ClockOptions = ClockOptions()
    slo: Slo = Slo()
    """SLOs of a request that sends none."""
    classes: Mapping[str, Slo] = Field(default_factory=dict)
    """SLOs by name; a request chooses one with the header `x-slo-class`."""
    throttle: ThrottleOptions = ThrottleOptions()
    admission: AdmissionOptions = AdmissionOptions()
    autoscale: AutoscaleOptions = AutoscaleOptions()
    length: LengthOptions = LengthOptions()
    recorder: RecorderOptions = RecorderOptions()
    batching: BatchingOptions = BatchingOptions()
    noise: Noise = Noise()
    faults: FaultOptions = FaultOptions()
    cost: CostOptions = CostOptions()
    state_dir: Path = Path("~/.local/state/throttllem")
    """Folder for what survives a restart of the gateway: learned output lengths, and the flight recorder's files."""
    cache_dir: Path = Path("~/.cache/throttllem")
    """Folder for trained performance tables and characterised engines."""
    catalogue: Path | None = None
    """TOML file with GPUs and models of your own."""
    workers: int = Field(default=2, ge=1, le=64)
    """Number of policies that are simulated in parallel."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """`Options(...)` takes its arguments and the defaults alone; `load_options` reads the other sources."""
        return (init_settings,)

    @field_validator("engines", mode="before")
    @classmethod
    def _numbered(cls, value: Any) -> Any:
        """A list from elements under their numbers, as variables and `--set` name them."""
        if not isinstance(value, dict):
            return value
        for index in range(len(value)):
            if str(index) not in value:
                problem = f"there is no engines.{index}; number engines from 0"
                raise OptionError("engines", max(value, key=int), "", problem, secret=True)
        return [value[key] for key in sorted(value, key=int)]

    @property
    def aliases(self) -> dict[str, str]:
        """The engine's name of a model by each other name of it."""
        pairs = [each.partition("=") for entry in self.engines for each in entry.aliases]
        return {alias.strip(): name.strip() for alias, _, name in pairs}

    @model_validator(mode="after")
    def _aliases_are_apart(self) -> Options:
        aliases, own = self.aliases, {entry.served_as for entry in self.engines}
        for index, entry in enumerate(self.engines):
            for each in entry.aliases:
                alias, name = (part.strip() for part in each.split("=", 1))
                problem = None
                if aliases[alias] != name:
                    problem = f"{alias} stands for {aliases[alias]} too; an alias has one meaning in all engines"
                elif alias in own or name in aliases:
                    problem = "an alias is neither the name (served_as) nor the alias of another model"
                elif entry.served_as is not None and name != entry.served_as:
                    problem = (
                        f"clients know this engine as {entry.served_as} (served_as): write {alias}={entry.served_as}"
                    )
                if problem is not None:
                    raise OptionError("", f"engines.{index}.aliases", repr(each), problem)
        return self

    @model_validator(mode="after")
    def _clocks_have_gpus(self) -> Options:
        if self.clocks.mode == "on" and not any(entry.gpus for entry in self.engines):
            problem = "no engine names its GPUs; set engines.0.gpus (--gpus 0)"
            raise OptionError("", "clocks.mode", "'on'", problem)
        return self


RESOLVED = ("throttle.policy", "throttle.fixed_mhz")
"""Fields of the tree that follow from `policy` and cannot be set."""

RENAMED = MappingProxyType({"engine": "batching"})
"""Former names of sections, which still work."""

FORMER_VALUES = MappingProxyType({("clocks.mode", "advise"): "dry-run"})
"""Former values of options, which still work."""
